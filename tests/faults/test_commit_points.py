"""The coordinator is killed right before and after the transactions that make a round, in one run.

A short part of `make faults` (docs/faults.md), which visits every commit point of the source, on
both databases, for coordinator and node.
"""

from __future__ import annotations

import pytest

from tests.matrix.cases import bench
from tests.matrix.kills import Storm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# One node's word is enough to come to each of these; every one is in each masked round.
MADE_OF = ("join", "secure_deal", "accept_upload", "secure_commit", "secure_reveal")
ALWAYS = ("next_round", "record_release", *MADE_OF)
INSTANTS = frozenset(f"tx:{name}@{when}" for name in ALWAYS for when in ("before", "after"))


def test_the_coordinator_dies_at_every_step_of_a_round(tmp_path):
    with bench(
        tmp_path / "federation", mode="aggregate-only", database="sqlite", server=None, rounds=1
    ) as made:
        rows, missed = Storm(made, "coordinator").play(INSTANTS)

    assert missed == frozenset()
    assert len(rows) == len(INSTANTS)
    assert {row.outcome for row in rows} == {"same"}
