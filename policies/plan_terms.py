"""A plan against the consortium's policy: every rule has an id and answers with one sentence.

The same pure check runs where a plan is drafted (`minga admin plan show`), where it is submitted,
at every node before it joins, and at an auditor afterwards. It looks at what the plan says; what
one site's data allow is ``check_dataset``. What cannot be told is refused.

terms.missing terms.policy          the plan names no policy, or another than the one in force
policy.not_yet policy.expired       the policy does not count now
participation.minimum .countries .weight .dropout .status
rounds.duration .steps .hours .concurrent .interval
secagg.required .threshold .survivors .protocol
privacy.mode .unit .delta .round .accountant
updates.clip .bits .parts
join.base join.code
data.licence .use .personal
residency  jurisdictions.blocked .transfer
resources.gpu .energy .cost .bandwidth
log.witnesses .auditor .fresh
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Final

from policies.consortium import ConsortiumPolicy, never_overridable
from policies.decision import Decision, Refused, Why, from_whys, refused
from policies.document import parse_share, parse_utc
from policies.site import Dataset
from protocols.plan import Plan
from protocols.plan_terms import Limits, Terms
from protocols.tlog.trust_policy import CHECKPOINT_S, FRESH_S

PUBLIC: Final = "public"
SECAGG_PROTOCOL: Final = "bonawitz17/1"  # what the masked sum of this program is
ACCOUNTANTS: Final = {"rdp": "dp-accounting"}  # the plan's word, and the package behind it
_PERSONAL: Final = {"none": 0, "pseudonymised": 1, "any": 2, "identified": 2}
_MICRO: Final = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What the signed membership says of one institution."""

    country: str  # ISO 3166-1 alpha-2
    status: str  # "active" counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a check rests on besides the two documents."""

    now: datetime  # UTC
    members: Mapping[str, Member]  # by institution
    eps_round_micro: int | None = None  # of one round, rounded up; None: not computed
    witness_quorum: int | None = None  # cosignatures that this reader demands; None: not known
    auditors: int | None = None  # witnesses beside the members that must cosign; None: not known
    accountant: str | None = None  # version of the package that computes epsilon; None: not known
    other_runs: int = 0  # of this node, at work now
    last_round_at: datetime | None = None  # UTC, when this node joined a round before; None: never
    overridden: frozenset[str] = field(default_factory=frozenset)  # of policies.overrides


def check_terms(plan: Plan, policy: ConsortiumPolicy, facts: Facts) -> Decision:
    """Whether the plan keeps to the policy: yes, or every rule that it breaks."""
    if plan.terms is None:
        return refused(
            "terms.missing", "the plan names no policy, code, base model, data contract and limits"
        )
    return _unless_overridden(_whys(plan, plan.terms, policy, facts), policy, facts)


def _unless_overridden(whys: Iterable[Why], policy: ConsortiumPolicy, facts: Facts) -> Decision:
    """What remains after overrides; a rule that none may touch remains, whatever the facts say."""
    waived = facts.overridden - never_overridable(policy)
    return from_whys(why for why in whys if why.rule not in waived)


def _whys(plan: Plan, terms: Terms, policy: ConsortiumPolicy, facts: Facts) -> Iterator[Why]:
    yield from _named_policy(plan, terms, policy, facts)
    yield from _participation(plan, policy, facts)
    yield from _rounds(plan, policy, facts)
    yield from _secagg(plan, terms, policy)
    yield from _privacy(plan, policy, facts)
    yield from _updates(plan, policy)
    yield from _base(plan, terms, policy)
    yield from _code(terms, policy, facts)
    yield from _data(terms, policy)
    yield from _borders(plan, terms, policy, facts)
    yield from _resources(plan, terms, policy)
    yield from _log(policy, facts)


