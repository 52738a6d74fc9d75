"""The page of benchmarks says what the kept figures say, and nothing else."""

from __future__ import annotations

import json

import pytest

from tests.bench.page import FIGURES, PAGE, figures, load, merge, render
from tests.bench.rows import FLOOR, OURS, Row, Spread, round_work

MACHINE = {"cpus": 2, "load_1min": 0.1, "commit": "abc1234"}


def row(system: str, seconds: float, *, params: int = 25_000_000) -> Row:
    return Row(
        what=round_work(params=params, nodes=4),
        system=system,
        params=params,
        nodes=4,
        seconds_per_round=Spread.of([seconds]),
    )


def test_the_committed_page_is_the_rendering_of_the_committed_figures():
    assert PAGE.read_text() == render(load(), figures()), "run `make bench-page`"


def test_a_row_comes_back_from_json_as_it_was():
    before = row(OURS, 1.5)

    assert Row.from_json(json.loads(json.dumps(before.to_json()))).to_json() == before.to_json()


def test_measuring_a_part_again_leaves_the_rest():
    first = merge(None, [row(OURS, 3.0), row(FLOOR, 1.0), row(OURS, 0.5, params=10**6)], MACHINE)

    second = merge(first, [row(OURS, 4.0), row(FLOOR, 1.0)], {**MACHINE, "commit": "def5678"})

    large, small = round_work(params=25_000_000, nodes=4), round_work(params=10**6, nodes=4)
    assert second["works"][small] == first["works"][small]
    assert second["works"][large]["machine"]["commit"] == "def5678"
    assert [ratio["ratio"] for ratio in second["ratios"]] == [4.0]


def test_a_missed_promise_is_shown_as_missed():
    page = render(merge(None, [row(OURS, 4.0), row(FLOOR, 1.0)], MACHINE), [])

    (line,) = (line for line in page.splitlines() if FLOOR in line)
    assert "| 4.00 | 4.00 | at most 3 | **no** |" in line


def test_a_peer_that_did_not_run_is_named_with_the_reason():
    peer = Row(what=round_work(params=25_000_000, nodes=4), system="Peer 1", skipped="no network")

    assert "not measured: no network" in render(merge(None, [row(OURS, 4.0), peer], MACHINE), [])


def test_other_benchmarks_put_their_figures_on_the_page(tmp_path):
    facts = {
        "schema": FIGURES, "title": "Load", "repeat": "make load", "machine": MACHINE,
        "rows": [{"what": "polling", "ours": "812/s", "ratio": 0.25, "target": "x", "met": True}],
    }  # fmt: skip
    (tmp_path / "load.json").write_text(json.dumps(facts))

    page = render(None, figures(tmp_path))

    assert "## Load" in page
    assert "| polling | 812/s | 0.25 | x | yes |" in page


def test_a_file_of_another_form_is_refused(tmp_path):
    (tmp_path / "load.json").write_text('{"schema": "mine/1"}')

    with pytest.raises(ValueError, match="schema"):
        figures(tmp_path)
