"""Whatever the ledger: spending never goes beyond the cap, and never gives privacy back."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.privacy.accounting import account_renyi
from policies.privacy.budget import Budget, Spend, SpendStatus, afford
from policies.privacy.events import Charge, DistributedDiscreteGaussian
from policies.privacy.sensitivity import Relation, Unit, institution_update
from protocols.noise.noise_table import NoiseTable

NOW = datetime(2026, 5, 4, tzinfo=UTC)
ROUND = Charge(
    event=DistributedDiscreteGaussian(
        l2_squared=320, l1=320, coordinates=1000, share_variance=Fraction(1600), shares=20
    ),
    relation=Relation.REPLACE_SPECIAL,
    unit=Unit.INSTITUTION,
)
BUDGET = Budget(
    epsilon=2.0, delta=1e-5, unit=Unit.INSTITUTION, relation=Relation.REPLACE_SPECIAL
)  # fmt: skip


def play(fates, decide=afford) -> tuple[float, int]:
    """Ask before every round; reserve on yes, then meet a fate. What was really spent, and how
    often the answer was no."""
    ledger: list[Spend] = []
    refused = 0
    for number, fate in enumerate(fates):
        if decide(BUDGET, ledger, ROUND, now=NOW).yes:
            ledger.append(Spend(key=str(number), charge=ROUND, status=fate, reserved_at=NOW))
        else:
            refused += 1
    real = [s.charge for s in ledger if s.status.name not in {"ABORTED", "VOID"}]
    return account_renyi(real, delta=BUDGET.delta, orders=BUDGET.orders).epsilon, refused


fates = st.lists(st.sampled_from(SpendStatus), min_size=5, max_size=25)


@settings(max_examples=25, deadline=None)
@given(fates)
def test_the_cap_holds(schedule):
    assert play(schedule)[0] <= BUDGET.epsilon


def test_the_cap_is_reached():
    """A property over schedules means little if none is ever refused."""
    spent, refused = play([SpendStatus.RELEASED] * 30)

    assert refused > 0
    assert spent > 0.9 * BUDGET.epsilon


def test_a_budget_that_forgets_burned_rounds_is_convicted():
    def forgetful(budget, ledger, wanted, *, now):
        kept = [s for s in ledger if s.status is not SpendStatus.BURNED]
        return afford(budget, kept, wanted, now=now)

    assert play([SpendStatus.BURNED] * 30, forgetful)[0] > BUDGET.epsilon


@settings(max_examples=30, deadline=None)
@given(
    st.fractions(Fraction(1, 100), 10**5, max_denominator=1000),
    st.integers(1, 10**9),
    st.fractions(Fraction(1, 10), 50, max_denominator=100),
    st.integers(1, 62),
)
def test_the_noise_is_never_below_what_was_promised(scaled, d, z, shares):
    sensitivity = institution_update(scaled + 500, d)
    variance = sensitivity.share_variance(z + 1, shares)

    assert variance * shares >= (z + 1) ** 2 * sensitivity.l2_squared
    assert sensitivity.l1**2 <= d * sensitivity.l2_squared
    assert sensitivity.l2_squared <= longest(scaled + 500, d)


def longest(scaled: Fraction, d: int) -> Fraction:
    """(sC + sqrt d)^2 and a little: no rounding can be longer."""
    return (scaled + Fraction(int(d**0.5) + 1)) ** 2


@settings(max_examples=25, deadline=None)
@given(st.fractions(Fraction(1, 16), 400, max_denominator=64))
def test_every_table_is_whole_and_symmetric(variance):
    table = NoiseTable.build(variance)
    weights = table.weights()

    assert sum(weights) == 1 << 192
    assert weights == weights[::-1]
    assert all(a < b for a, b in itertools.pairwise(weights[: table.bound + 1]))