def _log(policy: ConsortiumPolicy, facts: Facts) -> Iterator[Why]:
    rule = policy.log.witness
    if facts.witness_quorum is None:
        yield Why("log.witnesses", "how many witnesses must cosign is not known here")
    elif facts.witness_quorum < rule.quorum:
        yield Why(
            "log.witnesses",
            f"{facts.witness_quorum} cosignatures are demanded, {rule.quorum} must be",
        )
    if rule.auditor_required and not facts.auditors:
        yield Why("log.auditor", "no witness beside the members has to cosign; an auditor must")
    # What this program acts on: a policy that is stricter than it needs another program.
    if 3600 * rule.max_cosignature_age_hours < FRESH_S:
        yield Why(
            "log.fresh",
            f"this program believes cosignatures for {FRESH_S // 3600} hours, the policy for"
            f" {rule.max_cosignature_age_hours}",
        )
    if policy.log.max_checkpoint_interval_s < CHECKPOINT_S:
        yield Why(
            "log.fresh",
            f"this program waits {CHECKPOINT_S} s for a checkpoint, the policy allows"
            f" {policy.log.max_checkpoint_interval_s}",
        )


def _named_policy(
    plan: Plan, terms: Terms, policy: ConsortiumPolicy, facts: Facts
) -> Iterator[Why]:
    if plan.federation != policy.federation:
        yield Why("terms.policy", f"the policy is of federation {policy.federation}")
    named = terms.policy
    if (named.version, named.sha256) != (policy.policy_version, policy.digest):
        yield Why(
            "terms.policy",
            f"the plan was written for policy {named.version} ({named.sha256[:12]}…), in force is"
            f" {policy.policy_version} ({policy.digest[:12]}…)",
        )
    in_force = policy.in_force(facts.now)
    if isinstance(in_force, Refused):
        yield from in_force.whys


