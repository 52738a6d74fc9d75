"""The questions about rules, privacy, code, data, people and releases.

Many of them ask about the signed policy. Where none is at hand the answer is unknown: what a plan
says about itself is not evidence that it was allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from policies.audit import approvals
from policies.audit.evidence import Evidence, released
from policies.audit.records import Record, Result
from policies.audit.replay import Taken
from policies.audit.spending import SpendingUnknownError, spending, spent_claims, wrong_claims
from policies.consortium import ConsortiumPolicy
from policies.decision import Refused
from policies.releases import check_release
from protocols.governance import roles
from protocols.identifiers import Digest, RoundId, RunId
from protocols.tlog.fields import Role
from protocols.tlog.kinds import (
    CertIssued,
    CodeApproved,
    DatasetDeclared,
    EnrolRequest,
    EvalReport,
    OverrideGranted,
    ReleaseApproved,
    ResourcesUsed,
    RoundJoin,
    UpdateCommit,
    parse_round_subject,
)

NO_POLICY = "no signed policy is at hand"
_MICRO = 1_000_000


def q04_privacy_loss(evidence: Evidence) -> Iterator[Record]:
    """Every claim is the one its plan gives; epsilon is composed again; sums are within budgets.

    Released and burned attempts count, aborted ones do not: they carry a certificate.
    """
    wrong, unknown = wrong_claims(evidence)
    for taken, reason in wrong:
        _, round_ = parse_round_subject(taken.statement.subject)
        yield Record(
            id="4", round=str(round_), result=Result.FAIL, leaves=(taken.index,), reason=reason
        )
    if unknown:
        yield Record(
            id="4",
            round=None,
            result=Result.UNKNOWN,
            leaves=tuple(taken.index for taken in unknown),
            reason="without plan and manifest the claims of these leaves are not derived again",
        )
    claims = spent_claims(evidence)
    if not claims:
        if not wrong:
            modes = sorted({state.plan.mode for state in evidence.rounds.values()})
            reason = f"no privacy is spent: {', '.join(modes) or 'no round'}"
            yield Record(id="4", round=None, result=Result.PASS, leaves=(), reason=reason)
        return
    leaves = tuple(sorted(taken.index for taken, _ in claims))
    try:
        found = spending(evidence)
    except SpendingUnknownError as error:
        yield Record(id="4", round=None, result=Result.UNKNOWN, leaves=leaves, reason=str(error))
        return
    policy = evidence.policy
    for item in found:
        who = f"{item.institution}, {item.dataset}"
        what = (
            f"{who}: epsilon {item.printed} at delta {item.delta:g} per {item.unit}"
            f" over {item.claims} updates"
        )
        if policy is None:
            yield Record(
                id="4",
                round=None,
                result=Result.UNKNOWN,
                leaves=leaves,
                reason=f"{what}; {NO_POLICY}, so no budget is known",
            )
            continue
        classes = _classes_of(evidence, item.dataset)
        budget = policy.privacy.budgets.largest(item.institution, classes).eps_total_micro / _MICRO
        yield Record(
            id="4",
            round=None,
            result=Result.PASS if item.epsilon <= budget else Result.FAIL,
            leaves=leaves,
            reason=f"{what}; the budget is {budget:g}",
        )


def _classes_of(evidence: Evidence, dataset: str) -> tuple[str, ...]:
    """Classes of data that the plans over a data set may use; its own name where none says."""
    found = {
        name
        for plan in evidence.plans.values()
        if plan.privacy is not None and plan.privacy.dataset == dataset and plan.terms is not None
        for name in plan.terms.data.classes
    }
    return tuple(sorted(found)) or (dataset,)


def q06_code(evidence: Evidence) -> Iterator[Record]:
    """The plan's code was approved before the plan, in the log and in the policy."""
    approved = list(evidence.of(CodeApproved))
    for round_, state in evidence.rounds.items():
        code = state.plan.code
        if code is None:
            reason = "the plan leaf names no code"
            yield _one("6", str(round_), Result.UNKNOWN, state.plan_at, reason)
            continue
        by = {taken.leaf.hash for taken in approved if taken.index < state.plan_at}
        missing = [digest for digest in code.approvals if Digest(digest) not in by]
        allowed = _allowed_code(evidence.policy_at(state.plan_at), code.image)
        if missing:
            reason = f"it names an approval that is not in the log before it: {missing[0][:12]}…"
            yield _one("6", str(round_), Result.FAIL, state.plan_at, reason)
        elif allowed is False:
            reason = "its image is not among the code that the policy allows"
            yield _one("6", str(round_), Result.FAIL, state.plan_at, reason)
        elif allowed is None:
            what = code.source_commit or code.image or "unnamed"
            yield _one(
                "6", str(round_), Result.UNKNOWN, state.plan_at, f"code {what[:12]}…; {NO_POLICY}"
            )
        else:
            yield _one("6", str(round_), Result.PASS, state.plan_at, "the policy allows its image")


