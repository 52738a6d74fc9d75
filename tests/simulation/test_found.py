"""What the simulation found in Minga, shrunk; each failed before it was mended."""

from __future__ import annotations

import pytest

from tests.simulation.schedules import Schedule, play
from tests.simulation.world import MASKED, OPEN

FOUND = {
    # A full disk while the job is handed to the worker was taken for a bug of Minga: a traceback,
    # and half a minute until it was tried again.
    "a full disk at a node is waited for": Schedule(
        OPEN, 10, ((28, "full", "c", 6000), (0, "pass", 900))
    ),
    # A node whose disk was put back to a time before its vector objects to the transcript that
    # names it, as it must; that it had confirmed it before was called saying two things.
    "a node that has forgotten its vector objects": Schedule(
        MASKED, 6561, ((828, "backup", "b"), (725, "restore", "b", "all", 50)), jitter=0.1
    ),
    "a disk is copied a third time": Schedule(
        OPEN, 3, ((0, "backup", "a"), (0, "backup", "b"), (9, "backup", "b"), (9, "backup", "b"))
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str):
    play(FOUND[name])
