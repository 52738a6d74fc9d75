"""May this plan run here? What the consortium signed, then what the site adds, then a person.

    in force   policy, members and overrides, as this node verified them
    terms      the plan against the policy                            policies.plan_terms
    data       each collection of the site against plan and policy    policies.plan_terms
    site       policy.toml                                            policies.site_check
    rules      consortium.cedar and policy.cedar, as one set          policies.cedar
    approval   by a person, where the site wants it

Signatures, log and privacy ledger are looked at elsewhere, before and after. What cannot be found
out is refused: a missing policy, a broken file, a cost that nobody computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from node_agent.config import NodeConfig, NodeFolder
from node_agent.rules import Refusal
from node_agent.site_policy import SiteRules
from node_agent.spool import atomic_write
from policies.cedar.join import JoinFacts, decide_join
from policies.decision import Allowed, Decision, Refused, Why, all_of, from_whys, refused
from policies.in_force import InForce
from policies.overrides import overridden_rules
from policies.plan_terms import Facts, check_dataset, check_terms
from policies.privacy.micro import accountant_version
from policies.site import Dataset, check_hours
from policies.site_check import SiteState, check_site_policy
from protocols.canonical import parse_json
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest, RunId
from protocols.plan import Plan
from protocols.plan_terms import Limits

APPROVAL: Final = "site.approval"
# Rules that need to know what a round costs; asked again once the model's size is known.
COST_RULES: Final = frozenset({"privacy.round", "site.epsilon"})
_MAX_APPROVAL: Final = 4096  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Situated:
    """What is known besides documents when a round is open."""

    now: datetime  # UTC
    log_witnessed: bool  # the gate of the log let the plan pass, or the site switched it off
    witness_quorum: int | None  # cosignatures that this node demands
    auditors: int | None = None  # of them by witnesses that are no members
    other_runs: int = 0
    last_round_at: datetime | None = None  # UTC
    joined_today: tuple[Limits, ...] = ()
    eps_round_micro: int | None = None  # None: the model's size is not known yet
    eps_after_micro: int | None = None  # of the budget, with this round
    cost_pending: bool = False  # the size is not known yet: cost is asked again before the join
    installed_code: Digest | None = None  # of the program that would train; None: not looked at


# -- the decision ----------------------------------------------------------------------------------


def decide_governed(
    plan: Plan, config: NodeConfig, in_force: InForce, site: SiteRules, at: Situated
) -> Decision:
    """Every rule of consortium and site that says no. Approval is asked last and elsewhere."""
    policy = in_force.policy
    facts = Facts(
        now=at.now,
        members=in_force.members,
        eps_round_micro=at.eps_round_micro,
        witness_quorum=at.witness_quorum,
        auditors=at.auditors,
        accountant=accountant_version(),
        other_runs=at.other_runs,
        last_round_at=at.last_round_at,
        overridden=overridden_rules(in_force.overrides, policy, plan=plan.digest, now=at.now),
    )
    local = site.local(at.now)
    state = SiteState(
        local=local,
        paths=(*config.data.train, *config.data.valid),
        joined_today=at.joined_today,
    )
    terms = _without_costs(check_terms(plan, policy, facts), at)
    wanted = _without_costs(check_site_policy(plan, site.policy, policy, facts, state), at)
    answers = [terms, wanted]
    if plan.terms is not None and plan.terms.code.image in in_force.denied_code:
        answers.append(refused("trust.emergency", "an emergency notice denies the plan's code"))
    if plan.terms is not None and at.installed_code not in (None, plan.terms.code.image):
        said = f"installed here is the program {at.installed_code:.12}…, the plan names another"
        answers.append(refused("code.installed", said))
    answers += [
        _data(plan, config, in_force, site, facts, at, dataset, bool(terms))
        for dataset in site.policy.datasets
    ]
    return all_of(answers)


def _data(
    plan: Plan,
    config: NodeConfig,
    in_force: InForce,
    site: SiteRules,
    facts: Facts,
    at: Situated,
    dataset: Dataset,
    terms_met: bool,
) -> Decision:
    """One collection: its declaration, and the rules about it."""
    declared: Decision = Allowed()
    if plan.local_step.kind != "synthetic":  # that reads no data
        declared = check_dataset(plan, in_force.policy, dataset, facts)
    if plan.terms is None or (plan.privacy is not None and at.cost_pending):
        return declared
    after = at.eps_after_micro if plan.privacy is not None else 0
    if after is None:
        return all_of(
            [declared, refused("privacy.budget", "what is left of the budget is unknown")]
        )
    name = config.institution
    join = JoinFacts(
        institution=name,
        spiffe=f"spiffe://{config.federation}.minga.example/inst/{name}/node/1",
        local=site.local(at.now),
        eps_after_micro=after,
        policy_fresh=bool(in_force.policy.in_force(at.now)),
        log_witnessed=at.log_witnessed,
        terms_met=terms_met,
    )
    return all_of([declared, decide_join(site.rules, plan, in_force.policy, dataset, facts, join)])


def _without_costs(decision: Decision, at: Situated) -> Decision:
    """Leave out what is asked again when the model's size is known, before anything is joined."""
    if not at.cost_pending or not isinstance(decision, Refused):
        return decision
    return from_whys(why for why in decision.whys if why.rule not in COST_RULES)


