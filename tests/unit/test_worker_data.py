"""A site's text: every token once, every bad line named, every position exact."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node_agent.worker.data import (
    IGNORE,
    DataError,
    HeldOut,
    PackedText,
    epoch_order,
    find_files,
    held_out,
    index_corpus,
    windows,
)
from node_agent.worker.tokens import BOS, EOS, PAD


def jsonl(path: Path, *texts: str, lang: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {} if lang is None else {"lang": lang}
    lines = [json.dumps({"text": text, **extra}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


# -- finding -------------------------------------------------------------------------------------


def test_files_folders_and_globs_give_each_file_once(tmp_path):
    a, b = jsonl(tmp_path / "d/a.jsonl", "a"), jsonl(tmp_path / "d/sub/b.jsonl", "b")
    c = jsonl(tmp_path / "e/c.text", "c")
    (tmp_path / "link.jsonl").symlink_to(a)
    (tmp_path / "d/readme.md").write_text("not data")

    paths = [str(tmp_path / "d"), str(a), str(tmp_path / "e/*.text"), str(tmp_path / "link.jsonl")]

    assert set(find_files(paths)) == {a, b, c}
    backward = [file.resolve() for file in find_files(paths[::-1])]
    assert backward == list(find_files(paths))  # the order is not the operator's


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        ([], "data.empty"),
        (["{}/nowhere.jsonl"], "data.missing"),
        (["{}/*.nothing"], "data.missing"),
        (["{}/empty"], "data.empty"),
    ],
)
def test_data_that_is_not_there(tmp_path, paths, code):
    (tmp_path / "empty").mkdir()

    with pytest.raises(DataError) as refused:
        index_corpus([path.format(tmp_path) for path in paths])

    assert refused.value.code == code


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON"),
        (b'["x"]', "not a JSON object"),
        (b'{"txt": "x"}', 'no string "text"'),
        (b'{"text": 3}', 'no string "text"'),
        (b'{"text": "x", "lang": 3}', '"lang"'),
        (b'{"text": "x", "lang": ""}', '"lang"'),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_never_quoted(tmp_path, line, reason):
    path = tmp_path / "secret.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line + b'\n{"text": "five"}\n')

    for read in (index_corpus, lambda paths: held_out(paths, limit=None)):
        with pytest.raises(DataError, match=f"{path}:4: the line .*{reason}") as refused:
            read([str(path)])
        assert refused.value.code == "data.malformed"
        assert "two" not in str(refused.value)
        assert len(str(refused.value)) < 400


def test_files_without_text_are_empty(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "", "")

    for read in (index_corpus, lambda paths: held_out(paths, limit=None)):
        with pytest.raises(DataError) as refused:
            read([str(path)])
        assert refused.value.code == "data.empty"


def test_a_file_that_cannot_be_read_is_missing(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", "x")
    real = Path.open

    def refuse(self, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom chmod does not stop

    with pytest.raises(DataError, match="Permission denied") as refused:
        index_corpus([str(path)])
    assert refused.value.code == "data.missing"


# -- packing -------------------------------------------------------------------------------------


def stream_of(texts: list[str], *, seed: int, epoch: int) -> list[int]:
    """The epoch's tokens, laid out the slow and obvious way."""
    order = epoch_order(len(texts), seed=seed, epoch=epoch)
    tokens: list[int] = []
    for document in order:
        tokens += [BOS, *texts[document].encode(), EOS]
    return tokens


