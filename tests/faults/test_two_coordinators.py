"""Two coordinators over one PostgreSQL: both serve, one leads; whichever is killed, rounds go on.

The nodes know both addresses. Digests must be those of a run that nobody disturbed. Every phase is
visited by ``make faults``; here the leading process is killed once, and stands still once until the
other leads, so that it wakes up in the middle of what is no longer its to do.
"""

from __future__ import annotations

import pytest

from tests.matrix.cases import bench
from tests.matrix.troubles import (
    leader,
    leader_killed,
    leader_stands_still,
    suffer,
    two_coordinators,
)
from tests.support.postgres import postgres

__all__ = ["postgres"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(600)]


def test_the_leading_one_is_killed_or_stands_still_and_the_other_goes_on(tmp_path, postgres):
    with (
        bench(
            tmp_path / "federation",
            mode="aggregate-only",
            database="postgresql",
            server=postgres,
            rounds=1,
        ) as made,
        two_coordinators(made) as pair,
    ):
        for trouble, phase in ((leader_killed, "Committing"), (leader_stands_still, "Uploading")):
            first = leader(made.url)
            rows = suffer(made, trouble(pair), (phase,))

            assert [(row.phase, row.outcome) for row in rows] == [(phase, "same")]
            assert leader(made.url) != first