def _allowed_code(policy: ConsortiumPolicy | None, image: str | None) -> bool | None:
    if policy is None or image is None:
        return None
    return f"sha256:{image}" in {code.image for code in policy.code.allowed}


def q07_data(evidence: Evidence) -> Iterator[Record]:
    """Each update names declarations of its own institution; the policy takes their licences."""
    declared = {
        (taken.said.institution, taken.said.declaration_sha256): taken.said.licence
        for taken in evidence.of(DatasetDeclared)
        if isinstance(taken.said, DatasetDeclared)
    }
    for taken in evidence.of(UpdateCommit):
        said = taken.said
        if not isinstance(said, UpdateCommit):
            continue
        _, round_ = parse_round_subject(taken.statement.subject)
        where = str(round_)
        if not said.datasets:
            yield _one("7", where, Result.UNKNOWN, taken.index, f"{said.node} names no data set")
            continue
        for used in said.datasets:
            what = f"{said.node}: {used.id}"
            key = (said.node, used.declaration_sha256)
            if used.declaration_sha256 is None or key not in declared:
                reason = f"{what} has no declaration in the log"
                yield _one("7", where, Result.UNKNOWN, taken.index, reason)
            elif used.licence is not None and used.licence != declared[key]:
                reason = f"{what} claims {used.licence}, declared is {declared[key]}"
                yield _one("7", where, Result.FAIL, taken.index, reason)
            elif (policy := evidence.policy_at(taken.index)) is None:
                yield _one("7", where, Result.UNKNOWN, taken.index, f"{what}; {NO_POLICY}")
            elif not policy.data.takes_licence(declared[key]):
                reason = f"{what} is under {declared[key]}, which the policy does not take"
                yield _one("7", where, Result.FAIL, taken.index, reason)
            else:
                reason = f"{what}, {declared[key]}"
                yield _one("7", where, Result.PASS, taken.index, reason)


def q11_overrides(evidence: Evidence) -> Iterator[Record]:
    """Overrides are documents of the signed policy: rule, term and majority are checked with it.

    One that names a rule which nobody may overrule, or that too few signed, is a fault of the
    publication (``signed``). A leaf that says otherwise than what was signed fails.
    """
    signed = evidence.signed
    granted = {
        (taken.said.plan_sha256, taken.said.rule): taken
        for taken in evidence.of(OverrideGranted)
        if isinstance(taken.said, OverrideGranted)
    }
    if signed is None or not signed.history:
        for (plan, rule), taken in granted.items():
            reason = f"{rule} is set aside for plan {plan[:12]}…; {NO_POLICY}"
            yield _one("11", None, Result.UNKNOWN, taken.index, reason)
        if not granted:
            reason = f"{NO_POLICY}, and overrides are published with it"
            yield Record(id="11", round=None, result=Result.UNKNOWN, leaves=(), reason=reason)
        return
    found = signed.overrides()
    for index, override, signers in found:
        reason = (
            f"{override.rule} is set aside for plan {override.plan[:12]}… until"
            f" {override.expires}: {override.code}; signed by {', '.join(sorted(signers))}"
        )
        yield _one("11", None, Result.PASS, index, reason)
    for (plan, rule), taken in granted.items():
        if (plan, rule) not in {(override.plan, override.rule) for _, override, _ in found}:
            reason = f"{rule} is set aside for plan {plan[:12]}…, which nobody signed"
            yield _one("11", None, Result.FAIL, taken.index, reason)
    if not found and not granted:
        yield Record(id="11", round=None, result=Result.PASS, leaves=(), reason="none was granted")


