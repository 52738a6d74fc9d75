"""The control path of a round: what node agents ask and say.

Keeps nothing between calls that the ledger does not have: any coordinator may answer any call, and
a crash loses nothing that was acknowledged. Every call may be repeated. Domain errors pass through;
the error interceptor alone makes them statuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias

import grpc

from coordinator.clock import Clock
from coordinator.leaves import joined_by_log, log_late, say_closed, take_leaf
from coordinator.ledger import Ledger, RoundRow, RunRow, Tx
from coordinator.privacy import reserve
from coordinator.rounds import advance, why_now
from coordinator.services.board import Board
from coordinator.services.caller import Callers
from coordinator.services.progress import ProgressBook, read_report
from coordinator.trust_repository import TrustRepository
from policies.consortium import ConsortiumPolicy
from policies.privacy.caps import Cap
from protocols.errors import (
    MalformedMessageError,
    ModelDisagreementError,
    NotListedError,
    NotPermittedError,
    PlanRefusedError,
    WrongPhaseError,
)
from protocols.gen import rounds_pb2, rounds_pb2_grpc
from protocols.identifiers import Digest, NodeId, RoundId, parse_run_id
from protocols.rounds import (
    DeclineArrived,
    JoinArrived,
    LeaveArrived,
    NodeEvent,
    ReadyArrived,
    Released,
    Step,
)
from protocols.rounds_codec import to_ms
from protocols.tlog.kinds import (
    Predicate,
    RoundConfirm,
    RoundDecline,
    RoundJoin,
    RoundObjection,
)
from protocols.wire import phase_to_view, read_digest, read_round, read_text

MAX_WAIT_MS: Final = 30_000
_CODE_LIMIT: Final = 80  # characters of a rule id or a code
Context: TypeAlias = grpc.aio.ServicerContext


class RoundsService(rounds_pb2_grpc.RoundsServicer):
    """Answers node agents."""

    def __init__(
        self,
        *,
        callers: Callers,
        ledger: Ledger,
        clock: Clock,
        caps: Sequence[Cap] = (),
        trust: TrustRepository | None = None,
    ) -> None:
        self._trust = trust
        self._callers = callers
        self._caps = caps
        self._ledger = ledger
        self._clock = clock
        self._board = Board(ledger, clock)
        self._progress = ProgressBook(ledger)

    async def Sync(
        self, request: rounds_pb2.SyncRequest, context: Context
    ) -> rounds_pb2.SyncResponse:
        """What the caller's runs are doing: at once if there is news, else when there is."""
        node = await self._callers.node(context)
        self._progress.add(node, read_report(request, self._clock.now()))
        wait_s = min(request.wait_ms, MAX_WAIT_MS) / 1000
        version, posted = await self._board.wait(node, request.seen, wait_s)
        return rounds_pb2.SyncResponse(
            version=version,
            now_ms=to_ms(self._clock.now()),
            runs=[entry.view for entry in posted],
        )

    async def GetPlan(
        self, request: rounds_pb2.GetPlanRequest, context: Context
    ) -> rounds_pb2.GetPlanResponse:
        """The plan of a run, for its roster and for operators."""
        caller = await self._callers.any(context)
        run_id = parse_run_id(request.run)
        run = await self._ledger.read("plan", lambda tx: tx.run(run_id))
        if caller.role == "node" and caller.name not in run.plan.roster:
            raise NotListedError(f"{caller.name} is not on the roster of run {run_id}")
        return rounds_pb2.GetPlanResponse(plan=run.plan_bytes)

    async def Join(
        self, request: rounds_pb2.JoinRequest, context: Context
    ) -> rounds_pb2.RoundReply:
        """Take part in a round under the plan and from the model that the caller names."""
        node = await self._callers.node(context)
        round_id = read_round(request.round)
        terms = Terms(plan=read_digest(request.plan_digest), model=read_digest(request.model_root))
        says = {"model_in": request.model_root}
        signed = Act(RoundJoin, request.leaf, says)
        return await self._happened("join", round_id, JoinArrived(node), terms=terms, signed=signed)

    async def Decline(
        self, request: rounds_pb2.DeclineRequest, context: Context
    ) -> rounds_pb2.RoundReply:
        """Not take part, with the rule that says so."""
        node = await self._callers.node(context)
        round_id = read_round(request.round)
        note = _because(node, "declined", request.rule, request.reason)
        signed = Act(RoundDecline, request.leaf, {})
        return await self._happened(
            "decline", round_id, DeclineArrived(node), note=note, signed=signed
        )

    async def Ready(
        self, request: rounds_pb2.ReadyRequest, context: Context
    ) -> rounds_pb2.RoundReply:
        """Have an update to contribute, made from the model that the caller names."""
        node = await self._callers.node(context)
        round_id = read_round(request.round)
        terms = Terms(plan=None, model=read_digest(request.model_root))
        return await self._happened("ready", round_id, ReadyArrived(node), terms=terms)

    async def Leave(
        self, request: rounds_pb2.LeaveRequest, context: Context
    ) -> rounds_pb2.RoundReply:
        """Give up on a round that the caller joined."""
        node = await self._callers.node(context)
        round_id = read_round(request.round)
        note = _because(node, "left", request.code, request.reason)
        return await self._happened("leave", round_id, LeaveArrived(node), note=note)

    async def Confirm(
        self, request: rounds_pb2.ConfirmRequest, context: Context
    ) -> rounds_pb2.RoundReply:
        """Say which model the caller computed from a released sum, or why it objects."""
        node = await self._callers.node(context)
        verdict = read_verdict(request)
        round_id, now = read_round(request.round), self._clock.now()
        row, why = await self._ledger.run(
            "confirm", lambda tx: confirm(tx, round_id, node, verdict, now, leaf=request.leaf)
        )
        return rounds_pb2.RoundReply(phase=phase_to_view(row.phase), why=why)

    async def _happened(
        self,
        transaction: str,
        round_id: RoundId,
        event: NodeEvent,
        *,
        terms: Terms | None = None,
        note: str = "",
        signed: Act | None = None,
    ) -> rounds_pb2.RoundReply:
        now = self._clock.now()
        policy = self._trust.policy() if self._trust is not None else None
        try:
            answer = await self._ledger.run(
                transaction,
                lambda tx: take(
                    tx,
                    transaction,
                    round_id,
                    event,
                    now,
                    terms=terms,
                    note=note,
                    caps=self._caps,
                    policy=policy,
                    signed=signed,
                ),
            )
        except WrongPhaseError:
            if signed is not None and signed.leaf and self._ledger.logs:
                await log_late(self._ledger, event.node, signed.leaf)
            raise
        return rounds_pb2.RoundReply(phase=phase_to_view(answer.phase), why=answer.why)


