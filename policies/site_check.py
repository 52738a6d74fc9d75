"""A plan against one site's own policy. It only ever adds reasons to say no.

site.hours site.mode site.base site.code site.with
site.gpu site.gpu_day site.energy site.energy_day site.bandwidth site.epsilon
site.datasets   no collection is declared, or text would be used that no declaration covers

What the site writes in ``policy.cedar`` comes on top, under ids of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from policies.consortium import ConsortiumPolicy
from policies.decision import Decision, Why, from_whys, refused
from policies.plan_terms import Facts
from policies.site import SitePolicy, check_hours, narrow
from protocols.plan import Plan
from protocols.plan_terms import Limits

_MICRO: Final = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteState:
    """What was found at the site."""

    local: datetime  # in the site's time zone
    paths: tuple[str, ...]  # of the text that the worker would read
    joined_today: tuple[Limits, ...] = ()  # of the rounds joined in the last 24 hours


def check_site_policy(
    plan: Plan, site: SitePolicy, policy: ConsortiumPolicy, facts: Facts, state: SiteState
) -> Decision:
    """Whether the site itself wants to take part; every rule that says no is named."""
    if plan.terms is None:
        return refused("terms.missing", "the plan says nothing that a site's policy could judge")
    return from_whys(_whys(plan, site, policy, facts, state))


def _whys(
    plan: Plan, site: SitePolicy, policy: ConsortiumPolicy, facts: Facts, state: SiteState
) -> Iterator[Why]:
    terms, deny = plan.terms, site.deny
    assert terms is not None  # noqa: S101 - looked at by the caller
    yield from check_hours(site, state.local)
    if plan.mode in deny.modes:
        yield Why("site.mode", f"this site does not take part in mode {plan.mode}")
    if terms.base.id in deny.bases:
        yield Why("site.base", f"this site does not train {terms.base.id}")
    if f"sha256:{terms.code.image}" in deny.code:
        yield Why("site.code", f"this site does not run the code {terms.code.image[:12]}…")
    others = sorted(set(deny.institutions) & set(plan.roster))
    if others:
        yield Why("site.with", f"this site does not train with {', '.join(others)}")
    yield from _limits(plan, terms.limits, site, policy, facts, state)
    if plan.local_step.kind == "synthetic":
        return  # reads no data
    if not site.datasets:
        yield Why("site.datasets", "this site declares no collection")
    undeclared = site.undeclared(state.paths)
    if undeclared:
        yield Why("site.datasets", f"no declaration covers {undeclared[0]}")


def _limits(
    plan: Plan,
    said: Limits,
    site: SitePolicy,
    policy: ConsortiumPolicy,
    facts: Facts,
    state: SiteState,
) -> Iterator[Why]:
    limits, all_ = site.limits, policy.resources
    gpu = sum(item.gpu_minutes_node for item in state.joined_today)
    energy = sum(item.energy_wh_node for item in state.joined_today)
    never = 2**62  # the consortium limits rounds, not days
    rows = (
        ("site.gpu", "GPU minutes a round", said.gpu_minutes_node,
         narrow(all_.gpu_minutes_round, limits.gpu_minutes_round)),
        ("site.energy", "Wh a round", said.energy_wh_node,
         narrow(all_.energy_wh_round, limits.energy_wh_round)),
        ("site.bandwidth", "bytes a round", said.bandwidth_bytes_node,
         narrow(all_.bandwidth_bytes_node, limits.bandwidth_bytes_round)),
        ("site.gpu_day", "GPU minutes a day", gpu + said.gpu_minutes_node,
         narrow(never, limits.gpu_minutes_day)),
        ("site.energy_day", "Wh a day", energy + said.energy_wh_node,
         narrow(never, limits.energy_wh_day)),
    )  # fmt: skip
    for rule, unit, asked, allowed in rows:
        if asked > allowed:
            yield Why(rule, f"{asked} {unit} could be used here, this site allows {allowed}")
    allowed = narrow(policy.privacy.eps_round_max_micro, limits.eps_round_max_micro)
    if plan.privacy is None:
        return
    if facts.eps_round_micro is None or facts.eps_round_micro > allowed:
        cost = "unknown" if facts.eps_round_micro is None else f"{facts.eps_round_micro / _MICRO:g}"
        yield Why(
            "site.epsilon",
            f"a round costs epsilon {cost}, this site allows {allowed / _MICRO:g}",
        )
