"""What the leaves of one round add up to, and which leaf may follow: a pure fold.

    plan -> join | decline ... -> start(1) -> commit ... -> survivors -> aggregate -> confirm ...
                                     |                                     |    |
                                     '------------- aborted ---------------'    '-> closed
                                        (then start(2), unless burned)

``after`` takes the state of a round and a leaf, and gives the next state or refuses. Sequencer,
node and auditor use the same function. The state holds what the rules ask for and not the leaves:
coordinator and nodes keep it in memory for every round of the log. A join or an update that its
node signed in time and that reached the log too late stands there without effect: a signer's
chain has no holes, so it must stand somewhere. Normative text: protocols/spec/log.md, section 12.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from policies.audit.packed import Packed, shared
from protocols.errors import IntegrityError
from protocols.identifiers import Digest
from protocols.tlog.kinds import (
    Dropped,
    Predicate,
    RoundAborted,
    RoundAggregate,
    RoundClosed,
    RoundConfirm,
    RoundDecline,
    RoundJoin,
    RoundObjection,
    RoundPlan,
    RoundStart,
    RoundSurvivors,
    UpdateCommit,
)


class LeafRefusedError(IntegrityError):
    """A leaf is in the log that must not be there, or not there."""

    code = "leaf_refused"
    advice = "Keep the log as it is: it is the evidence."

    def __init__(self, rule: str, why: str | None = None) -> None:
        """The rule and a sentence; or, as it came over the wire, both in one text."""
        text = rule if why is None else f"{rule}: {why}"
        super().__init__(text)
        self.rule, _, self.why = text.partition(": ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """An ``update.commit`` in the log. Its two digests are kept as 32 bytes each: there is one of
    these for each node and round, in memory."""

    index: int
    leaf_hash: bytes
    ctx: str | None  # None: an open sum
    root: bytes  # of the upload
    length: int  # of the upload, bytes

    @property
    def leaf(self) -> Digest:
        """Hash of the leaf, as other leaves name it."""
        return Digest(self.leaf_hash.hex())

    @property
    def upload_root(self) -> str:
        """Root of the upload, as survivor list and transcript name it."""
        return self.root.hex()


class Verdict(StrEnum):
    """What a node says about a result."""

    CONFIRM = "confirm"
    OBJECTION = "objection"


_INDEX: Final = struct.Struct("<Q")
_COMMITTED: Final = struct.Struct("<QQ32s32s")


def _committed(
    ctx: str | None, index: int, length: int, leaf_hash: bytes, root: bytes
) -> Committed:
    return Committed(index=index, leaf_hash=leaf_hash, ctx=ctx, root=root, length=length)


def _pack_commits(commits: Mapping[str, Committed]) -> Mapping[str, Committed]:
    contexts = {found.ctx for found in commits.values()}
    if len(contexts) > 1:  # of several survivor lists: a coordinator that says two things
        return commits
    return Packed(
        _COMMITTED,
        partial(_committed, next(iter(contexts), None)),
        {name: (c.index, c.length, c.leaf_hash, c.root) for name, c in commits.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptState:
    """One attempt, from its ``round.start`` on."""

    number: int
    start: int  # index of round.start
    ready: tuple[str, ...]
    ctx_deal: str | None  # None: an open sum
    commits: Mapping[str, Committed] = field(default_factory=dict)
    survivors_at: int | None = None  # index of round.survivors
    survivors: tuple[str, ...] | None = None  # ascending; their uploads are those of ``commits``
    dropped: tuple[Dropped, ...] = ()  # of those who joined, as the survivor list says
    aggregate_at: int | None = None
    aggregate: RoundAggregate | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    closed_at: int | None = None
    aborted: RoundAborted | None = None

    @property
    def over(self) -> bool:
        """Whether its terminal leaf is in the log."""
        return self.closed_at is not None or self.aborted is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """One round, from its ``round.plan`` on."""

    plan_at: int  # index of round.plan
    plan_leaf: Digest
    plan_sha256: Digest
    plan: RoundPlan
    joins: Mapping[str, int] = field(default_factory=dict)  # index of each round.join
    declines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the rules named
    attempts: tuple[AttemptState, ...] = ()
    ended: RoundAborted | None = None  # before any attempt, or burned: nothing may follow
    late: Mapping[str, int] = field(default_factory=dict)  # index of each leaf that came too late

    @property
    def attempt(self) -> AttemptState | None:
        """The latest."""
        return self.attempts[-1] if self.attempts else None

    @property
    def roster(self) -> frozenset[str] | None:
        """Who may join; None where the plan is a blob."""
        return None if self.plan.plan is None else frozenset(self.plan.plan.get("roster", ()))

    def started(self, number: int) -> AttemptState | None:
        """The attempt of that number, if it began."""
        return next((attempt for attempt in self.attempts if attempt.number == number), None)


def opened(
    plan: RoundPlan, *, index: int, leaf: Digest, digest: Digest, before: RoundState | None = None
) -> RoundState:
    """The state that a ``round.plan`` begins.

    Args:
        plan: the leaf's fields.
        index, leaf: where it stands, and its hash.
        digest: of the plan itself.
        before: the run's round before, if it is in the log: what both plan leaves say alike is
            kept once, and a run says the same plan and request in each of its rounds.
    """
    if before is not None and before.plan_sha256 == digest:
        same = {
            name: getattr(before.plan, name)
            for name in ("plan", "request", "tuf", "code", "secagg")
            if getattr(before.plan, name) == getattr(plan, name)
        }
        plan = plan.model_copy(update=same)
    return RoundState(plan_at=index, plan_leaf=leaf, plan_sha256=digest, plan=plan)


def after(state: RoundState, said: Predicate, *, index: int, leaf: Digest) -> RoundState:
    """The round with one more leaf.

    Args:
        state: of the round, before the leaf.
        said: the leaf's fields; that its signer may say them is known.
        index, leaf: where it stands, and its hash.

    Raises:
        LeafRefusedError: with the rule that it breaks.
    """
    match said:
        case RoundPlan():
            raise LeafRefusedError("log.second_plan", "the round has a plan already")
        case RoundJoin():
            return _join(state, said, index)
        case RoundDecline():
            return _decline(state, said)
        case RoundStart():
            return _start(state, said, index)
        case UpdateCommit():
            return _commit(state, said, index, leaf)
        case RoundSurvivors():
            return _survivors(state, said, index)
        case RoundAggregate():
            return _aggregate(state, said, index)
        case RoundConfirm() | RoundObjection():
            return _verdict(state, said)
        case RoundClosed():
            return _closed(state, said, index)
        case RoundAborted():
            return _aborted(state, said)
        case _:
            raise LeafRefusedError("log.kind", f"{said.KIND} is not about a round")


def _need(holds: bool, rule: str, why: str) -> None:
    if not holds:
        raise LeafRefusedError(rule, why)


def _same_plan(state: RoundState, said: RoundJoin | RoundDecline) -> None:
    _need(
        said.plan_sha256 == state.plan_sha256,
        "log.plan",
        f"{said.node} answers another plan than the round's",
    )
    roster = state.roster
    _need(roster is None or said.node in roster, "log.roster", f"{said.node} is not on the roster")
    _need(
        said.node not in state.joins and said.node not in state.declines,
        "log.second_answer",
        f"{said.node} has answered the plan before",
    )


def _too_late(state: RoundState, said: RoundJoin | UpdateCommit, index: int) -> RoundState:
    key = f"{said.KIND} {said.node} {getattr(said, 'attempt', 0)}"
    _need(key not in state.late, "log.second_late", f"{said.node} was late with this before")
    return replace(state, late=_with(state.late, key, index))


def _join(state: RoundState, said: RoundJoin, index: int) -> RoundState:
    _same_plan(state, said)
    if state.attempts or state.ended is not None:
        return _too_late(state, said, index)
    _need(
        said.model_in == state.plan.model_in,
        "log.model_in",
        f"{said.node} joins from another model than the plan leaf names",
    )
    return replace(state, joins=_with(state.joins, said.node, index))


def _decline(state: RoundState, said: RoundDecline) -> RoundState:
    _same_plan(state, said)
    return replace(state, declines=_with(state.declines, said.node, said.rules))


def _start(state: RoundState, said: RoundStart, index: int) -> RoundState:
    last = state.attempt
    _need(state.ended is None, "log.phase", "the round is over")
    if last is not None:  # an attempt that never got its keys together leaves no trace
        _need(
            said.attempt > last.number,
            "log.second_start",
            f"attempt {said.attempt} begins after attempt {last.number}",
        )
        _need(
            last.aborted is not None,
            "log.second_start",
            f"attempt {last.number} has no terminal leaf",
        )
    _need(
        set(said.ready) <= state.joins.keys(), "log.ready", "a ready node has not joined the round"
    )
    _need(
        (said.ctx_deal is None) == (state.plan.secagg is None),
        "log.ctx",
        "ctx_deal is given exactly in a secure sum",
    )
    begun = AttemptState(
        number=said.attempt, start=index, ready=shared(said.ready), ctx_deal=said.ctx_deal
    )
    return replace(state, attempts=(*state.attempts, begun))


def _current(state: RoundState, number: int, what: str) -> AttemptState:
    found = state.started(number)
    if found is None:
        raise LeafRefusedError("log.phase", f"{what} of attempt {number}, which has not begun")
    return found


def _put(state: RoundState, attempt: AttemptState) -> RoundState:
    changed = (attempt if each.number == attempt.number else each for each in state.attempts)
    return replace(state, attempts=tuple(changed))


def _put_away(state: RoundState, attempt: AttemptState) -> RoundState:
    """An attempt that is over: what does not change any more takes less room."""
    joins = Packed(_INDEX, int, {name: (at,) for name, at in state.joins.items()})
    packed = replace(attempt, commits=_pack_commits(attempt.commits))
    return _put(replace(state, joins=joins), packed)


def _commit(state: RoundState, said: UpdateCommit, index: int, leaf: Digest) -> RoundState:
    attempt = _current(state, said.attempt, "an update")
    _need(said.node in attempt.ready, "log.ready", f"{said.node} is not in the ready set")
    _need(said.node not in attempt.commits, "log.second_commit", f"{said.node} committed before")
    secure = state.plan.secagg is not None
    _need(
        (said.ctx is not None) == secure and (said.deals_sha256 is not None) == secure,
        "log.ctx",
        "ctx and deals are given exactly in a secure sum",
    )
    if attempt.survivors is not None or attempt.over:
        return _too_late(state, said, index)
    found = Committed(
        index=index,
        leaf_hash=bytes.fromhex(leaf),
        ctx=said.ctx,
        root=bytes.fromhex(said.upload_root),
        length=said.bytes,
    )
    return _put(state, replace(attempt, commits=_with(attempt.commits, said.node, found)))


def _survivors(state: RoundState, said: RoundSurvivors, index: int) -> RoundState:
    attempt = _current(state, said.attempt, "a survivor list")
    _need(
        attempt.survivors is None,
        "log.second_survivors",
        f"a second survivor list of attempt {said.attempt}",
    )
    _need(not attempt.over, "log.phase", f"attempt {said.attempt} is over")
    for survivor in said.survivors:
        found = attempt.commits.get(survivor.node)
        _need(
            found is not None
            and (found.index, found.upload_root) == (survivor.leaf, survivor.upload_root)
            and found.ctx == said.ctx,
            "log.survivors",
            f"{survivor.node} survives without that update.commit in the log",
        )
    listed = shared(tuple(survivor.node for survivor in said.survivors))
    nodes = set(listed)
    dropped = {lost.node for lost in said.dropped}
    _need(
        not nodes & dropped and nodes | dropped == state.joins.keys(),
        "log.dropped",
        "survivors and dropped are not together those who joined",
    )
    return _put(state, replace(attempt, survivors=listed, dropped=said.dropped, survivors_at=index))


def _aggregate(state: RoundState, said: RoundAggregate, index: int) -> RoundState:
    attempt = _current(state, said.attempt, "an aggregate")
    if attempt.survivors is None or attempt.aborted is not None:
        raise LeafRefusedError("log.phase", "an aggregate without a survivor list that stands")
    _need(
        attempt.aggregate is None,
        "log.second_aggregate",
        f"a second result of attempt {said.attempt}",
    )
    _need(
        said.included == attempt.survivors,
        "log.included",
        "the sum is over others than the survivor list says",
    )
    _need(said.dropped == attempt.dropped, "log.dropped", "the dropped nodes changed")
    secure = state.plan.secagg is not None
    given = (said.transcript_sha256, said.transcript_blob, said.commit_certificate_sha256)
    _need(
        all((item is not None) == secure for item in given),
        "log.transcript",
        "transcript and certificate are given exactly in a secure sum",
    )
    if state.plan.secagg is not None:
        _need(said.t == state.plan.secagg.t, "log.threshold", "another threshold than the plan's")
        _need(
            said.survivors >= state.plan.secagg.m_min,
            "log.threshold",
            f"a sum over {said.survivors}, the plan asks for {state.plan.secagg.m_min}",
        )
    kept = said.model_copy(update={"included": attempt.survivors})  # the same, kept once
    return _put(state, replace(attempt, aggregate=kept, aggregate_at=index))


def _verdict(state: RoundState, said: RoundConfirm | RoundObjection) -> RoundState:
    attempt = _current(state, said.attempt, "a verdict")
    if attempt.aggregate is None:
        raise LeafRefusedError("log.phase", f"a verdict of {said.node} before the result")
    _need(said.node in state.joins, "log.roster", f"{said.node} has not joined the round")
    _need(said.node not in attempt.verdicts, "log.second_verdict", f"{said.node} judged it before")
    verdict = Verdict.OBJECTION
    if isinstance(said, RoundConfirm):
        verdict, own = Verdict.CONFIRM, attempt.commits.get(said.node)
        _need(
            said.model_out == attempt.aggregate.model_out,
            "log.model_out",
            f"{said.node} confirms another model than the result",
        )
        _need(
            said.commit == (own.leaf if own else None),
            "log.own_commit",
            f"{said.node} confirms another update.commit than its own",
        )
    return _put(state, replace(attempt, verdicts=_with(attempt.verdicts, said.node, verdict)))


def _closed(state: RoundState, said: RoundClosed, index: int) -> RoundState:
    attempt = _current(state, said.attempt, "an end")
    _need(attempt.aggregate is not None, "log.phase", "an attempt is closed without a result")
    _need(not attempt.over, "log.second_end", f"attempt {said.attempt} ended before")
    confirmed = {n for n, v in attempt.verdicts.items() if v is Verdict.CONFIRM}
    objected = attempt.verdicts.keys() - confirmed
    _need(
        set(said.confirmations) == confirmed and set(said.objections) == objected,
        "log.verdicts",
        "round.closed lists other verdicts than the log holds",
    )
    return _put_away(state, replace(attempt, closed_at=index))


def _aborted(state: RoundState, said: RoundAborted) -> RoundState:
    last = state.attempt
    _need(state.ended is None, "log.second_end", "the round ended before")
    if said.attempt == 0:
        _need(last is None or last.over, "log.phase", "an attempt began: which one ended?")
        return replace(state, ended=said)
    attempt = _current(state, said.attempt, "an end")
    _need(attempt is last and not attempt.over, "log.second_end", "that attempt ended before")
    _need(
        attempt.aggregate is None, "log.phase", "an attempt is aborted whose result is in the log"
    )
    if said.outcome == "aborted" and attempt.commits and state.plan.secagg is not None:
        _need(
            said.certificate_sha256 is not None,
            "log.abort_certificate",
            "aborted after an update was handed in, without a quorum of signed aborts",
        )
    changed = _put_away(state, replace(attempt, aborted=said))
    return replace(changed, ended=said) if said.outcome == "burned" else changed


def _with(table: Mapping[str, Any], key: str, value: Any) -> Mapping[str, Any]:
    return MappingProxyType({**table, key: value})
