"""The benchmark's arithmetic: ratios, promises, and what a skipped peer looks like."""

from __future__ import annotations

import pytest

from tests.bench.rows import (
    FLOOR,
    NEW_TLS,
    OURS,
    RAW_TLS,
    Limit,
    Row,
    Spread,
    Target,
    memory_checks,
    rate_checks,
    ratios,
    report,
    round_work,
    table,
    together,
)

WORK = round_work(params=25_000_000, nodes=4)


def row(system: str, *seconds: float, **more: object) -> Row:
    spread = Spread.of(seconds) if seconds else None
    return Row(
        what=WORK, system=system, params=25_000_000, nodes=4, seconds_per_round=spread, **more
    )


def test_a_spread_is_minimum_median_maximum():
    assert Spread.of([5.0, 1.0, 9.0, 2.0]).to_json() == {"min": 1.0, "median": 3.5, "max": 9.0}
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_ratios_divide_our_median_by_the_other_median():
    rows = [row(OURS, 1.0, 1.5, 9.0), row(FLOOR, 0.4, 0.5, 0.6), row("NVIDIA FLARE 2.9.0", 5.0)]

    found = {ratio.other: ratio for ratio in ratios(rows)}

    assert found[FLOOR].value == pytest.approx(3.0)
    assert found[FLOOR].met is True  # at most 3: the limit itself is met
    assert found["NVIDIA FLARE 2.9.0"].value == pytest.approx(0.3)
    assert found["NVIDIA FLARE 2.9.0"].met is True


def test_turns_count_alike_and_the_best_of_each_are_compared_too():
    ours = together([row(OURS, 3.0, 4.0, server_peak_rss_mb=170.0), row(OURS, 2.0)])
    floor = together([row(FLOOR, 1.0, 1.1), row(FLOOR, 0.5), row(FLOOR, 1.2)])

    (ratio,) = ratios([ours, floor])

    assert ours.server_peak_rss_mb == 170.0
    assert ratio.value == pytest.approx(3.0 / 1.05)
    assert ratio.best == pytest.approx(2.0 / 0.5)


def test_a_turn_that_was_skipped_counts_only_if_all_were():
    gone = row("NVIDIA FLARE 2.9.0", skipped="port in use")

    assert together([gone, row("NVIDIA FLARE 2.9.0", 5.0)]).seconds_per_round.median == 5.0
    assert together([gone, gone]).skipped == "port in use"


def test_a_missed_promise_is_called_missed():
    """The verdict can fail: the same rows, a little slower."""
    rows = [row(OURS, 1.6), row(FLOOR, 0.5), row("NVIDIA FLARE 2.9.0", 3.0)]

    assert [ratio.met for ratio in ratios(rows)] == [False, False]
    assert table(rows).count("MISSED") == 2


def test_no_promise_no_verdict():
    (ratio,) = ratios([row(OURS, 1.0), row("OpenFL 1.9", 2.0)])

    assert (ratio.limit, ratio.met) == ("", None)
    assert "MISSED" not in table([row(OURS, 1.0), row("OpenFL 1.9", 2.0)])


def test_only_rows_of_the_same_work_are_compared():
    other = Row(what="something else", system=FLOOR, seconds_per_round=Spread.of([0.1]))

    assert ratios([row(OURS, 1.0), other]) == []


def test_a_promise_holds_for_its_size_only():
    small = Target(measure="seconds_per_round", other=FLOOR, at_most=3.0, params=2_500_000)

    (ratio,) = ratios([row(OURS, 1.0), row(FLOOR, 0.1)], targets=[small])

    assert ratio.met is None


def test_a_skipped_peer_is_shown_as_skipped_and_compared_with_nothing():
    peer = row("NVIDIA FLARE 2.9.0", skipped="installation failed: no network")
    rows = [row(OURS, 1.0), peer]

    assert ratios(rows) == []
    (line,) = [line for line in table(rows).splitlines() if "FLARE" in line]
    assert line.split() == [
        "NVIDIA",
        "FLARE",
        "2.9.0",
        "skipped:",
        "installation",
        "failed:",
        "no",
        "network",
    ]
    as_json = report(rows)["rows"][1]
    assert as_json["skipped"] == "installation failed: no network"
    assert as_json["seconds_per_round"] is None


def test_memory_is_held_against_its_limit_and_against_four_nodes():
    def memory(nodes: int, mb: float) -> Row:
        return Row(what=f"{nodes}", system=OURS, params=10, nodes=nodes, server_peak_rss_mb=mb)

    limits = [Limit(params=10, nodes=4, at_most_mb=100.0)]

    good = memory_checks([memory(4, 100.0), memory(33, 110.0)], limits)
    bad = memory_checks([memory(4, 100.1), memory(33, 110.2)], limits)

    assert [check.met for check in good] == [True, True]
    assert [check.met for check in bad] == [False, False]
    assert memory_checks([memory(33, 1.0)], limits) == []  # nothing to compare with


def test_a_rate_that_is_too_low_is_missed():
    rows = [
        Row(what="audit of a log", system=f"{OURS}, verify", leaves_per_s=rate)
        for rate in (2500.0, 1999.0)
    ]
    rows.append(Row(what="audit of a log", system="floor", leaves_per_s=10.0))
    rows.append(Row(what="something else", system=OURS, leaves_per_s=10.0))

    assert [check["met"] for check in rate_checks(rows)] == [True, False]


@pytest.mark.parametrize(
    ("mib", "speed", "met"), [(1024, 90.0, True), (1024, 89.9, False), (256, 1.0, None)]
)
def test_a_share_of_a_stream_is_promised_of_the_long_transfer(mib, speed, met):
    what = f"transfer of {mib} MiB over 100 ms and 1 Gb/s, one node, up"
    rows = [
        Row(what=what, system=OURS, mb_per_s=Spread.of([speed])),
        Row(what=what, system=RAW_TLS, mb_per_s=Spread.of([100.0])),
        Row(what=what, system=NEW_TLS, mb_per_s=Spread.of([50.0])),
    ]
    warm, new = ratios(rows)
    assert (warm.met, warm.limit) == (met, "" if met is None else "at least 0.9")
    assert (new.met, new.limit) == (None, "")
