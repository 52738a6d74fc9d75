"""Two coordinators over one PostgreSQL: both serve, one leads; whichever is killed, rounds go on.

The nodes know both addresses. Digests must be those of a run that nobody disturbed. Every phase is
visited by ``make faults``; here the leading process is killed once.
"""

from __future__ import annotations

import pytest

from tests.matrix.cases import bench
from tests.matrix.troubles import leader, suffer, two_coordinators
from tests.support.postgres import postgres

__all__ = ["postgres"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(600)]


def test_the_leading_one_is_killed_and_the_other_goes_on(tmp_path, postgres):
    with (
        bench(
            tmp_path / "federation",
            mode="aggregate-only",
            database="postgresql",
            server=postgres,
            rounds=1,
        ) as made,
        two_coordinators(made) as leading,
    ):
        first = leader(made.url)
        rows = suffer(made, leading, ("Committing",))

        assert [(row.phase, row.outcome) for row in rows] == [("Committing", "same")]
        assert leader(made.url) != first