def _participation(plan: Plan, policy: ConsortiumPolicy, facts: Facts) -> Iterator[Why]:
    rule, n = policy.participation, len(plan.roster)
    if plan.min_participants < rule.min_participants:
        yield Why(
            "participation.minimum",
            f"a round needs {rule.min_participants} nodes, the plan is content with"
            f" {plan.min_participants}",
        )
    known = {name: facts.members[name] for name in plan.roster if name in facts.members}
    strangers = [name for name in plan.roster if name not in known]
    if strangers:
        yield Why("participation.status", f"not a member: {', '.join(strangers)}")
    idle = [n for n, member in known.items() if member.status not in rule.allowed_status]
    if idle:
        yield Why("participation.status", f"not active: {', '.join(idle)}")
    countries = len({member.country for member in known.values()})
    if countries < rule.min_countries:
        yield Why(
            "participation.countries",
            f"the roster is of {countries} countries, {rule.min_countries} are needed",
        )
    # A weight that follows the data can be nearly all of a sum in which the others have little.
    share = 1000 if plan.vector.weight_cap_tokens else -(-1000 // plan.min_participants)
    if share > rule.max_weight_share_permille:
        yield Why(
            "participation.weight",
            f"one node could be {share} per mille of a sum, at most"
            f" {rule.max_weight_share_permille} are allowed",
        )
    if plan.secagg is None:
        least = plan.min_participants
    else:
        least = max(plan.secagg.threshold, plan.secagg.min_surviving)
    may_lose = -(-n * rule.dropout_permille // 1000)
    if n - least > may_lose:
        yield Why(
            "participation.dropout",
            f"a round may lose {may_lose} of {n} nodes, the plan goes on without {n - least}",
        )


def _rounds(plan: Plan, policy: ConsortiumPolicy, facts: Facts) -> Iterator[Why]:
    rule, deadlines, step = policy.rounds, plan.deadlines, plan.local_step
    phases = [deadlines.join, deadlines.train, deadlines.upload]
    if plan.secagg is not None:
        phases += [deadlines.deal, deadlines.commit, deadlines.reveal]
    if sum(phases) > 60 * rule.max_duration_min:
        yield Why(
            "rounds.duration",
            f"a round may take {-(-sum(phases) // 60)} min, {rule.max_duration_min} are allowed",
        )
    if step.kind != "synthetic" and (
        step.max_steps is None or step.max_steps > rule.max_steps_local
    ):
        said = "any number of" if step.max_steps is None else str(step.max_steps)
        yield Why(
            "rounds.steps",
            f"a local step of {said} steps; at most {rule.max_steps_local} are allowed, and"
            " local_step.max_steps must say so",
        )
    if not rule.open_at(facts.now):
        yield Why("rounds.hours", f"no round begins at {facts.now:%H:%M} UTC")
    if facts.other_runs + 1 > rule.concurrent_max:
        yield Why(
            "rounds.concurrent",
            f"this node is at work in {facts.other_runs} other runs, {rule.concurrent_max} are the"
            " most at one time",
        )
    if facts.last_round_at is not None:
        waited = (facts.now - facts.last_round_at).total_seconds()
        if waited < 60 * rule.min_interval_min:
            yield Why(
                "rounds.interval",
                f"the last round of this run was joined {int(waited // 60)} min ago,"
                f" {rule.min_interval_min} must be between two",
            )


def _secagg(plan: Plan, terms: Terms, policy: ConsortiumPolicy) -> Iterator[Why]:
    rule, sizes = policy.secagg, plan.secagg
    if sizes is None:
        if rule.required and set(terms.data.classes) != {PUBLIC}:
            yield Why("secagg.required", "data that is not public needs a secure sum")
        return
    top, bottom = rule.threshold
    if sizes.threshold * bottom < len(plan.roster) * top:
        yield Why(
            "secagg.threshold",
            f"{sizes.threshold} of {len(plan.roster)} nodes could open a sum, {top}/{bottom} of the"
            " roster must",
        )
    if sizes.min_surviving < rule.min_surviving:
        yield Why(
            "secagg.survivors",
            f"a sum of {sizes.min_surviving} nodes could be opened, {rule.min_surviving} must be"
            " in it",
        )
    if SECAGG_PROTOCOL not in rule.protocol:
        yield Why("secagg.protocol", f"the policy does not allow the protocol {SECAGG_PROTOCOL}")


def _privacy(plan: Plan, policy: ConsortiumPolicy, facts: Facts) -> Iterator[Why]:
    rule, terms = policy.privacy, plan.privacy
    if plan.mode not in rule.modes:
        yield Why("privacy.mode", f"the policy does not allow mode {plan.mode}")
    if terms is None:
        return
    if terms.unit not in rule.unit:
        yield Why("privacy.unit", f"the policy does not know the unit of privacy {terms.unit}")
    if Decimal(terms.delta) > parse_share(rule.delta_max):
        yield Why("privacy.delta", f"delta is {terms.delta}, at most {rule.delta_max} is allowed")
    if ACCOUNTANTS.get(terms.accountant) != rule.accountant.name:
        yield Why("privacy.accountant", f"the policy accounts with {rule.accountant.name}")
    elif facts.accountant != rule.accountant.version:
        yield Why(
            "privacy.accountant",
            f"the policy accounts with {rule.accountant.name} {rule.accountant.version}, here is"
            f" {facts.accountant or 'none'}",
        )
    if facts.eps_round_micro is None:
        yield Why("privacy.round", "what a round costs could not be computed here")
    elif facts.eps_round_micro > rule.eps_round_max_micro:
        yield Why(
            "privacy.round",
            f"a round costs epsilon {facts.eps_round_micro / _MICRO:g}, at most"
            f" {rule.eps_round_max_micro / _MICRO:g} is allowed",
        )


def _updates(plan: Plan, policy: ConsortiumPolicy) -> Iterator[Why]:
    rule = policy.updates
    # A private mode clips each record's gradient or the whole update, and noise is made for that.
    clips = [plan.vector.clip_norm, plan.privacy.clip_norm if plan.privacy else None]
    norms = [clip for clip in clips if clip is not None]
    most = rule.clip_norm_max_micro / _MICRO
    if not norms or min(norms) > most:
        said = f"is clipped to {min(norms):g}" if norms else "has no bound"
        yield Why("updates.clip", f"the norm of an update {said}, at most {most:g} is allowed")
    if plan.vector.ring_bits not in rule.bits:
        yield Why(
            "updates.bits", f"the policy does not allow a ring of {plan.vector.ring_bits} bits"
        )
    names = plan.trainable
    part = "lora" if names != "all" and all("lora_" in name for name in names) else "all"
    if part not in rule.parts:
        yield Why(
            "updates.parts", f"the plan trains {part}, the policy allows {', '.join(rule.parts)}"
        )


def _base(plan: Plan, terms: Terms, policy: ConsortiumPolicy) -> Iterator[Why]:
    base = next((item for item in policy.models.bases if item.id == terms.base.id), None)
    if base is None:
        yield Why("join.base", f"the policy lists no base model {terms.base.id}")
    elif base.digest != f"sha256:{terms.base.digest}":
        yield Why("join.base", f"base model {base.id} has another digest in the policy")
    if terms.base.digest != plan.model.listed:
        yield Why("join.base", f"the run does not start from {terms.base.id}")


def _code(terms: Terms, policy: ConsortiumPolicy, facts: Facts) -> Iterator[Why]:
    image = f"sha256:{terms.code.image}"
    code = next((item for item in policy.code.allowed if item.image == image), None)
    need = policy.governance.decisions.code_approvers
    if code is None:
        yield Why("join.code", f"the policy does not list the code {terms.code.image[:12]}…")
    else:
        if facts.now >= parse_utc(code.expires):
            yield Why("join.code", f"the approval of the code ended at {code.expires}")
        if len(code.approved_by) < need:
            yield Why("join.code", f"{len(code.approved_by)} approved the code, {need} must")
    if terms.code.entrypoint not in policy.code.entrypoints:
        yield Why("join.code", f"the policy knows no entry point {terms.code.entrypoint}")


def _data(terms: Terms, policy: ConsortiumPolicy) -> Iterator[Why]:
    rule, contract = policy.data, terms.data
    bad = [licence for licence in contract.licences if not rule.takes_licence(licence)]
    if bad or not contract.licences:
        yield Why(
            "data.licence", f"the policy does not allow {', '.join(bad) or 'no licence at all'}"
        )
    if contract.use not in rule.use:
        yield Why("data.use", f"the policy does not allow use for {contract.use}")
    if _PERSONAL[contract.personal] > _PERSONAL[rule.personal_data.allowed]:
        yield Why(
            "data.personal",
            f"personal data: the plan says {contract.personal}, the policy allows"
            f" {rule.personal_data.allowed}",
        )
    if not contract.classes:
        yield Why("data.class", "the plan names no class of data")


def _borders(plan: Plan, terms: Terms, policy: ConsortiumPolicy, facts: Facts) -> Iterator[Why]:
    rule = policy.jurisdictions
    blocked = sorted(
        {facts.members[n].country for n in plan.roster if n in facts.members} & set(rule.blocked)
    )
    if blocked:
        yield Why("jurisdictions.blocked", f"the policy blocks {', '.join(blocked)}")
    if (
        plan.mode == "open"
        and rule.residency.updates == "masked-only"
        and set(terms.data.classes) != {PUBLIC}
    ):
        yield Why("residency", "updates from data that is not public leave a site masked only")


def _resources(plan: Plan, terms: Terms, policy: ConsortiumPolicy) -> Iterator[Why]:
    rule, said = policy.resources, terms.limits
    rows = (
        ("resources.gpu", "GPU minutes", said.gpu_minutes, rule.gpu_minutes_round),
        ("resources.energy", "Wh", said.energy_wh, rule.energy_wh_round),
        ("resources.cost", "US cents", said.cost_usd_cents, rule.cost_usd_cents_round),
        (
            "resources.bandwidth", "bytes of each node", said.bandwidth_bytes_node,
            rule.bandwidth_bytes_node,
        ),
    )  # fmt: skip
    for name, unit, asked, allowed in rows:
        if asked > allowed:
            yield Why(name, f"the plan may use {asked} {unit} a round, {allowed} are allowed")
    yield from _whole_at_least_a_part(said)


def _whole_at_least_a_part(said: Limits) -> Iterator[Why]:
    if said.gpu_minutes_node > said.gpu_minutes:
        yield Why("resources.gpu", "one node may use more GPU minutes than all together")
    if said.energy_wh_node > said.energy_wh:
        yield Why("resources.energy", "one node may use more energy than all together")


# -- one data set ----------------------------------------------------------------------------------


def check_dataset(plan: Plan, policy: ConsortiumPolicy, dataset: Dataset, facts: Facts) -> Decision:
    """Whether one collection of a site may be used for the plan.

    data.class data.licence data.use data.personal data.dpia data.declaration data.indigenous
    data.jurisdiction jurisdictions.blocked jurisdictions.transfer residency
    """
    if plan.terms is None:
        return refused("terms.missing", "the plan has no data contract")
    whys = _dataset_whys(plan, plan.terms, policy, dataset, facts)
    return _unless_overridden(whys, policy, facts)


def _dataset_whys(
    plan: Plan, terms: Terms, policy: ConsortiumPolicy, dataset: Dataset, facts: Facts
) -> Iterator[Why]:
    rule, contract, name = policy.data, terms.data, dataset.id
    if dataset.class_ not in contract.classes:
        yield Why(
            "data.class", f"{name} is {dataset.class_}, the plan is for {_list(contract.classes)}"
        )
    if not rule.takes_licence(dataset.licence):
        yield Why("data.licence", f"{name}: the policy does not allow {dataset.licence}")
    elif dataset.licence not in contract.licences:
        yield Why("data.licence", f"{name}: the plan does not take {dataset.licence}")
    if contract.use not in dataset.use:
        yield Why("data.use", f"{name} is not for {contract.use}")
    personal = _PERSONAL[dataset.personal_data]
    if personal > min(_PERSONAL[contract.personal], _PERSONAL[rule.personal_data.allowed]):
        yield Why("data.personal", f"{name} holds personal data: {dataset.personal_data}")
    if personal and rule.personal_data.dpia_required and not dataset.dpia:
        yield Why("data.dpia", f"{name} holds personal data and has no impact assessment")
    missing = [item for item in rule.declaration_required if item not in dataset.declarations]
    if missing:
        yield Why("data.declaration", f"{name} has no {_list(missing)}")
    if dataset.indigenous:
        have = {"fpic-record": dataset.fpic_record, "care-label": dataset.care_label}
        lacking = [item for item in rule.indigenous.requires if have[item] == "none"]
        if lacking:
            yield Why("data.indigenous", f"{name} has no {_list(lacking)}")
    yield from _dataset_borders(plan, policy, dataset, facts)


def _dataset_borders(
    plan: Plan, policy: ConsortiumPolicy, dataset: Dataset, facts: Facts
) -> Iterator[Why]:
    rule, name = policy.jurisdictions, dataset.id
    if dataset.jurisdiction in rule.blocked:
        yield Why("jurisdictions.blocked", f"{name}: the policy blocks {dataset.jurisdiction}")
    if plan.mode == "open" and dataset.class_ != PUBLIC and rule.residency.updates == "masked-only":
        yield Why("residency", f"{name}: an update leaves the site masked only")
    if dataset.personal_data == "none":
        return
    to = {facts.members[other].country for other in plan.roster if other in facts.members}
    closed = sorted(c for c in to if not rule.may_transfer(dataset.jurisdiction, c))
    if closed:
        yield Why(
            "jurisdictions.transfer",
            f"{name}: no basis for what is learned from personal data of {dataset.jurisdiction} to"
            f" reach {_list(closed)}",
        )


def _list(words: Iterable[str]) -> str:
    return ", ".join(words) or "nothing"