def _because(node: NodeId, did: str, code: str, reason: str) -> str:
    code = read_text(code, what="a code", limit=_CODE_LIMIT)
    if not code:
        raise MalformedMessageError(f"a node that {did} says by which rule or code")
    reason = read_text(reason, what="a reason")
    return f"{node} {did} ({code}): {reason}" if reason else f"{node} {did} ({code})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a node says it read and starts from."""

    plan: Digest | None  # None: the message does not say
    model: Digest


@dataclass(frozen=True, slots=True)
class Act:
    """What a node signed about its message."""

    kind: type[Predicate]
    leaf: bytes  # empty: nothing
    says: Mapping[str, object]


def take(
    tx: Tx,
    transaction: str,
    round_id: RoundId,
    event: NodeEvent,
    now: datetime,
    *,
    terms: Terms | None = None,
    note: str = "",
    caps: Sequence[Cap] = (),
    policy: ConsortiumPolicy | None = None,
    signed: Act | None = None,
) -> Step:
    """Take one message of a node: check who and under which terms, decide, record.

    One transaction: a node that is suspended, or a round that closes, between the check and the
    record would otherwise be let in (protocols/spec/round.md, section 3).

    Raises:
        NotFoundError: no such round.
        NotPermittedError: the node is not active.
        NotListedError: it is not on the plan's roster.
        PlanRefusedError: it read another plan.
        ModelDisagreementError: it starts from another model.
        WrongPhaseError, EquivocationError: see ``step``.
    """
    row = tx.lock_round(round_id)
    run = tx.run(round_id.run)
    _check_member(tx, run, event.node)
    if isinstance(event, ReadyArrived) and run.plan.secagg is not None:
        raise PlanRefusedError(
            f"run {run.run} has a secure sum: READY must be signed and handed in to it",
            rule="secagg.required",
        )
    if terms is not None:
        check_terms(run, row, event.node, terms)
    if signed is not None:
        take_leaf(
            tx,
            signed.leaf,
            node=event.node,
            round_id=round_id,
            kind=signed.kind,
            **signed.says,
        )
    answer = advance(
        tx, round_id, event, now, transaction=transaction, node=event.node, note=note, row=row
    )
    if isinstance(event, JoinArrived):  # refused, nothing of the above is written
        reserve(tx, run, row, event.node, caps, now, policy)
    return answer


