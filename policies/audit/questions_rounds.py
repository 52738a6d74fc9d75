"""The questions about what happened in each round. Numbers: protocols/spec/audit.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta

from policies.audit.certificates import abort_certificate
from policies.audit.evidence import Evidence, ended, released
from policies.audit.records import Record, Result
from policies.audit.replay import Taken
from policies.audit.rounds import AttemptState, RoundState, Verdict
from protocols.canonical import sha256_hex
from protocols.errors import FederationError
from protocols.identifiers import Digest, RoundId
from protocols.plan import Plan
from protocols.secagg.attempts import attempt_of
from protocols.secagg.messages import Transcript
from protocols.secagg.verify import Verified, verify_transcript
from protocols.tlog.kinds import (
    ObjectionResolved,
    RoundDecline,
    RoundObjection,
    parse_round_subject,
)


def _record(
    id_: str, round_: RoundId | None, result: Result, leaves: tuple[int, ...], reason: str
) -> Record:
    name = None if round_ is None else str(round_)
    return Record(id=id_, round=name, result=result, leaves=leaves, reason=reason)


def _names(nodes: object) -> str:
    return ", ".join(sorted(nodes)) or "nobody"  # type: ignore[call-overload]


def _leaves(attempt: AttemptState) -> tuple[int, ...]:
    """The leaves of an attempt: start, commits, survivors, aggregate."""
    rest = [attempt.survivors_at, attempt.aggregate_at]
    commits = [commit.index for commit in attempt.commits.values()]
    return tuple(sorted([attempt.start, *commits, *(i for i in rest if i is not None)]))


def q01_who_took_part(evidence: Evidence) -> Iterator[Record]:
    """Included are survivors, survivors committed, those who committed had joined; each confirmed.

    The first three hold for every leaf that was taken (``rounds.after``); the last is a verdict
    that may be missing.
    """
    for round_, state in evidence.rounds.items():
        attempt = released(state)
        joins = tuple(sorted(state.joins.values()))
        if attempt is None or attempt.aggregate is None:
            over = ended(state) or (state.attempt is not None and state.attempt.aborted is not None)
            reason = f"{len(joins)} joined, nothing was opened"
            if not over:
                reason += " yet"
            result = Result.PASS if over else Result.UNKNOWN
            yield _record("1", round_, result, (state.plan_at, *joins), reason)
            continue
        included = attempt.aggregate.included
        silent = set(included) - attempt.verdicts.keys()
        leaves = tuple(sorted({*joins, *_leaves(attempt)}))
        who = f"{len(included)} of {len(joins)} that joined are in the sum: {_names(included)}"
        if silent:
            reason = f"{who}; without a verdict of {_names(silent)}"
            yield _record("1", round_, Result.UNKNOWN, leaves, reason)
        else:
            yield _record("1", round_, Result.PASS, leaves, who)


def q05_models(evidence: Evidence) -> Iterator[Record]:
    """The model in is the one that came out before; ``gather`` refuses any other.

    That the model out follows from the sum is ``minga audit recompute``; without it every survivor
    that confirmed has computed the same.
    """
    for round_, state in evidence.rounds.items():
        attempt = released(state)
        if evidence.plan_of(state) is None:
            reason = "the plan is not at hand, so the first model is not known to be the plan's"
            yield _record("5", round_, Result.UNKNOWN, (state.plan_at,), reason)
        elif attempt is None or attempt.aggregate is None:
            reason = f"from {state.plan.model_in[:12]}…; no model came out"
            yield _record("5", round_, Result.PASS, (state.plan_at,), reason)
        else:
            out = attempt.aggregate.model_out
            leaves = (state.plan_at, attempt.aggregate_at or state.plan_at)
            agree = [n for n, v in attempt.verdicts.items() if v is Verdict.CONFIRM]
            reason = f"from {state.plan.model_in[:12]}… to {out[:12]}…, computed by {_names(agree)}"
            result = Result.PASS if agree else Result.UNKNOWN
            yield _record("5", round_, result, leaves, reason)


def q08_aborted_or_burned(evidence: Evidence) -> Iterator[Record]:
    """Every attempt has one terminal leaf, with a code and who caused it.

    After an update was handed in, "aborted" needs a certificate; whether the certificate holds is
    known only where it is at hand.
    """
    quiet = bool(evidence.rounds)
    for round_, state in evidence.rounds.items():
        found = [(a, a.aborted) for a in state.attempts if a.aborted is not None]
        if state.ended is not None and state.ended.attempt == 0:
            said = state.ended
            when = (
                f"after attempt {len(state.attempts)}" if state.attempts else "before any attempt"
            )
            reason = f"{said.outcome} in {said.phase} {when}: {said.code}"
            yield _record("8", round_, Result.PASS, (state.plan_at,), f"{reason} ({said.actor})")
        for attempt, said in found:
            reason = (
                f"attempt {attempt.number} {said.outcome} in {said.phase}: {said.code}"
                f" ({said.actor})"
            )
            result = Result.PASS
            if said.certificate_sha256 is not None:
                result, more = abort_certificate(evidence, round_, state, attempt)
                reason += more
            yield _record("8", round_, result, (attempt.start,), reason)
        open_ = [a for a in state.attempts if not a.over and a.aggregate is None]
        quiet = quiet and not (found or open_ or state.ended)
        for attempt in open_:
            reason = f"attempt {attempt.number} has no terminal leaf yet"
            yield _record("8", round_, Result.UNKNOWN, (attempt.start,), reason)
    if quiet:
        yield _record("8", None, Result.PASS, (), "nothing was aborted or burned")


def q09_dropped_or_refused(evidence: Evidence) -> Iterator[Record]:
    """Joined without included is dropped, each with its phase and code; who declined signed it."""
    declined: dict[RoundId, list[int]] = {}
    for taken in evidence.of(RoundDecline):
        _, about = parse_round_subject(taken.statement.subject)
        declined.setdefault(about, []).append(taken.index)
    for round_, state in evidence.rounds.items():
        parts = [f"{n} declined: {', '.join(rules)}" for n, rules in sorted(state.declines.items())]
        attempt = released(state)
        leaves = list(declined.get(round_, ()))
        if attempt is not None and attempt.aggregate is not None:
            parts += [f"{d.node} lost in {d.phase}: {d.code}" for d in attempt.aggregate.dropped]
            leaves.append(attempt.aggregate_at or state.plan_at)
        silent = (state.roster or frozenset()) - state.joins.keys() - state.declines.keys()
        if silent:
            parts.append(f"without an answer: {_names(silent)}")
        result = Result.UNKNOWN if state.roster is None else Result.PASS
        reason = "; ".join(parts) or "nobody"
        yield _record("9", round_, result, tuple(sorted(leaves)) or (state.plan_at,), reason)


def q10_same_for_all(evidence: Evidence) -> Iterator[Record]:
    """Joins and confirmations name one plan and one model; everybody had seen this one log."""
    bad = [fault for fault in evidence.faults if fault.check == "seen"]
    if bad:
        leaves = tuple(range(bad[0].first, bad[0].stop))[:100]
        yield _record("10", None, Result.FAIL, leaves, bad[0].reason)
    for round_, state in evidence.rounds.items():
        leaves = (state.plan_at, *sorted(state.joins.values()))
        yield _record(
            "10", round_, Result.PASS, leaves, f"{len(state.joins)} joined from one plan and model"
        )


def transcript_of(
    evidence: Evidence, round_: RoundId, state: RoundState
) -> tuple[Verified | None, Result, str]:
    """The released attempt's transcript, verified from beginning to end, or why not.

    Its START, survivors and certificate must also be the ones whose digests are leaves.
    """
    attempt, plan = released(state), evidence.plan_of(state)
    if attempt is None or attempt.aggregate is None or plan is None:
        return None, Result.UNKNOWN, "no plan or no result is at hand"
    said = attempt.aggregate
    data = evidence.blobs(Digest(said.transcript_blob)) if said.transcript_blob else None
    if data is None:
        return None, Result.UNKNOWN, "the transcript is not at hand"
    if sha256_hex(data) != said.transcript_sha256:
        return None, Result.FAIL, "the transcript at hand is another one than the leaf names"
    try:
        terms = attempt_of(plan, round_, attempt.number, Digest(state.plan.model_in))
        transcript = Transcript.from_bytes(data)
        verified = verify_transcript(transcript, terms)
    except FederationError as error:
        return None, Result.FAIL, f"the transcript does not hold: {error}"
    certificate = sha256_hex(transcript.certificate.to_bytes())
    if certificate != said.commit_certificate_sha256:
        return None, Result.FAIL, "the commit certificate is not the one that the leaf names"
    problem = _differs(state, attempt, verified)
    if problem:
        return None, Result.FAIL, problem
    commits = len(transcript.certificate.commits)
    return verified, Result.PASS, f"{commits} commits to one list"


def _differs(state: RoundState, attempt: AttemptState, verified: Verified) -> str:
    """What the transcript says otherwise than the leaves; empty where they agree."""
    agreed = verified.listed.agreed
    if tuple(agreed.started.readys) != attempt.ready:
        return "the transcript starts with another ready set than its leaf"
    if agreed.started.ctx_deal != attempt.ctx_deal:
        return "the transcript deals in another context than its leaf"
    for node, header in verified.listed.headers.items():
        commit = attempt.commits.get(node)
        if commit is None or (commit.upload_root, commit.ctx, commit.length) != (
            header.upload_root,
            header.ctx,
            header.length,
        ):
            return f"the transcript sums another upload of {node} than its update.commit"
    if attempt.aggregate and tuple(verified.listed.headers) != attempt.aggregate.included:
        return "the transcript opens another list than its leaf"
    return ""


def q12_secure_sum_used(evidence: Evidence) -> Iterator[Record]:
    """Enough survivors, a quorum of commits on their one list, commits as in the transcript."""
    for round_, state in evidence.rounds.items():
        attempt = released(state)
        if state.plan.secagg is None:
            reason = "not used: the plan says open, every update could be read by the coordinator"
            yield _record("12", round_, Result.PASS, (state.plan_at,), reason)
        elif attempt is not None and attempt.aggregate is not None:
            _, result, reason = transcript_of(evidence, round_, state)
            said = attempt.aggregate
            what = f"{said.survivors} survivors, threshold {said.t}; {reason}"
            yield _record("12", round_, result, _leaves(attempt), what)
        else:
            reason = "nothing was opened"
            result = Result.PASS if ended(state) or state.attempt else Result.UNKNOWN
            yield _record("12", round_, result, (state.plan_at,), reason)


_MICRO = 1_000_000


def q13_norm_bounds(evidence: Evidence) -> Iterator[Record]:
    """The norm of the mean is within the plan's clip norm; a node's own clip is a claim."""
    for round_, state in evidence.rounds.items():
        attempt, plan = released(state), evidence.plan_of(state)
        if attempt is None or attempt.aggregate is None:
            continue
        said, leaves = attempt.aggregate, (attempt.aggregate_at or state.plan_at,)
        if plan is None or said.norm_micro is None:
            yield _record("13", round_, Result.UNKNOWN, leaves, "no norm was published")
        elif not plan.trains_in(state.plan.index):
            yield _record("13", round_, Result.PASS, leaves, "the round only evaluated")
        elif plan.mode in {"record-local", "record-distributed", "institution"}:
            reason = (
                f"the mean is {said.norm_micro / _MICRO:.6g} long, noise included:"
                " a bound on it says nothing; the clip is part of the privacy claim"
            )
            yield _record("13", round_, Result.UNKNOWN, leaves, reason)
        elif (most := _bound(evidence, state.plan_at, plan)) is None:
            reason = f"the mean is {said.norm_micro / _MICRO:.6g} long; nothing sets a bound"
            yield _record("13", round_, Result.UNKNOWN, leaves, reason)
        else:
            # Rounding moves each coordinate by less than one step of its block, so allow 0.1 %.
            holds = said.norm_micro <= math.ceil(most * 1.001 * _MICRO)
            reason = f"the mean is {said.norm_micro / _MICRO:.6g} long, the clip norm {most:g}"
            result = Result.PASS if holds else Result.FAIL
            yield _record("13", round_, result, leaves, reason)


def _bound(evidence: Evidence, at: int, plan: Plan) -> float | None:
    """The tighter of what the plan clips to and what the policy allows and wants checked."""
    policy, known = evidence.policy_at(at), [plan.vector.clip_norm]
    if policy is not None and policy.updates.norm_check == "post-aggregate":
        known.append(policy.updates.clip_norm_max_micro / _MICRO)
    return min((norm for norm in known if norm is not None), default=None)


def q21_what_did_not_run(evidence: Evidence) -> Iterator[Record]:
    """Rounds with a plan and without a start. A request refused before a plan leaves nothing."""
    idle = [(r, s) for r, s in evidence.rounds.items() if not s.attempts]
    for round_, state in idle:
        over = state.ended is not None
        reason = f"opened, never started; {len(state.declines)} declined"
        result = Result.PASS if over else Result.UNKNOWN
        yield _record("21", round_, result, (state.plan_at,), reason)
    if not idle:
        what = f"each of {len(evidence.rounds)} rounds started"
        yield _record("21", None, Result.PASS, (), what)


def _late(evidence: Evidence, taken: Taken, round_: RoundId, number: int) -> bool:
    """Whether an objection came after the window that the policy gives, counted from the sum."""
    attempt, policy = evidence.rounds[round_].started(number), evidence.policy_at(taken.index)
    if policy is None or attempt is None or attempt.aggregate_at is None:
        return False
    opened = evidence.taken[attempt.aggregate_at].statement.time
    window = timedelta(hours=policy.audit.objection_window_hours)
    return taken.statement.time > opened + window


def q22_objections(evidence: Evidence) -> Iterator[Record]:
    """Every objection is resolved, and no round goes on from a model whose objection was upheld."""
    answers = {
        Digest(taken.said.objection): taken
        for taken in evidence.of(ObjectionResolved)
        if isinstance(taken.said, ObjectionResolved)
    }
    used = {state.plan.model_in for state in evidence.rounds.values()}
    found = False
    for taken in evidence.of(RoundObjection):
        said = taken.said
        if not isinstance(said, RoundObjection):
            continue
        found = True
        _, round_ = parse_round_subject(taken.statement.subject)
        answer = answers.get(taken.leaf.hash)
        what = f"{said.node} objects: {said.code}"
        attempt = evidence.rounds[round_].started(said.attempt)
        out = attempt.aggregate.model_out if attempt and attempt.aggregate else None
        if answer is None and _late(evidence, taken, round_, said.attempt):
            reason = f"{what}; after the policy's window for objections, so nobody has to answer"
            yield _record("22", round_, Result.PASS, (taken.index,), reason)
        elif answer is None:
            yield _record("22", round_, Result.UNKNOWN, (taken.index,), f"{what}; not resolved")
        elif not isinstance(answer.said, ObjectionResolved):
            raise TypeError("answers are resolutions")
        elif answer.said.outcome == "upheld" and out in used:
            reason = f"{what}; upheld, and a round went on from that model"
            yield _record("22", round_, Result.FAIL, (taken.index, answer.index), reason)
        else:
            reason = f"{what}; {answer.said.outcome}: {answer.said.code}"
            yield _record("22", round_, Result.PASS, (taken.index, answer.index), reason)
    if not found:
        yield _record("22", None, Result.PASS, (), "nobody objected")
