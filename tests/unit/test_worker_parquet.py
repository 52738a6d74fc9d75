"""Parquet beside JSONL, data sets with weights: the same texts, exact positions, named faults."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node_agent.worker import text_files
from node_agent.worker.data import (
    IGNORE,
    PackedText,
    held_out,
    index_corpus,
    windowed_order,
)
from node_agent.worker.mixture import BLOCK, Mixture, check_apart, slots_of
from node_agent.worker.records import Records
from node_agent.worker.text_files import DataError, Reread, documents, find_files
from node_agent.worker.tokens import BOS, EOS

TEXTS = [f"{number}: el agua, a terra e a palavra " * (number % 3 + 1) for number in range(57)]


def parquet(path: Path, texts: list[str], *, rows: int = 10, **columns) -> Path:
    """A file with row groups of ``rows`` documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=rows)
    return path


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stream(text: PackedText, *, epoch: int = 0) -> list[int]:
    """The labels of an epoch, padding left out."""
    found: list[int] = []
    for index in range(text.per_epoch):
        _, labels = text.sequence(epoch * text.per_epoch + index)
        found += labels[labels != IGNORE].tolist()
    return found


def split(tokens: list[int]) -> list[str]:
    """Tokens of a stream without its first as texts."""
    found, part = [], bytearray()
    for token in tokens:
        if token == EOS:
            found.append(part.decode())
            part = bytearray()
        elif token != BOS:
            part.append(token)
    return found


# -- the same documents --------------------------------------------------------------------------


def test_rows_are_the_documents_that_lines_are(tmp_path):
    lines = index_corpus([str(jsonl(tmp_path / "a.jsonl", TEXTS))])
    rows = index_corpus([str(parquet(tmp_path / "a.parquet", TEXTS))])

    assert rows.fingerprint == lines.fingerprint
    assert rows.tokens.tolist() == lines.tokens.tolist()
    assert rows.group.tolist() == [number // 10 for number in range(57)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_string_column(tmp_path, kind):
    path = tmp_path / "a.parquet"
    texts = pa.array(["uno", "", "três", "uno"]).cast(kind)
    langs = pa.array(["es", None, "pt", "es"]).cast(kind)
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "lang": langs, "text": texts}), path)

    found = [(one.text.decode(), one.language) for one in documents(path)]
    assert found == [("uno", "es"), ("", "und"), ("três", "pt"), ("uno", "es")]
    again = Reread([str(path)])
    assert [again.text(0, at=row, size=0, group=0) for row in range(5)] == [
        *(text.encode() for text, _ in found),
        None,
    ]
    again.close()


def test_a_folder_gives_both_kinds_and_an_epoch_gives_each_text_once(tmp_path):
    parquet(tmp_path / "d/a.parquet", TEXTS[:30], rows=7)
    parquet(tmp_path / "d/deep/b.parquet", TEXTS[30:50], rows=7)
    jsonl(tmp_path / "d/c.jsonl", TEXTS[50:])
    corpus = index_corpus([str(tmp_path / "d")])
    text = PackedText(corpus, sequence_length=64, seed=5)

    orders = [split(stream(text, epoch=epoch)) for epoch in (0, 1)]
    text.close()
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(TEXTS)
    assert orders[0] != orders[1]


def test_any_position_is_read_without_what_comes_before(tmp_path):
    """What a restart needs: one integer."""
    corpus = index_corpus([str(parquet(tmp_path / "a.parquet", TEXTS, rows=4))])
    whole = PackedText(corpus, sequence_length=32, seed=3)
    walked = [whole.sequence(position) for position in range(2 * whole.per_epoch)]
    for position in (0, 17, whole.per_epoch - 1, whole.per_epoch, 2 * whole.per_epoch - 1):
        fresh = PackedText(corpus, sequence_length=32, seed=3)
        for one, other in zip(fresh.sequence(position), walked[position], strict=True):
            assert one.tolist() == other.tolist()
        fresh.close()


def test_held_out_text_may_be_rows(tmp_path):
    langs = ["es" if number % 2 else "pt" for number in range(57)]
    path = parquet(tmp_path / "a.parquet", TEXTS, lang=langs)
    lines = tmp_path / "b.jsonl"
    lines.write_text(
        "".join(
            json.dumps({"text": t, "lang": g}) + "\n" for t, g in zip(TEXTS, langs, strict=True)
        )
    )

    assert held_out([str(path)], limit=9) == held_out([str(lines)], limit=9)


def test_records_of_a_private_step_are_rows_too(tmp_path):
    """Poisson sampling looks at documents by number, whatever file they are in."""
    kinds = [jsonl(tmp_path / "a.jsonl", TEXTS), parquet(tmp_path / "a.parquet", TEXTS)]
    one, other = (
        Records(index_corpus([str(p)]), unit="document", max_sequences=2, sequence_length=16)
        for p in kinds
    )

    assert len(one) == len(other) == 57
    for number in range(57):
        assert one.read(number).inputs.tolist() == other.read(number).inputs.tolist()
    one.close()
    other.close()


