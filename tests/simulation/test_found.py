"""What the simulation found in Minga, shrunk; each failed before it was mended."""

from __future__ import annotations

import pytest

from tests.simulation.schedules import Schedule, play
from tests.simulation.world import OPEN

FOUND = {
    # A full disk while the job is handed to the worker was taken for a bug of Minga: a traceback,
    # and half a minute until it was tried again.
    "a full disk at a node is waited for": Schedule(
        OPEN, 10, ((28, "full", "c", 6000), (0, "pass", 900))
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str):
    play(FOUND[name])
