"""The planner: what a plan comes to, before anybody computes."""

from __future__ import annotations

from datetime import timedelta

import pytest

from policies.planning import (
    LINKS,
    SiteBefore,
    noise_outlook,
    site_outlook,
    traffic_of,
)
from policies.privacy.accounting import account_renyi
from policies.privacy.budget import Allowance, Spend, SpendStatus
from policies.privacy.claim import claim_of
from policies.privacy.sensitivity import Unit
from policies.privacy.terms import noise_terms
from protocols.errors import PlanRefusedError
from protocols.identifiers import NodeId
from protocols.plan import Plan
from protocols.plan_privacy import PRIVATE_MODES, promise
from protocols.round_vector import round_layout
from tests.support.node import NOW
from tests.support.plans import MANIFEST, plan, plan_value
from tests.support.private_plans import SECAGG, private_plan

D = 1000
A, B, C = (NodeId(name) for name in "abc")


def cap(epsilon: float) -> Allowance:
    return Allowance(dataset="default", unit=Unit.DOCUMENT, epsilon=epsilon, delta=1e-5)


def test_traffic_is_that_of_the_packed_vector():
    made = plan(vector={"ring_bits": 20})
    layout = round_layout(made, 0, MANIFEST)
    traffic = traffic_of(made, layout, buffers=1)
    assert traffic.up == traffic.down == -(-layout.coordinates * 5 // 2)
    assert traffic.first == 2 * 4 * D
    assert traffic.seconds(LINKS["100 Mb/s"]) == 10 * traffic.seconds(LINKS["1 Gb/s"])
    assert traffic.seconds(10**8) == pytest.approx(16 * traffic.up / 1e8)


@pytest.mark.parametrize("mode", PRIVATE_MODES)
def test_noise_is_that_of_the_mean_with_everybody_in_it(mode):
    made = private_plan(mode)
    terms, noise = noise_terms(made, D), noise_outlook(made, D)
    divisor = 3**0.5 * (16 if mode == "record-local" else 1)
    assert noise.per_coordinate == pytest.approx(terms.share_sigma / divisor)
    assert noise.shares == terms.shares
    # One record in modes of records weighs C / B, a whole site C.
    least = made.privacy.noise_multiplier * (1 / 16 if mode != "institution" else 1.0)
    assert noise.per_coordinate * 3**0.5 >= 0.99 * least / terms.shares**0.5


def test_a_hopeless_plan_is_refused_unless_it_insists():
    with pytest.raises(PlanRefusedError, match="no model comes of it"):
        noise_outlook(private_plan("institution", {"privacy.insist": False}), 10**4)
    assert noise_outlook(private_plan("institution"), 10**4).per_signal > 10


def test_epsilon_at_the_end_is_what_the_accountant_says():
    made = private_plan("record-local")
    claim = claim_of(made, 0, D)
    (site,) = site_outlook(made, claim, [SiteBefore(node=A)], now=NOW)
    want = account_renyi([claim.charge().times(made.rounds)], delta=0.5e-5)
    assert (site.before, site.after, site.rule) == ("0.000", want.printed(), "")


def test_who_would_refuse_is_said_with_the_rule():
    made = private_plan("record-local")  # two rounds; one costs 2.3, both 2.6
    claim = claim_of(made, 0, D)
    before = Spend(key="older/0", charge=claim.charge(), status=SpendStatus.BURNED, reserved_at=NOW)
    sites = [
        SiteBefore(node=A, cap=cap(8.0), spends=(before,)),
        SiteBefore(node=B, cap=cap(2.5)),
        SiteBefore(node=C, active=False),
        SiteBefore(node=NodeId("d"), cap=cap(1.0)),
    ]
    a, b, c, d = site_outlook(made, claim, sites, now=NOW)
    assert (a.rule, a.rounds, float(a.before) > 2) == ("", 2, True)
    assert (b.rule, b.rounds) == ("privacy.budget", 1)
    assert "after 1 of 2" in b.why
    assert c.rule == "plan.roster"
    assert (d.rule, d.rounds) == ("privacy.budget", 0)


def test_a_budget_of_another_period_refuses():
    claim = claim_of(private_plan("record-local"), 0, D)
    over = Allowance(
        dataset="default",
        unit=Unit.DOCUMENT,
        epsilon=8.0,
        delta=1e-5,
        ends_at=NOW - timedelta(days=1),
    )
    (site,) = site_outlook(
        private_plan("record-local"), claim, [SiteBefore(node=A, cap=over)], now=NOW
    )
    assert site.rule == "privacy.period"


def test_plans_without_privacy_say_so():
    secure = Plan.from_value(plan_value(mode="aggregate-only", min_participants=3, secagg=SECAGG))
    for made in (plan(), secure):
        assert "not differentially private" in promise(made)
        assert noise_outlook(made, D) is None
        (site,) = site_outlook(made, None, [SiteBefore(node=A)], now=NOW)
        assert (site.after, site.rule) == ("", "")
    assert "not differentially private" not in promise(private_plan("record-local"))