def q14_dominance(evidence: Evidence) -> Iterator[Record]:
    """No institution's share of the sum is above the policy's limit."""
    for round_, state in evidence.rounds.items():
        attempt, policy = released(state), evidence.policy_at(state.plan_at)
        if attempt is None or attempt.aggregate is None:
            continue
        said, at = attempt.aggregate, attempt.aggregate_at or state.plan_at
        top = max((weight.permille for weight in said.weights), default=-(-1000 // said.survivors))
        plan = evidence.plan_of(state)
        if not said.weights and (plan is None or plan.vector.weight_cap_tokens is not None):
            reason = "updates are weighted by their size, and the weights are not published"
            yield _one("14", str(round_), Result.UNKNOWN, at, reason)
        elif policy is None:
            reason = f"the largest share is {top / 10:g} %; {NO_POLICY}"
            yield _one("14", str(round_), Result.UNKNOWN, at, reason)
        else:
            most = policy.participation.max_weight_share_permille
            reason = f"the largest share is {top / 10:g} %, allowed are {most / 10:g} %"
            result = Result.PASS if top <= most else Result.FAIL
            yield _one("14", str(round_), result, at, reason)


def q16_certificates(evidence: Evidence) -> Iterator[Record]:
    """Every certificate of a node answers a request in the log, and every request was answered.

    A certificate for a node without one is refused when the leaf is read (``replay``).
    """
    answered = {
        Digest(taken.said.request)
        for taken in evidence.of(CertIssued)
        if isinstance(taken.said, CertIssued) and taken.said.request is not None
    }
    issued = [taken.index for taken in evidence.of(CertIssued)]
    waiting = [taken for taken in evidence.of(EnrolRequest) if taken.leaf.hash not in answered]
    reason = f"{len(issued)} certificates, each of a node asked for in the log"
    if waiting:
        names = {taken.holder.name for taken in waiting}
        reason += f"; requests without a certificate: {', '.join(sorted(names))}"
    bad: list[str] = []
    alone: list[str] = []
    for taken, why in _without_institution(evidence):
        if taken.leaf.hash in answered:
            (alone if why is None else bad).append(
                f"{taken.holder.name}{f': {why}' if why else ''}"
            )
    result = Result.PASS
    if alone:
        who = ", ".join(sorted(set(alone)))
        reason += f"; asked for by the node's own key alone, not by its institution: {who}"
        result = Result.UNKNOWN
    elif evidence.signed is None:
        reason += f"; {NO_POLICY} to name the keys of institutions"
        result = Result.UNKNOWN
    if bad:
        reason += f"; not approved by the institution: {', '.join(sorted(set(bad)))}"
        result = Result.FAIL
    yield Record(id="16", round=None, result=result, leaves=tuple(issued), reason=reason)


def _without_institution(evidence: Evidence) -> Iterator[tuple[Taken, str | None]]:
    """Requests without the word of their institution, and what is wrong with it; None: none is.

    A renewal is signed with a key that the institution approved before.
    """
    vouched: set[tuple[str, str]] = set()
    for taken in evidence.of(EnrolRequest):
        said = taken.said
        if not isinstance(said, EnrolRequest) or taken.holder.role is Role.INSTITUTION:
            continue
        mine = (said.node, said.signing_key)
        if said.approval is None:
            if mine not in vouched or taken.holder.public_key.hex() != said.signing_key:
                yield taken, None
            continue
        found = evidence.signed.at(taken.index) if evidence.signed else None
        if found is not None:
            state = found.state
            keys = state.members.keys_of(said.node)
            why = approvals.refusal(said, state.federation, keys)
            if why is not None:
                yield taken, why
                continue
        vouched.add(mine)


def q19_releases(evidence: Evidence) -> Iterator[Record]:
    """A released model passed every gate of the policy, and the board signed it.

    The gates are computed again from the numbers in the reports; who of the board signed is
    verified where the publication's leaves are read.
    """
    reports = evidence.replay.reports
    index_of = {taken.leaf.hash: taken.index for taken in evidence.of(EvalReport)}
    found = list(evidence.of(ReleaseApproved))
    for taken in found:
        said = taken.said
        if not isinstance(said, ReleaseApproved):
            continue
        what, policy = f"model {said.model[:12]}…", evidence.policy_at(taken.index)
        used = [
            item
            for item in reports
            if item.leaf in said.reports and index_of[item.leaf] < taken.index
        ]
        if policy is None or evidence.signed is None:
            reason = f"{what}: {len(used)} reports; {NO_POLICY}"
            yield _one("19", None, Result.UNKNOWN, taken.index, reason)
            continue
        decision = check_release(said.model, used, policy)
        published = evidence.signed.released(said.model)
        if isinstance(decision, Refused):
            yield _one("19", None, Result.FAIL, taken.index, str(decision))
        elif published is None:
            reason = f"{what}: the release board has published no such model"
            yield _one("19", None, Result.FAIL, taken.index, reason)
        else:
            signed = published.state.quorums[roles.RELEASE].signed
            who = ", ".join(sorted(holder.person for holder in signed))
            by = ", ".join(sorted({item.by for item in used}))
            reason = f"{what}: evaluated by {by}; signed by {who}"
            yield _one("19", None, Result.PASS, taken.index, reason)
    if not found:
        yield Record(
            id="19", round=None, result=Result.PASS, leaves=(), reason="no model was released"
        )


def q20_resources(evidence: Evidence) -> Iterator[Record]:
    """What the nodes claim to have used, added up, against what plan and policy allow a round.

    Claims: signed, and not provable. Money is not in the log: prices are each site's own.
    """
    totals = {"gpu_seconds": 0, "energy_wh": 0, "bytes": 0}
    leaves, silent = [], 0
    rounds: dict[RoundId, list[Taken]] = {}
    for taken in evidence.of(UpdateCommit):
        if not isinstance(taken.said, UpdateCommit):
            continue
        used = taken.said.resources
        leaves.append(taken.index)
        silent += used.source == "none"
        for name in totals:
            totals[name] += getattr(used, name)
        rounds.setdefault(parse_round_subject(taken.statement.subject)[1], []).append(taken)
    for round_, updates in rounds.items():
        over = _beyond(evidence, round_, updates)
        if over:
            yield Record(
                id="20",
                round=str(round_),
                result=Result.FAIL,
                leaves=tuple(taken.index for taken in updates),
                reason="; ".join(over),
            )
    reason = (
        f"claimed: {totals['gpu_seconds'] / 3600:.1f} GPU hours, {totals['energy_wh'] / 1000:.2f}"
        f" kWh, {totals['bytes'] / 1e6:.1f} MB"
    )
    if silent:
        reason += f"; {silent} of {len(leaves)} updates claim nothing"
    result = Result.UNKNOWN if silent or not leaves else Result.PASS
    yield Record(id="20", round=None, result=result, leaves=tuple(leaves), reason=reason)


def _beyond(evidence: Evidence, round_: RoundId, updates: Sequence[Taken]) -> list[str]:
    """What a round claims to have used beyond its plan or the policy; the tighter of the two."""
    state = evidence.rounds[round_]
    plan, policy = evidence.plan_of(state), evidence.policy_at(state.plan_at)
    said = plan.terms.limits if plan is not None and plan.terms is not None else None
    allowed = policy.resources if policy is not None else None
    by_node: dict[str, ResourcesUsed] = {}
    for taken in updates:  # the last attempt's update is the one that stands
        if isinstance(taken.said, UpdateCommit):
            by_node[taken.said.node] = taken.said.resources
    gpu = sum(used.gpu_seconds for used in by_node.values())
    energy = sum(used.energy_wh for used in by_node.values())
    most = max((used.bytes for used in by_node.values()), default=0)
    rows = (
        ("GPU seconds", gpu, [60 * said.gpu_minutes if said else None,
                              60 * allowed.gpu_minutes_round if allowed else None]),
        ("Wh", energy, [said.energy_wh if said else None,
                        allowed.energy_wh_round if allowed else None]),
        ("bytes of one node", most, [said.bandwidth_bytes_node if said else None,
                                     allowed.bandwidth_bytes_node if allowed else None]),
    )  # fmt: skip
    return [
        f"{used} {unit} are claimed, {min(limits)} were allowed"
        for unit, used, either in rows
        if (limits := [limit for limit in either if limit is not None]) and used > min(limits)
    ]


def _one(id_: str, round_: str | None, result: Result, leaf: int, reason: str) -> Record:
    return Record(id=id_, round=round_, result=result, leaves=(leaf,), reason=reason)


def q02_policy_signed(evidence: Evidence) -> Iterator[Record]:
    """Each round names the metadata in force, and its plan is among what the admins signed.

    That every publication holds (thresholds along the roots, distinct institutions, majorities by
    what changes) is checked where its leaves are read; a bad one is a fault.
    """
    for round_, state in evidence.rounds.items():
        where, at, named = str(round_), state.plan_at, state.plan.tuf
        signed = evidence.signed
        if signed is None or signed.missing:
            what = "no first root is at hand" if signed is None else "published files are not here"
            yield _one("2", where, Result.UNKNOWN, at, f"the policy was not verified: {what}")
            continue
        found = signed.at(at)
        if found is None:
            yield _one("2", where, Result.UNKNOWN, at, "nothing was published before this round")
            continue
        versions = found.state.versions
        wrong = [
            f"{role} {item.version}"
            for role, item in sorted(named.items())
            if found.state.published.get((role, item.version)) != item.sha256
            or versions.get(role) != item.version
        ]
        plan = found.state.plan_signed(RunId(round_.run), state.plan_sha256)
        if wrong:
            reason = f"it names metadata that was not in force: {', '.join(wrong)}"
            yield _one("2", where, Result.FAIL, at, reason)
        elif plan is not None:
            yield _one("2", where, Result.FAIL, at, str(plan))
        else:
            who = found.state.quorums.get(roles.POLICY)
            what = f"policy {found.policy.policy_version}, root {found.state.root_version}"
            names = sorted(holder.institution for holder in who.signed) if who else []
            signers = f", signed by {', '.join(names)}" if names else ""
            result = Result.PASS if named else Result.UNKNOWN
            more = "" if named else "; the plan leaf names none of it"
            yield _one("2", where, result, at, f"{what}{signers}{more}")


def q03_in_force(evidence: Evidence) -> Iterator[Record]:
    """Policy and metadata were in force between the witnessed times around the plan leaf."""
    for round_, state in evidence.rounds.items():
        where, at = str(round_), state.plan_at
        found = evidence.signed.at(at) if evidence.signed else None
        if found is None:
            yield _one("3", where, Result.UNKNOWN, at, NO_POLICY)
            continue
        before, after = evidence.tree.written_between(at)
        if after is None:
            reason = "no witness bounds the time of the plan leaf"
            yield _one("3", where, Result.UNKNOWN, at, reason)
            continue
        # The leaf lies between the two times: what holds at neither end did not hold.
        times = [datetime.fromtimestamp(t, UTC) for t in (before or after, after)]
        needed = (roles.ROOT, roles.TARGETS, *roles.NEEDED)
        ended = [
            f"{role} {found.state.versions[role]}"
            for role in needed
            if role in found.state.expires and found.state.expires[role] <= times[0]
        ]
        why = [f"expired: {', '.join(ended)}"] if ended else []
        counted = [found.policies.at(time) for time in times]
        decisions = [step.policy.in_force(time) for step, time in zip(counted, times, strict=True)]
        if all(isinstance(decision, Refused) for decision in decisions):
            why.append(str(decisions[0]))
        plan = evidence.plan_of(state)
        named = plan.terms.policy if plan is not None and plan.terms is not None else None
        if named is not None and named.sha256 not in {step.policy.digest for step in counted}:
            why.append(
                f"the plan names policy {named.version}, in force was"
                f" {counted[0].policy.policy_version}"
            )
        if why:
            yield _one("3", where, Result.FAIL, at, "; ".join(why))
        else:
            reason = f"policy {counted[-1].policy.policy_version} and all that it rests on"
            yield _one("3", where, Result.PASS, at, reason)


def q15_suspended(evidence: Evidence) -> Iterator[Record]:
    """Nobody who was suspended joined. Leaves by keys that are not in force are never taken."""
    signed = evidence.signed
    joins = [taken for taken in evidence.of(RoundJoin) if isinstance(taken.said, RoundJoin)]
    if signed is None or not signed.history:
        reason = f"{len(joins)} joins by certified keys; no signed membership is at hand"
        yield Record(id="15", round=None, result=Result.UNKNOWN, leaves=(), reason=reason)
        return
    bad = 0
    for taken in joins:
        status = signed.status_at(taken.index, taken.holder.name)
        if signed.at(taken.index) is not None and status != "active":
            bad += 1
            reason = f"{taken.holder.name} joined while {status or 'no member'}"
            yield _one("15", None, Result.FAIL, taken.index, reason)
    if not bad:
        reason = f"{len(joins)} joins, all by active members"
        yield Record(id="15", round=None, result=Result.PASS, leaves=(), reason=reason)
