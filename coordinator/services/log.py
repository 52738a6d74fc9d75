"""The log over gRPC, for nodes behind NAT: pages of witnessed leaves, proofs, and the witness pull.

Streams keep nothing that a reconnect does not bring back. A witness is known by the certificate it
calls with; what it says counts only with its signature.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Final, TypeAlias

import grpc

from coordinator.clock import Clock
from coordinator.ledger import Ledger, Tx
from coordinator.log_hub import LogHub, need_head, need_leader
from coordinator.services.caller import Callers
from policies.audit.replay import LeafRefusedError, peek
from protocols.errors import MalformedMessageError, NotFoundError
from protocols.gen import log_pb2, log_pb2_grpc
from protocols.identifiers import NodeId
from protocols.tlog.kinds import PEOPLE, Role
from protocols.wire import read_bytes

Context: TypeAlias = grpc.aio.ServicerContext
PAGE: Final = 256  # entries in one message at most
PAGE_BYTES: Final = 2 * 2**20
MAX_SUBMIT: Final = 64
LOOK_S: Final = 20.0
KEPT_PAGES: Final = 2


class LogService(log_pb2_grpc.LogServicer):
    """Shows the log, and takes leaves of nodes that came late."""

    def __init__(self, *, callers: Callers, ledger: Ledger, hub: LogHub) -> None:
        self._callers = callers
        self._ledger = ledger
        self._hub = hub
        self._read: dict[tuple[int, int], asyncio.Task[log_pb2.LogPage]] = {}

    async def Follow(
        self, request: log_pb2.FollowRequest, context: Context
    ) -> AsyncIterator[log_pb2.LogPage]:
        """Witnessed checkpoints with their leaves, as they come."""
        at = int(request.size)
        await self._callers.reader(context)
        while True:
            need_head(self._hub)
            if not self._hub.goes_beyond(at):
                await self._hub.changed(LOOK_S, partial(self._hub.goes_beyond, at))
            await self._callers.reader(context)  # a stream may outlive the right to it
            head = self._hub.witnessed
            while head is not None and at < head.size:
                found = await self._page(at, min(head.size, at + PAGE))
                page = log_pb2.LogPage(first=at, entries=found.entries)
                at += len(page.entries)
                if at == head.size:
                    page.checkpoint = head.to_bytes()
                yield page

    async def _page(self, first: int, end: int) -> log_pb2.LogPage:
        """Leaves from ``first`` on, read once for all who follow from the same head."""
        task = self._read.get((first, end))
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._read_page(first, end), name="log page")
            self._read.pop((first, end), None)
            while len(self._read) >= KEPT_PAGES:
                del self._read[next(iter(self._read))]
            self._read[first, end] = task
        return await asyncio.shield(task)  # who stops waiting does not stop the others

    async def _read_page(self, first: int, end: int) -> log_pb2.LogPage:
        rows = await self._ledger.read("log_page", lambda tx: tx.leaves(first, end))
        page, total = log_pb2.LogPage(first=first), 0
        for row in rows:
            if page.entries and total + len(row.entry) > PAGE_BYTES:
                break
            page.entries.append(row.entry)
            total += len(row.entry)
        if not page.entries:
            raise NotFoundError(f"leaf {first} is missing in the ledger")
        return page

    async def Prove(self, request: log_pb2.ProveRequest, context: Context) -> log_pb2.ProveResponse:
        """A proof of one leaf that can be verified offline."""
        await self._callers.any(context)
        need_head(self._hub)
        name = read_bytes(request.leaf_hash, what="a leaf hash", size=32).hex()
        row = await self._ledger.read("leaf", lambda tx: tx.leaf(name))
        if row is None:
            raise NotFoundError(f"there is no leaf {name[:12]}… in the log")
        return log_pb2.ProveResponse(proof=self._hub.prove(row.index), entry=row.entry)

    async def Submit(
        self, request: log_pb2.SubmitRequest, context: Context
    ) -> log_pb2.SubmitResponse:
        """Append leaves that their node signed and could not hand in with what they speak of."""
        node = await self._callers.node(context)
        entries = list(request.entries)
        if not 1 <= len(entries) <= MAX_SUBMIT:
            raise MalformedMessageError(f"1 to {MAX_SUBMIT} leaves are handed over at once")
        for entry in entries:  # each by itself: what may stand, stands
            await self._ledger.run("late_leaf", partial(late, node=node, entry=entry))
        return log_pb2.SubmitResponse()

    async def Deliver(
        self, request: log_pb2.SubmitRequest, context: Context
    ) -> log_pb2.SubmitResponse:
        """Append what admins and institutions signed, brought by an operator."""
        await self._callers.carrier(context)
        entries = list(request.entries)
        if not 1 <= len(entries) <= MAX_SUBMIT:
            raise MalformedMessageError(f"1 to {MAX_SUBMIT} leaves are handed over at once")
        for entry in entries:
            await self._ledger.run("statement", partial(deliver, entry=entry))
        return log_pb2.SubmitResponse()


def deliver(tx: Tx, entry: bytes) -> None:
    """Append a leaf that a person signed.

    Raises:
        LeafRefusedError, MalformedMessageError, IntegrityError: it is of a kind that goes with an
            act, or may not stand.
    """
    seen = peek(entry)
    if seen is None:
        raise MalformedMessageError("no leaf of a kind that people sign")
    if seen[1].KIND not in PEOPLE:
        raise LeafRefusedError("log.people", f"{seen[1].KIND} is not for people to hand in")
    tx.append_leaf(entry)


def late(tx: Tx, node: NodeId, entry: bytes) -> None:
    """Append a leaf without the act it speaks of.

    Raises:
        MalformedMessageError, IntegrityError: it is no leaf of ``node``, or may not stand.
    """
    tx.append_leaf(entry, by=(Role.NODE, node))


class WitnessService(log_pb2_grpc.WitnessServicer):
    """Asks nodes for cosignatures over the connection that they opened."""

    def __init__(self, *, callers: Callers, hub: LogHub, clock: Clock) -> None:
        self._callers = callers
        self._hub = hub
        self._clock = clock

    def _now(self) -> int:
        return int(self._clock.now().timestamp())

    async def NextCheckpoint(
        self, answers: AsyncIterator[log_pb2.WitnessAnswer], context: Context
    ) -> AsyncIterator[log_pb2.WitnessRequest]:
        """One request at a time, each about the newest head."""
        node = await self._callers.cosigner(context)
        hub, stream = self._hub, aiter(answers)
        need_leader(hub)
        first = await anext(stream, None)
        if first is None:
            raise MalformedMessageError("a witness says first what it cosigned last")
        hub.greet(node, first.latest)
        while True:
            need_leader(hub)
            if hub.asks(node) is None:
                await hub.changed(LOOK_S, lambda: not hub.leads or hub.asks(node) is not None)
                await self._callers.cosigner(context)
                continue
            asked = hub.request_for(node)
            if asked is None:
                continue
            head, body = asked
            yield log_pb2.WitnessRequest(body=body)
            try:
                said = await anext(stream)
            except StopAsyncIteration:
                return
            if not hub.answer(node, head, said.status, said.body, now=self._now()):
                await asyncio.sleep(1.0)  # nothing changes by asking again at once
