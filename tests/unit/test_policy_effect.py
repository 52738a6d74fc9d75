"""A new policy waits; what it waits for is never its own number."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from policies.effect import beginning, read_times, takes_effect, times_to_text
from tests.support.policies import example, policy

DAY = datetime(2026, 12, 5, 9, 0, tzinfo=UTC)
HOURS = timedelta(hours=1)
FIRST = example()  # delay 72 h, notice of amendments 14 d


def changed(version: int, **changes):
    return policy({"policy_version": version, **changes})


STRICTER = changed(8, **{"rounds.max_steps_local": 400})
SHORTER = changed(8, **{"governance.policy_delay_hours": 0})


def test_the_first_counts_at_once_and_a_change_after_its_delay():
    history = beginning(1, FIRST, DAY).followed_by(2, STRICTER, DAY)

    assert beginning(1, FIRST, DAY).in_force(DAY) == FIRST
    assert history.in_force(DAY + 72 * HOURS - timedelta(seconds=1)) == FIRST
    assert history.in_force(DAY + 72 * HOURS) == STRICTER
    assert history.waiting(DAY) == ((STRICTER, DAY + 72 * HOURS),)
    assert history.waiting(DAY + 72 * HOURS) == ()


def test_an_amendment_waits_for_its_notice():
    assert takes_effect(FIRST, SHORTER, DAY) == DAY + timedelta(days=14)


def test_the_day_a_policy_names_may_be_later_and_never_earlier():
    late = changed(8, valid_from="2027-01-01T00:00:00Z")
    assert takes_effect(FIRST, late, DAY) == datetime(2027, 1, 1, tzinfo=UTC)
    early = changed(8, valid_from="2026-11-01T00:00:00Z")
    assert takes_effect(FIRST, early, DAY) == DAY + 72 * HOURS


def test_no_policy_shortens_its_own_delay_nor_that_of_the_next():
    """A first change takes the delay away, a second one would use that at once."""
    third = changed(9, **{"governance.policy_delay_hours": 0, "rounds.max_steps_local": 1000})
    history = beginning(1, FIRST, DAY).followed_by(2, SHORTER, DAY)
    history = history.followed_by(3, third, DAY + HOURS)

    assert history.effects[1:] == (DAY + timedelta(days=14), DAY + timedelta(days=14))
    assert history.in_force(DAY + 2 * HOURS) == FIRST
    assert history.in_force(DAY + timedelta(days=14)) == third


def test_no_policy_overtakes_another():
    quick = policy(
        {"governance.policy_delay_hours": 1, "governance.decisions.amendment_notice_days": 0}
    )
    slow = policy(
        {"policy_version": 8, "valid_from": "2027-01-01T00:00:00Z"},
    )
    after = policy(
        {"policy_version": 9, "valid_from": "2027-01-01T00:00:00Z", "rounds.concurrent_max": 1}
    )
    history = beginning(1, quick, DAY).followed_by(2, slow, DAY).followed_by(3, after, DAY)

    assert history.effects[2] >= history.effects[1] == datetime(2027, 1, 1, tzinfo=UTC)


def test_the_same_policy_signed_again_changes_nothing():
    history = beginning(1, FIRST, DAY).followed_by(2, FIRST, DAY + HOURS)

    assert len(history.steps) == 1
    assert history.read_until == 2


def test_before_a_version_the_earlier_ones_count():
    history = beginning(1, FIRST, DAY).followed_by(4, STRICTER, DAY)

    assert history.before(4).in_force(DAY + 100 * HOURS) == FIRST
    assert history.before(5).in_force(DAY + 100 * HOURS) == STRICTER


@pytest.mark.parametrize("text", [b"", b"x y\n", b"1 yesterday\n", b"\xff\n1"])
def test_times_that_cannot_be_read_are_found_again(text):
    assert read_times(text) == {}


def test_times_are_kept_by_the_second():
    times = {1: DAY, 12: DAY + HOURS}
    assert read_times(times_to_text(times)) == times
