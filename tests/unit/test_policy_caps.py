"""What the signed policy lets an institution spend, at the coordinator."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from policies.document import period_days
from policies.privacy.caps import consortium_cap
from policies.privacy.claim import claim_of
from tests.support.policies import example, policy
from tests.support.private_plans import private_plan

NOW = datetime(2026, 12, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "least"), [("P1Y", 366), ("P3M", 92), ("P90D", 90), ("P1M", 31), ("P2Y", 731)]
)
def test_a_period_in_days_is_never_shorter_than_it_says(text, least):
    assert period_days(text) >= least


def claim():
    found = claim_of(private_plan("record-local"), 0, 1000)
    assert found is not None
    return found


def test_the_signed_budget_counts_over_a_window_that_ends_now():
    cap = consortium_cap(example(), "cl-univ-1", claim(), ("public",), NOW)
    assert cap is not None
    assert (cap.epsilon, cap.starts_at) == (8.0, NOW - timedelta(days=366))
    assert (cap.dataset, cap.delta) == (claim().dataset, float(claim().delta))


def test_the_most_specific_entry_counts_and_the_largest_of_the_classes():
    assert consortium_cap(example(), "x", claim(), ("sensitive",), NOW).epsilon == 2.0
    assert consortium_cap(example(), "x", claim(), ("public", "sensitive"), NOW).epsilon == 8.0
    mine = {"institution": "x", "dataset_class": "sensitive", "eps_total_micro": 0, "period": "P1Y"}
    none = policy({"privacy.budgets.overrides": [mine]})
    assert consortium_cap(none, "x", claim(), ("sensitive",), NOW) is None
    assert consortium_cap(none, "y", claim(), ("sensitive",), NOW).epsilon == 8.0
