"""The question "may this plan run here, on this data?", as the rule engine takes it.

Derived, never asked: every attribute comes from a document that was parsed and verified before, or
from the reader's own clock and ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from policies.cedar.engine import RuleSet
from policies.consortium import ConsortiumPolicy
from policies.decision import Decision, refused
from policies.plan_terms import Facts
from policies.site import Dataset, narrow
from protocols.plan import Plan

UNKNOWN_MEMBER = "unknown"  # status of an institution that no membership names: never "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinFacts:
    """What the request says besides plan, policy and data set."""

    institution: str
    spiffe: str
    local: datetime  # in the site's time zone
    eps_after_micro: int  # of the data set's budget, with this round
    policy_fresh: bool  # the policy is verified and in force
    log_witnessed: bool  # the plan's leaf is in the log that the witness quorum signed
    terms_met: bool  # by policies.plan_terms


def decide_join(
    rules: RuleSet,
    plan: Plan,
    policy: ConsortiumPolicy,
    dataset: Dataset,
    facts: Facts,
    join: JoinFacts,
) -> Decision:
    """Ask the consortium's and the site's rules, as one set, about one collection."""
    if plan.terms is None:
        return refused("terms.missing", "the plan says nothing that the rules could judge")
    if plan.privacy is not None and facts.eps_round_micro is None:
        return refused("privacy.round", "what a round costs could not be computed here")
    return rules.decide(*join_request(plan, policy, dataset, facts, join))


def _uid(kind: str, name: str) -> dict[str, str]:
    return {"type": f"Minga::{kind}", "id": name}


def _ref(kind: str, name: str) -> dict[str, Any]:
    return {"__entity": _uid(kind, name)}


def join_request(
    plan: Plan, policy: ConsortiumPolicy, dataset: Dataset, facts: Facts, join: JoinFacts
) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """Request and entities; ``plan`` has terms."""
    terms = plan.terms
    if terms is None:
        raise ValueError("a plan without terms cannot be asked about")
    member = facts.members.get(join.institution)
    node, data = f"{join.institution}/1", f"{join.institution}/{dataset.id}"
    budget = policy.privacy.budgets.epsilon_micro(join.institution, dataset.class_)
    secagg, top_bottom = plan.secagg, policy.secagg.threshold
    institution = {
        "uid": _uid("Institution", join.institution),
        "attrs": {
            "country": member.country if member else "",
            "status": member.status if member else UNKNOWN_MEMBER,
        },
        "parents": [],
    }
    agent = {
        "uid": _uid("NodeAgent", node),
        "attrs": {"spiffe": join.spiffe, "institution": _ref("Institution", join.institution)},
        "parents": [_uid("Institution", join.institution)],
    }
    collection = {
        "uid": _uid("Dataset", data),
        "attrs": {
            "owner": _ref("Institution", join.institution),
            "datasetClass": dataset.class_,
            "licence": dataset.licence,
            "jurisdiction": dataset.jurisdiction,
            "legalBasis": dataset.legal_basis,
            "residency": dataset.residency,
            "personalData": dataset.personal_data != "none",
            "indigenous": dataset.indigenous,
            "epsTotalMicro": narrow(budget, dataset.eps_total_micro),
        },
        "parents": [],
    }
    asked = {
        "uid": _uid("RoundPlan", plan.digest),
        "attrs": {
            "run": plan.run,
            "mode": plan.mode,
            "baseModel": f"sha256:{terms.base.digest}",
            "codeDigest": f"sha256:{terms.code.image}",
            "secagg": secagg is not None,
            "secaggThreshold": secagg.threshold if secagg else 0,
            "minParticipants": plan.min_participants,
            "rosterSize": len(plan.roster),
            "epsRoundMicro": facts.eps_round_micro or 0,
            "localSteps": plan.local_step.max_steps or 0,
            "gpuMinutes": terms.limits.gpu_minutes_node,
            "energyWh": terms.limits.energy_wh_node,
            "use": terms.data.use,
            "exports": ["masked-update" if secagg else "raw-update"],
        },
        "parents": [],
    }
    context = {
        "dataset": _ref("Dataset", data),
        "limits": {
            "minParticipants": policy.participation.min_participants,
            "secaggRequired": policy.secagg.required,
            "secaggNumerator": top_bottom[0],
            "secaggDenominator": top_bottom[1],
            "epsRoundMaxMicro": policy.privacy.eps_round_max_micro,
        },
        "minuteLocal": join.local.hour * 60 + join.local.minute,
        "weekday": join.local.isoweekday(),
        "epsAfterMicro": join.eps_after_micro,
        "policyFresh": join.policy_fresh,
        "logWitnessed": join.log_witnessed,
        "termsMet": join.terms_met,
        "allowedBases": [base.digest for base in policy.models.bases],
        "allowedCode": [code.image for code in policy.code.allowed],
        "overridden": sorted(facts.overridden),
    }
    request = {
        "principal": agent["uid"],
        "action": {"type": "Minga::Action", "id": "joinRound"},
        "resource": asked["uid"],
        "context": context,
    }
    return request, [institution, agent, collection, asked]
