"""What counts now, out of a verified trust repository: policy, members, overrides, emergencies.

    TrustState, the policy in force -> InForce -> does a plan keep to it, as far as documents say?

A node asks more before it joins (its site, its clock, its own ledger): ``node_agent.governed``. The
coordinator asks ``check_signed_terms`` when a run is submitted and before each of its rounds, so
that an operator hears early what every node would answer; nobody has to rely on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from policies.consortium import ConsortiumPolicy
from policies.decision import Decision, Refused, from_whys, refused
from policies.overrides import OVERRIDE_PREFIX, Override, overridden_rules
from policies.plan_terms import Facts, Member, check_terms
from policies.privacy.micro import accountant_version
from protocols.errors import MalformedMessageError
from protocols.governance.documents import Emergency, Members, member_refusal
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import TrustState
from protocols.plan import Plan

# What only a site can say, at the moment at which it joins.
OF_THE_JOIN: Final = frozenset({"rounds.hours", "rounds.concurrent", "rounds.interval"})


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """What the consortium signed."""

    policy: ConsortiumPolicy
    members: Mapping[str, Member]
    overrides: Sequence[tuple[Override, frozenset[str]]] = ()  # with who signed: institutions
    denied_code: frozenset[str] = frozenset()  # by emergencies: hex digests


def in_force_from_state(state: TrustState, policy: ConsortiumPolicy, now: datetime) -> InForce:
    """What a verified trust repository says: its members, overrides and emergencies.

    Args:
        policy: the one that counts now; a newer one may wait in the repository for its delay.
    """
    signers = frozenset(str(who.institution) for who in state.quorums["policy"].signed)
    overrides = [
        (override, signers)
        for path, text in sorted(state.documents.items())
        if path.startswith(OVERRIDE_PREFIX) and (override := _override(text)) is not None
    ]
    return InForce(
        policy=policy,
        members=members_of(state.members, state.emergencies, now),
        overrides=overrides,
        denied_code=frozenset(
            image
            for notice in state.emergencies.values()
            if notice.in_force(now)
            for image in notice.deny.code
        ),
    )


def _override(data: bytes) -> Override | None:
    try:
        return Override.from_bytes(data)
    except MalformedMessageError:
        return None  # what cannot be read allows nothing


def members_of(
    members: Members, emergencies: Mapping[str, Emergency], now: datetime
) -> dict[str, Member]:
    """Country and status of each institution; a member that an emergency denies is not active."""
    found: dict[str, Member] = {}
    for item in members.institutions:
        refused_ = member_refusal(members, emergencies, item.id, now)
        status = item.status if item.status != "active" or refused_ is None else "suspended"
        found[item.id] = Member(country=item.country, status=status)
    return found


def plan_named(plan: Plan, policy: ConsortiumPolicy) -> TrustRefusedError | None:
    """Why a plan is not of the policy that counts now; None: it is, or names none.

    A run that began under an older policy opens no further round: a change is another plan.
    """
    named = plan.terms.policy if plan.terms is not None else None
    if named is None or named.sha256 == policy.digest:
        return None
    return TrustRefusedError(
        f"run {plan.run} was signed under policy {named.version}, in force is"
        f" {policy.policy_version}",
        rule="terms.policy",
    )


def check_signed_terms(
    plan: Plan,
    in_force: InForce,
    *,
    now: datetime,
    eps_round_micro: int | None,
    witness_quorum: int | None,
    auditors: int | None,
) -> Decision:
    """Whether a plan keeps to the policy, as far as it can be told before a site is asked.

    Args:
        eps_round_micro: what its dearest round costs; None: it is not private, or not known.
        witness_quorum: cosignatures that the log demands; None: not known.
        auditors: witnesses beside the members that it demands.
    """
    policy = in_force.policy
    facts = Facts(
        now=now,
        members=in_force.members,
        eps_round_micro=eps_round_micro,
        witness_quorum=witness_quorum,
        auditors=auditors,
        accountant=accountant_version(),
        overridden=overridden_rules(in_force.overrides, policy, plan=plan.digest, now=now),
    )
    decision = check_terms(plan, policy, facts)
    if plan.terms is not None and plan.terms.code.image in in_force.denied_code:
        return refused("trust.emergency", "an emergency notice denies the plan's code")
    if not isinstance(decision, Refused):
        return decision
    return from_whys(why for why in decision.whys if why.rule not in OF_THE_JOIN)
