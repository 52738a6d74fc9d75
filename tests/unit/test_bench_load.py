"""What the load benchmark makes of its samples: growth is found, and flat is flat."""

from __future__ import annotations

import pytest

from tests.bench.load import (
    FLAT_MB,
    Sample,
    Watch,
    about,
    at_round,
    attack_rows,
    play_soak,
    poll_rows,
    slope,
    soak_rows,
)
from tests.bench.pollers import quantiles

OPENED = [100.0 + 2 * number for number in range(100)]


class Seen(Watch):
    def __post_init__(self):
        """Watch nothing."""


def watched(rss, files=lambda _: 50):
    samples = [
        Sample(
            at=second, rss_mb=rss((second - 100) / 2), files=files((second - 100) / 2), threads=9,
            cpu_s=second / 4, ledger_mb=(second - 100) / 2 * 0.5, log_mb=(second - 100) / 2 * 0.25,
        )
        for second in range(100, 299)
    ]  # fmt: skip
    return Seen(pid=1, folder=None, samples=samples)  # type: ignore[arg-type]


def rows(**how):
    found = soak_rows(watched(**how), OPENED, nodes=33, params=7)
    return {row["what"].partition(": ")[2]: row for row in found}


def test_memory_that_grows_is_not_flat():
    flat = rows(rss=lambda number: 150 + (number % 2))
    growing = rows(rss=lambda number: 150 + 0.2 * number)
    assert flat["memory added by 100 rounds"]["met"] is True
    assert growing["memory added by 100 rounds"]["met"] is False
    assert growing["memory added by 100 rounds"]["ours"] == "20.0 MB"
    assert FLAT_MB < 20


def test_what_caches_take_in_the_beginning_is_no_growth():
    warm = rows(rss=lambda number: 100 if number < 20 else 200)
    assert warm["memory added by 100 rounds"]["met"] is True


def test_files_that_are_not_given_back_are_noticed():
    leak = rows(rss=lambda _: 150, files=lambda number: int(50 + number))
    assert leak["open files at most"]["met"] is False
    assert rows(rss=lambda _: 150)["open files at most"]["met"] is True


def test_what_a_round_adds_to_ledger_and_log():
    found = rows(rss=lambda _: 150)
    assert found["ledger added by a round"]["ours"] == "500 kB"
    assert found["log added by a round"]["ours"] == "250 kB"
    assert found["seconds of a round"]["ours"] == "2.00 s"
    assert "0.25 cores" in found["seconds of a round"]["note"]


def test_slope_and_rounds():
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    for points in ([(0, 1)], [(1, 1), (1, 2)]):
        with pytest.raises(ValueError):
            slope(points)
    sample = Sample(at=103.0, rss_mb=0, files=0, threads=0, cpu_s=0, ledger_mb=0, log_mb=0)
    assert at_round(sample, OPENED) == 2.5


def test_quantiles_and_rows_of_pollers():
    part = quantiles([0.001 * number for number in range(1, 101)], 10.0)
    assert (part["per_s"], part["p50_ms"], part["p99_ms"]) == pytest.approx((10.0, 51.0, 100.0))
    marks = {name: {"from": 110.0, "to": 150.0, **part} for name in ("waiting", "paced", "closed")}
    found = poll_rows(watched(rss=lambda _: 99), marks, nodes=1000)
    assert found[0]["ours"] == "0.25 cores of the coordinator"
    assert found[1]["ours"] == "10 requests/s, p50 51.0 ms, p99 100.0 ms"


def test_rows_of_the_attack():
    one = {"seconds": 2.0, "peak_rss_mb": 100.0, "files": 5}
    found = attack_rows({"quiet": one, "attacked": one, "counts": {"joins": {"OK": 3}}})
    assert "3 of them joins" in found[1]["note"]


def test_the_page_says_of_each_part_when_it_was_measured():
    quiet = {"date": "2026-11-29", "commit": "aaaaaaa", "load_1min": 0.5}
    busy = {"date": "2026-11-28", "commit": "bbbbbbb", "load_1min": 22.7}
    text = about({"attack": busy, "soak": quiet})
    assert "soak on 2026-11-29 at commit aaaaaaa, load 0.5 before it" in text
    assert "attack on 2026-11-28 at commit bbbbbbb, load 22.7 before it" in text
    assert "pollers" not in text


@pytest.mark.slow
def test_the_soak_itself_still_plays(tmp_path):
    """A few rounds with a real coordinator and its log: a benchmark nobody runs is soon broken."""
    watch, opened = play_soak(nodes=3, rounds=5, params=1000, work=tmp_path)
    assert len(opened) == 5
    assert opened == sorted(set(opened))
    assert all(sample.rss_mb > 20 for sample in watch.samples)
