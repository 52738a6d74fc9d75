"""Relays the signed messages of a secure sum. The coordinator stores, lists and counts them.

One transaction takes a message: look at the phase and at what came before, check, keep, decide. A
second message of the same kind from the same node is kept out unless it is the same; then the
answer is the one of the first time.
"""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias

import grpc

from coordinator.clock import Clock
from coordinator.ledger import Ledger, Tx
from coordinator.rounds import advance, why_now
from coordinator.secure_sum import ABORT, Sum, accept_message, make_list, read_message, sender_of
from coordinator.services.caller import Callers
from protocols.errors import (
    EquivocationError,
    MalformedMessageError,
    NotFoundError,
    NotListedError,
)
from protocols.gen import rounds_pb2, secure_sum_pb2, secure_sum_pb2_grpc
from protocols.identifiers import NodeId, RoundId
from protocols.rounds import ComplaintUpheld, Step
from protocols.wire import phase_to_view, read_round

Context: TypeAlias = grpc.aio.ServicerContext


class SecureSumService(secure_sum_pb2_grpc.SecureSumServicer):
    """Answers the nodes of a secure round."""

    def __init__(self, *, callers: Callers, ledger: Ledger, clock: Clock) -> None:
        self._callers = callers
        self._ledger = ledger
        self._clock = clock

    async def Post(
        self, request: secure_sum_pb2.PostRequest, context: Context
    ) -> rounds_pb2.RoundReply:
        """Take a signed message."""
        node = await self._callers.node(context)
        round_id, now = read_round(request.round), self._clock.now()
        answer = await self._ledger.run(
            f"secure_{request.kind}"[:40] if request.kind.isidentifier() else "secure_message",
            lambda tx: post(tx, round_id, node, request.kind, request.body, now),
        )
        return rounds_pb2.RoundReply(phase=phase_to_view(answer.phase), why=answer.why)

    async def Get(
        self, request: secure_sum_pb2.GetRequest, context: Context
    ) -> secure_sum_pb2.GetResponse:
        """Give a list."""
        node = await self._callers.node(context)
        round_id = read_round(request.round)
        if request.attempt < 1:
            raise MalformedMessageError("attempts count from 1")

        def make(tx: Tx) -> bytes:
            row = tx.round(round_id)
            if row is None:
                raise NotFoundError(f"there is no round {round_id}")
            plan = tx.run(round_id.run).plan
            return make_list(Sum.of(tx, row, plan, request.attempt), request.kind, node)

        body = await self._ledger.read("secure_list", make)
        return secure_sum_pb2.GetResponse(body=body)


def post(tx: Tx, round_id: RoundId, node: NodeId, kind: str, body: bytes, now: datetime) -> Step:
    """Take one signed message of ``node``.

    Raises:
        MalformedMessageError: no message of that kind.
        NotListedError: signed by somebody else than the caller.
        EquivocationError: the node sent another message of this kind in this attempt.
        WrongPhaseError, NotReadyError, IntegrityError: see ``accept_message``.
    """
    message = read_message(kind, body)
    sender, attempt = sender_of(message)
    if sender != node:
        raise NotListedError(f"{node} handed in a message of {sender}")
    row = tx.lock_round(round_id)
    kept = tx.messages(round_id, attempt, kind).get(node)
    if kept not in (None, body):
        raise EquivocationError(
            f"{node} sent a second, different {kind} in attempt {attempt} of round {round_id}"
        )
    if kept is not None and kind != ABORT:  # it was counted when it was kept
        return Step(row.phase, why_now(row, now))
    summed = Sum.of(tx, row, tx.run(round_id.run).plan, attempt)
    event = accept_message(summed, kind, message)
    if kept is None:
        tx.add_message(round_id, attempt, kind, node, body, now=now)
        if event is None:  # nothing else tells those who wait for it
            tx.note(
                f"{node} sent its {kind} of attempt {attempt}",
                now=now,
                round_=round_id,
                phase=type(row.phase).__name__,
                node=node,
            )
    if event is None:
        return Step(row.phase, why_now(row, now))
    note = f"{node} complained" if isinstance(event, ComplaintUpheld) else ""
    return advance(tx, round_id, event, now, transaction=f"secure_{kind}", node=node, note=note)
