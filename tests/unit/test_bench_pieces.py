"""What a round is made of, at the smallest size: every piece does its work and is shown."""

from __future__ import annotations

import pytest

from tests.bench import pieces


@pytest.mark.parametrize("name", sorted(pieces.PIECES))
def test_a_piece_runs_to_its_end_in_both_processes(name, tmp_path):
    assert 0 < pieces.measure(name, 200_000, tmp_path) < 60
    assert not list(tmp_path.iterdir())


def test_a_piece_that_fails_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "make_identities", lambda *_, **__: (tmp_path / "tls").mkdir())
    with pytest.raises(ChildProcessError, match="sending"):
        pieces.measure("sending", 200_000, tmp_path)


def test_a_piece_of_which_one_process_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "WAIT_S", 4.0)
    monkeypatch.setattr(pieces, "free_port", lambda: "0")  # nobody answers there
    with pytest.raises(ChildProcessError, match="sending"):
        pieces.measure("sending", 200_000, tmp_path)


def test_the_page_says_what_the_pieces_and_the_rest_take():
    found = {"adding": [1.0], "hashing": [2.0, 1.0, 9.0], "storing": [4.0]}
    lines = pieces.rows_of(found, [10.0, 8.0, 12.0], 25_000_000)
    assert [line["what"].rpartition(": ")[2] for line in lines] == [
        "hashing", "adding", "all of these", "the rest", "storing",
    ]  # fmt: skip
    assert [line["ours"] for line in lines] == ["2.00 s", "1.00 s", "3.00 s", "7.00 s", "4.00 s"]
    assert [line["ratio"] for line in lines] == [0.2, 0.1, 0.3, 0.7, 0.4]
    assert all(line["other"] == "10.00 s" for line in lines)
