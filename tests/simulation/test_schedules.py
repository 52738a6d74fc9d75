"""Whole federations under schedules of faults: what is promised holds after every step.

A few schedules of each setting run here; ``make soak`` plays thousands. What a failure prints is a
schedule that can be kept in ``test_found.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulation.schedules import Schedule, play, schedule, step_of
from tests.simulation.world import MASKED, OPEN, SETTINGS, Setting

MANY = 40


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


def test_schedules(tmp_path):
    """A short soak with seeds that are always the same, as `make soak` plays thousands.

    In a process of its own, because the order of sets must not depend on chance.
    """
    results = tmp_path / "soak.jsonl"
    asked = ["--schedules", str(MANY), "--jobs", "1", "--results", str(results)]
    soak = subprocess.run(
        [sys.executable, "-m", "tests.simulation.soak", *asked],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )

    assert soak.returncode == 0, f"{soak.stdout}\n{soak.stderr}"
    played = [json.loads(line) for line in Path(f"{results}.0").read_text().splitlines()]
    assert len(played) == MANY
    # Else little was tested.
    assert sum(one["deaths"] for one in played) >= MANY
    assert sum(sum(one["fired"].values()) for one in played) >= MANY // 2
    assert sum(one["refused"] for one in played) >= 1
    assert sum(one["ends"].get("Released", 0) for one in played) >= MANY // 2
    assert {one["status"] for one in played} >= {"done"}


@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**32), max_size=5), st.integers(0, 1500))
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_hypothesis_shrinks_schedules(seed: int, drawn: list[int], wait: int):
    """The same operations as a strategy: a failure here comes out shrunk."""
    steps = tuple((wait, *step_of(Random(each), OPEN)) for each in drawn)

    play(Schedule(OPEN, seed, (*steps, (0, "pass", 1500))))