def _check_member(tx: Tx, run: RunRow, node: NodeId) -> None:
    if node not in run.plan.roster:
        raise NotListedError(f"{node} is not on the roster of run {run.run}")
    known = tx.node(node)
    if known is None or known.status != "active":
        raise NotPermittedError(f"{node} is not an active member of this federation")


def check_terms(run: RunRow, row: RoundRow, node: NodeId, terms: Terms) -> None:
    """Compare what a node says with the round.

    Raises:
        PlanRefusedError, ModelDisagreementError: the sentence names both digests.
    """
    if terms.plan is not None and terms.plan != run.plan_digest:
        raise PlanRefusedError(
            f"{node} read plan {terms.plan[:12]}…, run {run.run} is under {run.plan_digest[:12]}…",
            rule="plan.digest",
        )
    if terms.model != row.start_root:
        raise ModelDisagreementError(
            f"{node} starts from model {terms.model[:12]}…, round {row.round} from"
            f" {row.start_root[:12]}…"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a node says about the result of a round."""

    model_root: str  # hex; "": it computed none
    objection: str  # a code; "": none
    detail: str


def read_verdict(request: rounds_pb2.ConfirmRequest) -> Verdict:
    """Raises: MalformedMessageError: neither a model nor an objection, or text that is none."""
    objection = read_text(request.objection, what="an objection", limit=_CODE_LIMIT)
    if not request.model_root and not objection:
        raise MalformedMessageError("a node confirms a model root or objects with a code")
    return Verdict(
        model_root=read_digest(request.model_root) if request.model_root else "",
        objection=objection,
        detail=read_text(request.detail, what="a detail"),
    )


def confirm(
    tx: Tx, round_id: RoundId, node: NodeId, verdict: Verdict, now: datetime, *, leaf: bytes = b""
) -> tuple[RoundRow, str]:
    """Keep a node's verdict on a released sum, as evidence; a disagreement is shown to everybody.

    A model root that is not the coordinator's is kept as an objection, whatever the node calls it.

    Raises:
        NotFoundError, NotListedError, NotPermittedError: see ``take``.
        WrongPhaseError: no sum was opened.
        EquivocationError: the node said something else before.
    """
    row = tx.lock_round(round_id)
    run = tx.run(round_id.run)
    _check_member(tx, run, node)
    opened = row.phase.opened if isinstance(row.phase, Released) else None
    if opened is None:
        name = type(row.phase).__name__
        raise WrongPhaseError(f"round {round_id} is {name}: there is no result to confirm")
    objection, detail = verdict.objection, verdict.detail
    if not objection and verdict.model_root != opened.model_root:
        objection = ModelDisagreementError.code
    if objection:
        computed = f"computed {verdict.model_root[:12]}…" if verdict.model_root else "has no model"
        said = f"{node} objects ({objection}): it {computed}, ours is {opened.model_root[:12]}…"
        said = f"{said}; {detail}" if detail else said
    else:
        said = f"{node} computed the same model"
    if tx.logs and node in joined_by_log(tx, round_id):  # others may say it, and sign nothing
        kind = RoundObjection if objection else RoundConfirm
        take_leaf(tx, leaf, node=node, round_id=round_id, kind=kind)
        say_closed(tx, run.plan, round_id, now)
    if tx.confirm(round_id, node, verdict.model_root, objection, detail, now=now):
        tx.note(said, now=now, round_=round_id, phase="Released", node=node)
        return row, said
    return row, why_now(row, now)
