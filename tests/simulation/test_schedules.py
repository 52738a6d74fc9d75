"""Whole federations under schedules of faults: what is promised holds after every step.

A few schedules of each setting run here; ``make soak`` plays thousands. What a failure prints is a
schedule that can be kept in ``test_found.py``.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulation.schedules import Outcome, Schedule, play, schedule, step_of
from tests.simulation.world import LOGGED, MASKED, OPEN, OPEN_TWICE, PRIVATE, SETTINGS, Setting

SHARES = ((OPEN, 24), (OPEN_TWICE, 6), (MASKED, 10), (PRIVATE, 6), (LOGGED, 4))


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_undisturbed_everybody_is_in_every_sum(setting: Setting):
    outcome = play(Schedule(setting, 1, ()))

    assert outcome.status == "done"
    assert outcome.ends == {"Released": setting.rounds}
    assert not outcome.fired
    assert not outcome.deaths


def test_a_schedule_plays_the_same_twice():
    """Else what it finds could not be kept."""
    made = schedule(3, MASKED)

    assert play(made) == play(made)


@pytest.mark.parametrize(("setting", "many"), SHARES, ids=repr)
def test_schedules(setting: Setting, many: int):
    """Seeds that are always the same; the soak draws others."""
    seen: list[Outcome] = [play(schedule(seed, setting)) for seed in range(many)]

    # Else little was tested.
    assert sum(outcome.deaths for outcome in seen) >= many // 2
    assert sum((outcome.fired for outcome in seen), Counter()).total() >= many // 2
    assert any(outcome.ends["Released"] for outcome in seen)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**32), max_size=5), st.integers(0, 1500))
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_hypothesis_shrinks_schedules(seed: int, drawn: list[int], wait: int):
    """The same operations as a strategy: a failure here comes out shrunk."""
    steps = tuple((wait, *step_of(Random(each), OPEN)) for each in drawn)

    play(Schedule(OPEN, seed, steps))