# -- the order -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(-1, 6), min_size=1, max_size=60),
    sizes=st.integers(0, 50),
    window=st.integers(1, 400),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_reads_few_row_groups_at_a_time(groups, sizes, window, seed):
    """A permutation; between the first and the last document of a row group there are only
    documents of its window, and a window has one row group or fits."""
    group = np.unique(groups, return_inverse=True)[1].astype(np.int32) - (min(groups) < 0)
    if group.max() < 0:
        return
    text = np.full(group.size, sizes, dtype=np.int64)
    order = windowed_order(group, text, seed=seed, epoch=1, window=window)

    assert sorted(order.tolist()) == list(range(group.size))
    assert order.tolist() == windowed_order(group, text, seed=seed, epoch=1, window=window).tolist()
    placed = group[order]
    open_groups: set[int] = set()
    for place, one in enumerate(placed.tolist()):
        if one >= 0:
            open_groups.add(one)
        left = set(placed[place + 1 :].tolist())
        open_groups &= left
        held = sum(int(text[group == g].sum()) for g in open_groups)
        assert len(open_groups) <= 1 or held <= window


def test_the_order_of_rows_is_pinned():
    """A stored position must mean the same tomorrow."""
    group = np.repeat(np.arange(4, dtype=np.int32), 3)
    order = windowed_order(group, np.full(12, 10), seed=7, epoch=2, window=60)
    assert order.tolist() == PINNED
    other = windowed_order(group, np.full(12, 10), seed=8, epoch=2, window=60)
    assert other.tolist() != PINNED


PINNED = [10, 11, 4, 5, 3, 9, 8, 6, 0, 7, 1, 2]


def test_row_groups_are_unpacked_about_once_an_epoch(tmp_path, monkeypatch):
    corpus = index_corpus([str(parquet(tmp_path / "a.parquet", TEXTS * 4, rows=12))])
    monkeypatch.setattr("node_agent.worker.data.WINDOW", 3000)
    monkeypatch.setattr(text_files, "_HELD_GROUPS", 12_000)
    order = windowed_order(corpus.group, corpus.text, seed=1, epoch=0, window=3000)
    reads: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self, group, **more):
        reads.append(group)
        return real(self, group, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    again = Reread(corpus.files)
    for document in order.tolist():
        assert again.text(
            0, at=int(corpus.offset[document]), size=0, group=int(corpus.group[document])
        )
    again.close()
    assert len(reads) == len(set(reads)) == 19


# -- what is wrong with a file -------------------------------------------------------------------


def bad_files(folder: Path) -> dict[str, tuple[Path, str, str]]:
    """A file, its code, and words of the sentence."""
    whole = parquet(folder / "whole.parquet", TEXTS)
    cut = folder / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-40])
    (folder / "lines.parquet").write_text('{"text": "secret"}\n')
    torn = folder / "torn.parquet"
    content = bytearray(whole.read_bytes())
    content[20:400] = bytes(380)
    torn.write_bytes(content)
    bytes_ = folder / "bytes.parquet"
    pq.write_table(pa.table({"text": pa.array([b"secret"], pa.binary())}), bytes_)
    # pyarrow checks nothing when it is told that bytes are a string
    latin = folder / "latin.parquet"
    raw = pa.Array.from_buffers(pa.string(), 1, pa.array([b"secret\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": raw}), latin)
    return {
        "cut": (cut, "data.malformed", "is not a Parquet file"),
        "lines": (folder / "lines.parquet", "data.malformed", "is not a Parquet file"),
        "torn": (torn, "data.malformed", "after row 0"),
        "gone": (folder / "gone.parquet", "data.missing", "there is no data at"),
        "numbers": (
            parquet(folder / "n.parquet", [1, 2]),
            "data.malformed",
            'no column of strings "text"',
        ),
        "bytes": (bytes_, "data.malformed", 'no column of strings "text"'),
        "latin": (latin, "data.malformed", "row 1 is not UTF-8"),
        "null": (
            parquet(folder / "u.parquet", ["secret", None]),
            "data.malformed",
            'row 2 has no "text"',
        ),
        "lang": (
            parquet(folder / "l.parquet", ["secret"], lang=["x" * 65]),
            "data.malformed",
            'row 1 has a "lang"',
        ),
        "lang kind": (
            parquet(folder / "k.parquet", ["secret"], lang=[3]),
            "data.malformed",
            'no column of strings "lang"',
        ),
        "no text": (parquet(folder / "e.parquet", ["", ""]), "data.empty", "no text in"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "cut",
        "lines",
        "torn",
        "gone",
        "numbers",
        "bytes",
        "latin",
        "null",
        "lang",
        "lang kind",
        "no text",
    ],
)
def test_a_bad_file_is_named_and_never_quoted(tmp_path, what):
    path, code, words = bad_files(tmp_path)[what]
    for read in (index_corpus, lambda paths: held_out(paths, limit=None)):
        with pytest.raises(DataError, match=words) as refused:
            read([str(path)])
        assert refused.value.code == code
        assert str(path) in str(refused.value)
        assert "secret" not in str(refused.value)


