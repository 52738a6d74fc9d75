"""What counts as spent, what fits, and every no."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest

from policies.privacy.accounting import account_renyi
from policies.privacy.budget import (
    Affordable,
    Allowance,
    Budget,
    Spend,
    SpendStatus,
    afford,
    afford_allowance,
    counted,
    filter_order,
)
from policies.privacy.events import Charge, DistributedDiscreteGaussian, SampledGaussian
from policies.privacy.sensitivity import Relation, Unit
from protocols.errors import CorruptStateError

NOW = datetime(2026, 5, 4, tzinfo=UTC)
DAY = timedelta(days=1)
ROUND = Charge(
    event=DistributedDiscreteGaussian(
        l2_squared=320, l1=320, coordinates=1000, share_variance=Fraction(1600), shares=20
    ),
    relation=Relation.REPLACE_SPECIAL,
    unit=Unit.INSTITUTION,
)
OTHER = replace(ROUND, event=replace(ROUND.event, shares=19))
STEPS = Charge(
    event=SampledGaussian(sampling_rate=0.01, noise_multiplier=1.0, discrete=True),
    relation=Relation.ADD_OR_REMOVE_ONE,
    unit=Unit.DOCUMENT,
)


def cost(n: int, orders=Budget.__dataclass_fields__["orders"].default) -> float:
    return account_renyi([ROUND.times(n)], delta=1e-5, orders=orders).epsilon


FIVE = Budget(  # holds five rounds and not six
    epsilon=(cost(5) + cost(6)) / 2, delta=1e-5, unit=Unit.INSTITUTION,
    relation=Relation.REPLACE_SPECIAL,
)  # fmt: skip


def spend(key, status=SpendStatus.RELEASED, at=NOW, charge=ROUND) -> Spend:
    return Spend(key=str(key), charge=charge, status=status, reserved_at=at)


def test_five_rounds_fit_and_the_sixth_does_not():
    answers = [afford(FIVE, [spend(i) for i in range(n)], ROUND, now=NOW) for n in range(7)]

    assert [answer.yes for answer in answers] == [True] * 5 + [False] * 2
    assert {answer.rule for answer in answers[:5]} == {"privacy.affordable"}
    assert {answer.rule for answer in answers[5:]} == {"privacy.budget"}
    assert answers[4].after.epsilon == pytest.approx(cost(5), rel=1e-9)
    assert answers[5].spent.epsilon <= FIVE.epsilon < answers[5].after.epsilon
    assert "would be" in answers[5].why


@pytest.mark.parametrize("status", SpendStatus)
def test_what_is_not_surely_unspent_is_charged(status):
    ledger = [spend(i) for i in range(4)] + [spend("last", status)]
    charged = status not in {SpendStatus.ABORTED, SpendStatus.VOID}

    assert afford(FIVE, ledger, ROUND, now=NOW).yes is not charged
    assert len(counted(FIVE, ledger)) == 4 + charged


def test_rounds_left_is_what_fits():
    for spent in range(5):
        ledger = [spend(i) for i in range(spent)]
        assert afford(FIVE, ledger, ROUND, now=NOW, rounds=1000).rounds_left == 5 - spent
        assert afford(FIVE, ledger, ROUND, now=NOW, rounds=1).rounds_left == 1
    assert afford(FIVE, [spend(i) for i in range(5)], ROUND, now=NOW, rounds=9).rounds_left == 0


def test_exactly_the_cap_is_affordable():
    exact = afford(FIVE, [], ROUND, now=NOW).after.epsilon

    assert afford(replace(FIVE, epsilon=exact), [], ROUND, now=NOW).yes
    assert not afford(replace(FIVE, epsilon=math.nextafter(exact, 0)), [], ROUND, now=NOW).yes


def test_a_period_counts_what_was_spent_in_it():
    year = replace(FIVE, starts_at=NOW, ends_at=NOW + 365 * DAY)
    before = [spend(("old", i), at=NOW - DAY) for i in range(9)]
    at_start = [spend(("new", i), at=NOW) for i in range(4)]
    later = [spend("from a wrong clock", at=NOW + 999 * DAY)]

    assert afford(year, before, ROUND, now=NOW).yes
    assert afford(year, before + at_start, ROUND, now=NOW).yes
    assert not afford(year, before + at_start + later, ROUND, now=NOW).yes
    assert not afford(FIVE, before, ROUND, now=NOW).yes


def test_an_adaptive_budget_takes_other_terms_at_its_one_order():
    order = (8.0,)
    one = replace(FIVE, adaptive=True, orders=order, epsilon=cost(9, order))
    ledger = [spend(1), spend(2, charge=OTHER)]

    assert afford(one, ledger, ROUND, now=NOW).yes
    assert afford(one, ledger, ROUND, now=NOW).after.order == 8.0
    assert afford(FIVE, ledger, ROUND, now=NOW).rule == "privacy.adaptive"


@pytest.mark.parametrize(
    ("rule", "budget", "ledger", "wanted", "now"),
    [
        ("privacy.budget", FIVE, [], ROUND.times(6), NOW),
        ("privacy.budget", FIVE, [], replace(ROUND, failure=Fraction(1, 10**4)), NOW),
        ("privacy.period", replace(FIVE, starts_at=NOW), [], ROUND, NOW - DAY),
        ("privacy.period", replace(FIVE, ends_at=NOW), [], ROUND, NOW),
        ("privacy.mixed_units", FIVE, [], STEPS, NOW),
        ("privacy.mixed_units", FIVE, [spend(1, charge=STEPS)], ROUND, NOW),
        (
            "privacy.mixed_units",
            FIVE,
            [],
            replace(ROUND, relation=Relation.ADD_OR_REMOVE_ONE),
            NOW,
        ),
        ("privacy.adaptive", FIVE, [spend(1, charge=OTHER)], ROUND, NOW),
    ],
)
def test_no(rule, budget, ledger, wanted, now):
    answer = afford(budget, ledger, wanted, now=now)

    assert isinstance(answer, Affordable)
    assert (answer.yes, answer.rule, answer.rounds_left) == (False, rule, 0)
    assert answer.why


def test_an_aborted_spend_of_other_terms_does_not_stand_in_the_way():
    assert afford(FIVE, [spend(1, SpendStatus.VOID, charge=OTHER)], ROUND, now=NOW).yes


def test_two_spends_of_one_attempt_are_a_contradiction():
    """Even where one says that nothing was spent."""
    with pytest.raises(CorruptStateError, match="two spends of a"):
        afford(FIVE, [spend("a"), spend("a", SpendStatus.VOID)], ROUND, now=NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"epsilon": 0.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"orders": ()},
        {"orders": (1.0,)},
        {"adaptive": True},
        {"starts_at": NOW, "ends_at": NOW},
    ],
)
def test_no_budget_without_meaning(change):
    with pytest.raises(ValueError):
        replace(FIVE, **change)


# -- what a site writes down -------------------------------------------------------------------

STEP_3 = replace(STEPS, event=replace(STEPS.event, noise_multiplier=3.0))


def allowance(epsilon: float, **changes) -> Allowance:
    values = {"dataset": "d", "unit": Unit.DOCUMENT, "epsilon": epsilon, "delta": 1e-5}
    return Allowance(**values | changes)


def accepted(budget: Allowance, wanted: list[Charge]) -> list[Spend]:
    """Ask for each in turn; what was allowed."""
    history: list[Spend] = []
    for number, charge in enumerate(wanted):
        if afford_allowance(budget, history, charge, now=NOW).yes:
            history.append(spend(number, charge=charge))
    return history


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0, 50.0])
def test_the_filters_order_follows_from_the_budget_and_wastes_little(epsilon):
    order = filter_order(epsilon, 1e-5)
    assert order == filter_order(epsilon, 1e-5) == int(order)
    assert 2 <= order <= 1024
    log = math.log(1e5)
    rho = (math.sqrt(log + epsilon) - math.sqrt(log)) ** 2  # what the budget is worth
    at_order = rho * order + log / (order - 1)
    assert epsilon <= at_order + 1e-9 < epsilon * 1.05 + 0.01


def test_rounds_of_one_plan_are_composed_at_the_best_order_of_half_of_delta():
    budget = allowance(2.0)
    history = accepted(budget, [STEPS.times(100)] * 60)
    charges = [s.charge for s in history]
    assert 0 < len(history) < 60
    assert account_renyi(charges, delta=0.5e-5).epsilon <= 2.0
    assert account_renyi([*charges, STEPS.times(100)], delta=0.5e-5).epsilon > 2.0


@pytest.mark.parametrize("first", [0, 1])
def test_plans_of_other_terms_are_held_to_the_filter(first):
    """What was allowed stays within the budget by the one order that was fixed beforehand."""
    budget = allowance(4.0)
    mixed = [(STEPS, STEP_3)[(i + first) % 2].times(100) for i in range(120)]
    history = accepted(budget, mixed)
    charges = [s.charge for s in history]
    assert len({c.event for c in charges}) == 2
    orders = budget.adaptive.orders
    assert len(orders) == 1
    assert account_renyi(charges, delta=0.5e-5, orders=orders).epsilon <= 4.0
    assert budget.spent(history).order == orders[0]
    # The oracle can convict: all that was asked for is too much at any order.
    assert account_renyi(mixed, delta=0.5e-5, orders=orders).epsilon > 4.0


def test_many_equal_charges_cost_what_one_large_one_does():
    one = account_renyi([STEPS.times(5000)], delta=1e-5).epsilon
    many = account_renyi([STEPS] * 5000, delta=1e-5).epsilon
    assert many == pytest.approx(one, rel=1e-12)