def decide_site_alone(plan: Plan, site: SiteRules, now: datetime) -> Decision:
    """What a site's policy says where there is no consortium policy: hours, modes, company."""
    whys = check_hours(site.policy, site.local(now))
    if plan.mode in site.policy.deny.modes:
        whys.append(Why("site.mode", f"this site does not take part in mode {plan.mode}"))
    others = sorted(set(site.policy.deny.institutions) & set(plan.roster))
    if others:
        whys.append(Why("site.with", f"this site does not train with {', '.join(others)}"))
    return from_whys(whys)


def refusal_of(decision: Decision) -> Refusal | None:
    """A decision as a node says it: the first rule, and the ids of the others."""
    if not isinstance(decision, Refused):
        return None
    first, others = decision.first, decision.rules[1:]
    more = f"; also by {', '.join(others)}" if others else ""
    return Refusal(first.rule, f"{first.reason}{more}")


# -- approval by a person --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A person's yes to one plan."""

    run: str
    plan: str  # digest
    by: str
    at: str  # ISO 8601, UTC


def write_approval(folder: NodeFolder, approval: Approval) -> Path:
    """Keep an approval; the last one of a run counts."""
    folder.approvals.mkdir(mode=0o700, exist_ok=True)
    path = folder.approvals / f"{approval.run}.json"
    value = {"run": approval.run, "plan": approval.plan, "by": approval.by, "at": approval.at}
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def read_approval(folder: NodeFolder, run: RunId) -> Approval | None:
    """The approval of a run; None: there is none, or it cannot be read."""
    path = folder.approvals / f"{run}.json"
    try:
        with path.open("rb") as file:
            value = parse_json(file.read(_MAX_APPROVAL + 1), limit=_MAX_APPROVAL)
    except (OSError, MalformedMessageError):
        return None
    keys = ("run", "plan", "by", "at")
    if not isinstance(value, dict) or set(value) != set(keys):
        return None
    if not all(isinstance(value[key], str) for key in keys) or value["run"] != run:
        return None
    return Approval(**{key: value[key] for key in keys})


def approval_missing(plan: Plan, site: SiteRules, approval: Approval | None) -> Refusal | None:
    """What a person has still to do before this plan runs here; None: nothing."""
    if not site.policy.requires_approval:
        return None
    if approval is None or approval.plan != plan.digest:
        other = "" if approval is None else " (an earlier plan of that name was approved)"
        return Refusal(APPROVAL, f"waits for a person: minga node approve {plan.run}{other}")
    if site.policy.approvers and approval.by not in site.policy.approvers:
        return Refusal(APPROVAL, f"{approval.by} may not approve: policy.toml approvers")
    return None