def test_a_row_group_that_is_too_large_is_refused(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setattr(text_files, "MAX_GROUP", 100)
    with pytest.raises(DataError, match=r"row group 0 holds .* smaller row groups"):
        index_corpus([str(path)])


@pytest.mark.parametrize("change", ["shorter", "rewritten", "garbage", "gone"])
def test_a_file_that_changes_under_the_worker_is_noticed(tmp_path, change):
    path = parquet(tmp_path / "a.parquet", TEXTS)
    text = PackedText(index_corpus([str(path)]), sequence_length=32, seed=1)
    if change == "shorter":
        parquet(path, TEXTS[:12])
    elif change == "rewritten":
        parquet(path, [text + "!" for text in TEXTS])
    elif change == "garbage":
        path.write_bytes(b"#" * path.stat().st_size)
    else:
        path.unlink()
    with pytest.raises(DataError, match=f"{path} changed") as refused:
        stream(text)
    assert refused.value.code == "data.changed"


# -- weights -------------------------------------------------------------------------------------


def mixed(
    root: Path, weights: tuple[float, ...], *, seed: int = 4
) -> tuple[Mixture, list[PackedText]]:
    """Data sets whose texts say which one they are of; and each alone."""
    corpora = [
        index_corpus([str(parquet(root / f"{d}.parquet", [f"{d}" * (20 + 7 * d)] * (9 + 2 * d)))])
        for d in range(len(weights))
    ]
    return Mixture(corpora, weights, sequence_length=16, seed=seed), corpora


def owner(labels: np.ndarray) -> int:
    return int(chr(next(token for token in labels.tolist() if 0 <= token < 256)))


def test_each_block_has_every_data_sets_share(tmp_path):
    text, _ = mixed(tmp_path, (3.0, 1.0, 0.5))
    for block in (0, 1, 7):
        seen = Counter(
            owner(text.sequence(position)[1])
            for position in range(block * BLOCK, (block + 1) * BLOCK)
        )
        assert [seen[d] for d in range(3)] == list(slots_of((3.0, 1.0, 0.5)))
    text.close()


def test_each_data_set_is_walked_in_order_and_none_is_left_out(tmp_path):
    """The places that a mixture asks a data set for are 0, 1, 2, … whatever stands between."""
    text, _ = mixed(tmp_path, (3.0, 1.0, 0.5))
    asked: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for position in range(3 * BLOCK):
        d, own = text.where(position)
        asked[d].append(own)
    assert all(places == list(range(len(places))) for places in asked.values())
    fresh, _ = mixed(tmp_path, (3.0, 1.0, 0.5))
    for position in (2 * BLOCK + 5, 3, BLOCK):
        for one, other in zip(fresh.sequence(position), text.sequence(position), strict=True):
            assert one.tolist() == other.tolist()
        assert fresh.predicted(position) == (text.sequence(position)[1] != IGNORE).sum()


def test_the_order_of_a_block_is_drawn(tmp_path):
    orders = set()
    for seed in (1, 2):
        text, _ = mixed(tmp_path, (1.0, 1.0), seed=seed)
        for block in (0, 1):
            orders.add(tuple(text.where(block * BLOCK + i)[0] for i in range(BLOCK)))
    assert len(orders) == 4
    assert all(len(set(order[:64])) == 2 for order in orders)  # no long stretch of one


@given(weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9))
def test_slots_are_the_weights_to_one_slot(weights):
    total = sum(weights)
    slots: tuple[int, ...] = ()
    with contextlib.suppress(DataError):
        slots = slots_of(weights)
    if not slots:
        assert min(weights) * BLOCK < total
        return
    assert sum(slots) == BLOCK
    for slot, weight in zip(slots, weights, strict=True):
        assert abs(slot - BLOCK * weight / total) < 1 + 1e-6
        assert slot >= 1


def test_equal_weights_and_a_single_one():
    assert slots_of([5.0]) == (BLOCK,)
    assert slots_of([1.0, 1.0, 1.0]) == (342, 341, 341)


def test_a_file_in_two_data_sets_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(DataError, match="two weighted data sets") as refused:
        check_apart([str(path), str(tmp_path)])
    assert refused.value.code == "data.weights"
    check_apart([str(path)])


def test_folders_without_text_files_are_said(tmp_path):
    (tmp_path / "a.txt").write_text("no")
    with pytest.raises(DataError, match=r"no \*\.jsonl and no \*\.parquet"):
        find_files([str(tmp_path)])
