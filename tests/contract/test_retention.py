"""Uploads go when their retention has ended, and not a moment before."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from coordinator.drivers.retention import RetentionDriver
from tests.support.door import served
from tests.support.policies import policy
from tests.support.secure_nodes import STEPS, SecureRound


class Later:
    """A clock that is ahead."""

    def __init__(self, by: timedelta) -> None:
        self.by = by

    def now(self) -> datetime:
        return datetime.now(UTC) + self.by


@pytest.fixture
def play(tmp_path):
    with served(tmp_path) as door:
        yield SecureRound(door, n=3)


def removed(play: SecureRound, after: timedelta) -> int:
    door = play.door
    driver = RetentionDriver(
        ledger=door.parts.ledger, clock=Later(after), spool=door.config.spool, days=30
    )
    return door.call(driver.pass_once())


def test_uploads_outlive_their_round_by_their_retention(play):
    play.all(*STEPS)
    play.until_open()
    files = sorted((play.door.config.spool / "s1").glob("*.vector"))
    assert len(files) == 3
    assert removed(play, timedelta(days=29, hours=23)) == 0
    assert removed(play, timedelta(days=30)) == 3
    assert not any(file.exists() for file in files)
    assert removed(play, timedelta(days=31)) == 0
    assert play.door.parts.blobs.has(play.phase.opened.sum)


def test_uploads_of_a_round_that_is_not_over_stay(play):
    play.all(*STEPS[: STEPS.index("commit")])
    assert removed(play, timedelta(days=365)) == 0


def test_the_signed_policy_says_how_long_not_the_operators_file(play):
    """Thirty days in config.toml; the admins signed for 365."""
    play.all(*STEPS)
    play.until_open()
    door, signed = play.door, policy(**{"retention.round_artifacts_days": 365})

    def left(days: int) -> int:
        driver = RetentionDriver(
            ledger=door.parts.ledger,
            clock=Later(timedelta(days=days)),
            spool=door.config.spool,
            days=30,
            policy=lambda: signed,
        )
        return door.call(driver.pass_once())

    assert left(364) == 0
    assert left(365) == 3
