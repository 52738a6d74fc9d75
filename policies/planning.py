"""What a plan would come to, before anybody computes. Pure.

    sizes     bytes and seconds of a round's traffic, per node
    noise     in each coordinate of the next model, and against what the sites can say together
    sites     epsilon of each institution at the end, and who would refuse, by which rule

Who would refuse is said from what the planner is given: membership and the federation's own
budgets. A site's own budget and rules are known at the site alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from policies.privacy.budget import Allowance, Spend, SpendStatus, afford_allowance
from policies.privacy.claim import Claim
from policies.privacy.sensitivity import Unit
from policies.privacy.terms import NoiseTerms, noise_terms
from protocols.errors import PlanRefusedError
from protocols.identifiers import NodeId
from protocols.plan import Plan
from protocols.round_vector import round_ring
from protocols.tensors.layout import VectorLayout

LINKS: Final[Mapping[str, int]] = {"100 Mb/s": 10**8, "1 Gb/s": 10**9}  # bits a second
_FLOAT32: Final = 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What moves in one training round, per node."""

    up: int  # bytes: the packed vector
    down: int  # bytes: the packed sum
    first: int  # bytes: the model that a node without one fetches, once

    def seconds(self, bits_per_second: int) -> float:
        """To send and receive a round's vectors over a link of that speed, one after the other."""
        return 8 * (self.up + self.down) / bits_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseOutlook:
    """Noise of a training round with every site in the sum; of the mean update."""

    per_coordinate: float  # standard deviation in parameter units; of one step in record-local
    per_signal: float  # L2 of the noise over L2 of the most that all sites can say together
    grid: int  # exponent: the noise is whole numbers times 2**-grid
    shares: int  # honest shares that every opened sum holds


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOutlook:
    """One institution."""

    node: NodeId
    before: str  # epsilon, decimal, rounded up; empty: not private, or cannot be added up
    after: str  # at the end of the run
    delta: str
    budget: str  # epsilon that the federation allows; empty: no cap is known here
    rounds: int  # of the plan's training rounds that fit
    rule: str = ""  # of a refusal; empty: none is foreseen
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteBefore:
    """What is known of an institution before the run."""

    node: NodeId
    active: bool = True
    spends: tuple[Spend, ...] = ()  # of the plan's data set, over all runs
    cap: Allowance | None = None


def traffic_of(plan: Plan, layout: VectorLayout, *, buffers: int) -> Traffic:
    """Bytes of a training round.

    Args:
        plan: of the run.
        layout: of a training round.
        buffers: arrays of the outer optimizer beside the model.
    """
    packed = layout.packed_size(round_ring(plan))
    model = _FLOAT32 * layout.model_coordinates * (1 + buffers)
    return Traffic(up=packed, down=packed, first=model)


def noise_of(plan: Plan, terms: NoiseTerms) -> NoiseOutlook:
    """Noise per coordinate of the mean, with all sites in the sum."""
    n = len(plan.roster)
    each = terms.share_sigma / math.sqrt(n)
    if plan.privacy is not None and plan.mode == "record-local":
        each /= plan.privacy.expected_batch or 1.0
    return NoiseOutlook(
        per_coordinate=each,
        per_signal=terms.noise_per_signal,
        grid=terms.exponent,
        shares=terms.shares,
    )


def noise_outlook(plan: Plan, coordinates: int) -> NoiseOutlook | None:
    """The same from a plan; None: no noise is added.

    Raises:
        PlanRefusedError: the plan's terms cannot be kept, or drown what they are made for.
    """
    return None if plan.privacy is None else noise_of(plan, noise_terms(plan, coordinates))


def site_outlook(
    plan: Plan, claim: Claim | None, sites: Iterable[SiteBefore], *, now: datetime
) -> tuple[SiteOutlook, ...]:
    """Each institution at the end of the run.

    Args:
        plan: of the run.
        claim: of a training round; None: the plan is not private.
        sites: in any order.
        now: UTC.
    """
    return tuple(_site(plan, claim, site, now) for site in sorted(sites, key=lambda s: s.node))


def _site(plan: Plan, claim: Claim | None, site: SiteBefore, now: datetime) -> SiteOutlook:
    if not site.active:
        return SiteOutlook(
            node=site.node,
            before="",
            after="",
            delta="",
            budget="",
            rounds=0,
            rule="plan.roster",
            why="it is not an active member of this federation",
        )
    if claim is None:
        return SiteOutlook(
            node=site.node, before="", after="", delta="", budget="", rounds=plan.rounds
        )
    ledger = site.cap or Allowance(
        dataset=claim.dataset, unit=Unit(claim.unit), epsilon=1.0, delta=float(claim.delta)
    )
    charge = claim.charge()
    whole = Spend(
        key="the plan",
        charge=charge.times(plan.rounds),
        status=SpendStatus.RESERVED,
        reserved_at=now,
    )
    rule, why, rounds = "", "", plan.rounds
    try:
        before = ledger.spent(site.spends).printed()
        after = ledger.spent((*site.spends, whole)).printed()
        if site.cap is not None:
            answer = afford_allowance(site.cap, site.spends, charge, now=now, rounds=plan.rounds)
            rounds = answer.rounds_left
            if not answer.yes:
                rule, why = answer.rule, answer.why
            elif rounds < plan.rounds:
                rule = "privacy.budget"
                why = f"its budget ends after {rounds} of {plan.rounds} training rounds"
    except PlanRefusedError as error:
        before, after, rounds, rule, why = "", "", 0, error.rule, str(error)
    return SiteOutlook(
        node=site.node,
        before=before,
        after=after,
        delta=f"{ledger.delta:g}",
        budget=f"{site.cap.epsilon:g}" if site.cap else "",
        rounds=rounds,
        rule=rule,
        why=why,
    )
