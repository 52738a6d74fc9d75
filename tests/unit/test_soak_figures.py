"""What a soak of schedules says of itself: counted, and never better than it was."""

from __future__ import annotations

from tests.simulation.soak import Reached, figures_of

PLAYED = {
    0: {"seed": 0, "setting": "a", "status": "done", "ends": {"Released": 2, "Aborted": 1},
        "deaths": 3, "fired": {"cut": 2}, "refused": 1, "cpu_s": 1.0},
    1: {"seed": 1, "setting": "b", "status": "failed", "ends": {"Released": 1},
        "deaths": 1, "fired": {"cut": 1, "late": 4}, "refused": 0, "cpu_s": 0.5},
}  # fmt: skip
BROKEN = {2: {"seed": 2, "setting": "b", "violation": "twice", "cpu_s": 0.5}}


def test_it_counts_what_was_played():
    reached = Reached.of(PLAYED | BROKEN)
    assert reached.runs == {"done": 1, "failed": 1, "violation": 1}
    assert reached.rounds == {"Released": 3, "Aborted": 1}
    assert reached.disturbed == {"cut": 3, "late": 4}
    assert (reached.killed, reached.refused, reached.cpu_s) == (4, 1, 2.0)


def test_a_broken_promise_and_too_few_schedules_are_misses():
    many = {seed: PLAYED[0] | {"seed": seed} for seed in range(10_000)}
    assert figures_of(many, {})["rows"][0]["met"] is True
    assert figures_of(PLAYED, {})["rows"][0]["met"] is False
    (broken, *_) = figures_of(many | BROKEN, {})["rows"]
    assert broken["met"] is False
    assert broken["ours"] == "1 of 10,000"
    assert "broken: [2]" in broken["note"]
