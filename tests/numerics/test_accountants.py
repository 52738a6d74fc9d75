"""What claims come to, against the accountants of Google and of Opacus, run side by side.

The figures are those the two libraries printed when the plans were made; where an accountant
takes the same event at the same orders, what anybody recomputes from claims is the same number.
"""

from __future__ import annotations

import math
import warnings

import mpmath
import pytest
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    ZCDpEvent,
)
from dp_accounting.rdp import RdpAccountant

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from opacus.accountants import PRVAccountant, RDPAccountant
    from opacus.accountants.utils import get_noise_multiplier

from policies.privacy.accounting import WHOLE_ORDERS
from policies.privacy.claim import Claim, SampledGaussianClaim, claim_of, spent_by
from policies.privacy.events import DistributedDiscreteGaussian, SampledGaussian
from policies.privacy.sensitivity import Relation
from tests.support.private_plans import private_plan

ROUND = 256 / 60000
# q, z, steps of a round, rounds; Opacus' RDP and PRV at delta 1e-5, and the printed decimals
DPSGD = [
    (ROUND, 1.3, 703, 5, 0.954430, 0.874477, 6),
    (ROUND, 1.1, 7031, 2, 2.596556, 2.391744, 6),
    (ROUND, 0.7, 5273, 2, 6.318101, 5.649767, 6),
    (0.04, 1.5, 250, 9, 7.3291111714, 6.7791320763, 10),
    (0.04, 1.5, 2249, 1, None, 6.777395712, 9),
    (0.01, 4.0, 1000, 10, 1.035490, 0.956936, 6),
]
WHOLE = [int(alpha) for alpha in WHOLE_ORDERS]


def opacus(history, delta: float) -> tuple[float, float]:
    """Epsilon and order at whole orders; history holds noise multiplier, rate and steps."""
    accountant = RDPAccountant()
    accountant.history = list(history)
    return accountant.get_privacy_spent(delta=delta, alphas=WHOLE)


def google(event: DpEvent, count: int, relation: Relation, delta: float) -> tuple[float, float]:
    """The same by dp-accounting."""
    accountant = RdpAccountant(list(WHOLE_ORDERS), NeighboringRelation[relation.name])
    return accountant.compose(event, count).get_epsilon_and_optimal_order(delta)


@pytest.mark.parametrize(("q", "z", "steps", "rounds", "rdp", "prv", "digits"), DPSGD)
def test_opacus_still_prints_what_the_other_tests_compare_with(
    q, z, steps, rounds, rdp, prv, digits
):
    for accountant, printed in ((RDPAccountant(), rdp), (PRVAccountant(), prv)):
        accountant.history = [(z, q, steps * rounds)]
        if printed is not None:
            assert round(float(accountant.get_epsilon(delta=1e-5)), digits) == printed


@pytest.mark.parametrize(
    ("way", "multiplier"), [("rdp", 1.416015625), ("prv", 1.34765625), ("gdp", 1.3232421875)]
)
def test_the_noise_that_opacus_finds_for_epsilon_8(way, multiplier):
    """90 epochs at q = 0.04; test_privacy_accounting holds what ours comes to at these."""
    terms = {"target_epsilon": 8.0, "target_delta": 1e-5, "sample_rate": 0.04, "epochs": 90}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gdp: "underestimates", which is why nobody uses it
        assert get_noise_multiplier(accountant=way, **terms) == multiplier