def packed(path: Path, *, length: int, seed: int = 5) -> PackedText:
    return PackedText(index_corpus([str(path)]), sequence_length=length, seed=seed)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=8),
    length=st.integers(8, 40),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_predicts_every_token_but_the_first_exactly_once(
    tmp_path_factory, texts, length, seed
):
    texts = [*texts, "ñ"]  # at least one has a byte
    path = jsonl(tmp_path_factory.mktemp("d") / "a.jsonl", *texts)
    text = packed(path, length=length, seed=seed)
    for epoch in (0, 3):
        wanted = stream_of(texts, seed=seed, epoch=epoch)
        seen: list[int] = []
        for index in range(text.per_epoch):
            position = epoch * text.per_epoch + index
            inputs, labels = text.sequence(position)
            real = labels != IGNORE
            assert inputs.shape == labels.shape == (length,)
            assert text.predicted(position) == real.sum()
            assert (inputs[~real] == PAD).all()
            start = index * length
            assert inputs[real].tolist() == wanted[start : start + real.sum()]
            seen += labels[real].tolist()
        assert seen == wanted[1:]
    text.close()


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    orders = {
        (seed, epoch): tuple(epoch_order(50, seed=seed, epoch=epoch))
        for seed in range(4)
        for epoch in range(4)
    }

    assert len(set(orders.values())) == 16
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    # Pinned: a stored position must mean the same tomorrow.
    assert epoch_order(8, seed=7, epoch=2).tolist() == [6, 4, 0, 5, 7, 1, 3, 2]


def test_a_long_document_is_read_again_only_when_it_must_be(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", "x" * 10_000)
    text = packed(path, length=8)
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: (reads.append(1), real(*a))[1])

    for position in range(200):
        text.sequence(position)

    assert len(reads) == 1


@pytest.mark.parametrize("change", ["shorter", "rewritten", "gone to garbage"])
def test_a_file_that_changes_under_the_worker_is_noticed(tmp_path, change):
    path = jsonl(tmp_path / "a.jsonl", "uno", "dos", "tres")
    text = packed(path, length=8)
    if change == "shorter":
        path.write_text('{"text": "uno"}\n')
    elif change == "rewritten":
        jsonl(path, "un", "do", "tre", "cuatro")
    else:
        path.write_bytes(b"#" * path.stat().st_size)

    def read_all():
        return [text.sequence(position) for position in range(text.per_epoch)]

    with pytest.raises(DataError, match=f"{path} changed") as refused:
        read_all()

    assert refused.value.code == "data.changed"


def test_the_fingerprint_is_of_the_texts(tmp_path):
    one = index_corpus([str(jsonl(tmp_path / "a.jsonl", "ab", "c"))])
    same = index_corpus([str(jsonl(tmp_path / "b.jsonl", "ab", "c", lang="es"))])
    other = index_corpus([str(jsonl(tmp_path / "c.jsonl", "a", "bc"))])

    assert one.fingerprint == same.fingerprint != other.fingerprint


# -- held-out text -------------------------------------------------------------------------------


def test_the_held_out_choice_does_not_depend_on_the_order_of_lines(tmp_path):
    texts = [f"documento {number}" for number in range(60)]
    forward = jsonl(tmp_path / "f.jsonl", *texts, lang="es")
    backward = jsonl(tmp_path / "b.jsonl", *texts[::-1], lang="es")

    chosen = held_out([str(forward)], limit=10)

    assert chosen == held_out([str(backward)], limit=10)
    assert len(chosen) == 10
    assert [d.text.decode() for d in chosen] != texts[:10]  # not simply the first lines
    assert set(held_out([str(forward)], limit=10)) <= set(held_out([str(forward)], limit=20))
    assert len(held_out([str(forward)], limit=None)) == 60


def test_held_out_text_without_a_language_is_undetermined(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "x", "")

    assert held_out([str(path)], limit=None) == (HeldOut(language="und", text=b"x"),)


@given(text=st.binary(min_size=1, max_size=100), length=st.integers(1, 40))
def test_windows_predict_every_byte_once(text, length):
    cut = list(windows(HeldOut(language="es", text=text), sequence_length=length))

    assert b"".join(bytes(window.labels.tolist()) for window in cut) == text
    assert all(1 <= window.inputs.size == window.labels.size <= length for window in cut)
    assert np.concatenate([w.inputs for w in cut]).tolist() == [BOS, *text[:-1]]