@pytest.mark.parametrize(("q", "z", "steps", "rounds"), [row[:4] for row in DPSGD])
def test_equal_claims_come_to_what_both_libraries_say(q, z, steps, rounds):
    """Exact noise, the same orders: the same epsilon, from the same order."""
    claim = Claim(
        mode="record-local",
        dataset="default",
        unit="document",
        relation="add_or_remove_one",
        delta="1e-5",
        count=steps,
        failure="0",
        distance="0",
        event=SampledGaussianClaim(sampling_rate=repr(q), noise_multiplier=repr(z), discrete=True),
    )
    (spent,) = spent_by([("a", claim)] * rounds)
    ours = spent.guarantee
    event = PoissonSampledDpEvent(q, GaussianDpEvent(z))
    theirs, order = google(event, steps * rounds, Relation.ADD_OR_REMOVE_ONE, 1e-5)

    assert theirs <= ours.epsilon < theirs * (1 + 1e-11)
    assert ours.order == order
    found, order = opacus([(z, q, steps * rounds)], 1e-5)
    assert ours.epsilon == pytest.approx(found, rel=1e-9)
    assert ours.order == order


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("mode", ["record-local", "record-distributed", "institution"])
def test_claims_of_real_plans_come_to_what_both_libraries_say(mode, count):
    """At the delta that is left once failures and distances are paid for."""
    claim = claim_of(private_plan(mode), 0, 1000)
    (spent,) = spent_by([("a", claim)] * count)
    ours, charge = spent.guarantee, claim.charge()
    each = float(charge.failure) + (1 + math.exp(ours.epsilon)) * float(charge.distance)
    times = claim.count * count
    delta = 1e-5 - times * each
    match charge.event:
        case SampledGaussian(sampling_rate=q, noise_multiplier=z):
            event = PoissonSampledDpEvent(q, GaussianDpEvent(z))
        case DistributedDiscreteGaussian(rho=rho):
            q, z, event = 1.0, 1 / math.sqrt(2 * rho), ZCDpEvent(rho=rho)
    theirs, order = google(event, times, charge.relation, delta)

    assert 0 < delta <= 1e-5
    assert ours.epsilon == pytest.approx(theirs, rel=1e-9)
    assert ours.order == order
    assert ours.epsilon == pytest.approx(opacus([(z, q, times)], delta)[0], rel=1e-9)
    assert ours.epsilon >= opacus([(z, q, times)], 1e-5)[0]  # what is paid for is not forgotten


def test_claims_of_different_plans_are_added_as_both_libraries_add_them():
    claims = [
        claim_of(private_plan("record-local", {"privacy.noise_multiplier": z}), 0, 1000)
        for z in (1.0, 1.5, 1.0, 2.0)
    ]
    (spent,) = spent_by([("a", claim) for claim in claims])
    charges = [claim.charge() for claim in claims]
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = RdpAccountant(list(WHOLE_ORDERS), relation)
    history, delta = [], 1e-5
    for charge in charges:
        q, z = charge.event.sampling_rate, charge.event.noise_multiplier
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(z)), charge.count)
        history.append((z, q, charge.count))
        each = charge.failure + (1 + math.exp(spent.guarantee.epsilon)) * float(charge.distance)
        delta -= charge.count * float(each)

    assert spent.guarantee.epsilon == pytest.approx(accountant.get_epsilon(delta), rel=1e-9)
    assert spent.guarantee.epsilon == pytest.approx(opacus(history, delta)[0], rel=1e-9)


@pytest.mark.parametrize(("variance", "distance"), [(16, 4), (16, 7), (121, 3)])
def test_noise_in_whole_numbers_has_the_moments_that_the_accountants_use(variance, distance):
    """E0[(P1/P0)^k] = exp(k (k - 1) D^2 / (2 v)) for a whole D: why claims may be compared."""
    with mpmath.workprec(300):
        reach = 20 * math.isqrt(variance) + 12 * distance

        def weight(x):
            return mpmath.exp(-mpmath.mpf(x * x) / (2 * variance))

        total = mpmath.fsum(weight(x) for x in range(-reach, reach + 1))
        for k in (2, 3, 8):
            moment = mpmath.fsum(
                weight(x - distance) ** k / weight(x) ** (k - 1) for x in range(-reach, reach + 1)
            )
            gaussian = mpmath.exp(mpmath.mpf(k * (k - 1) * distance**2) / (2 * variance))
            assert abs(moment / total / gaussian - 1) < 1e-25
