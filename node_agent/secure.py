"""This node's part in a secure sum: what ``protocols.secagg.node`` decides, made durable and sent.

The order is always the one that module asks for: make the new state durable, then send, then the
old secrets are gone. Every step may be repeated: the same state gives the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from node_agent.journal import RoundRecord
from node_agent.rules import Refusal
from node_agent.secure_state import SecureStates
from node_agent.site import Site
from protocols.errors import (
    CorruptStateError,
    EquivocationError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    WrongPhaseError,
)
from protocols.gen import secure_sum_pb2
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.secagg import node as machine
from protocols.secagg.attempts import NO_CHECKPOINT, attempt_of
from protocols.secagg.codec import from_bytes
from protocols.secagg.context import Attempt
from protocols.secagg.messages import (
    CommitCertificate,
    DealBundle,
    Delivery,
    Go,
    Signed,
    Start,
    Survivors,
    Transcript,
)
from protocols.secagg.states import Committed, Masking, NodeState, ReadySent, Revealed, Uploaded
from protocols.secagg.verify import check_own_upload, verify_transcript
from protocols.wire import round_ref

logger = logging.getLogger(__name__)
NOTHING_SEEN: Final = Digest("0" * 64)  # there is no round log to have seen yet

_KINDS: Final[dict[str, str]] = {
    "Ready": "ready",
    "DealOk": "deal_ok",
    "Complaint": "complaint",
    "Upload": "upload",
    "Commit": "commit",
    "Abort": "abort",
    "Reveal": "reveal",
}
_LISTS: Final[dict[str, type[Any]]] = {
    "start": Start,
    "delivery": Delivery,
    "go": Go,
    "survivors": Survivors,
    "commits": CommitCertificate,
}


def check_roster(
    plan: Plan, node: NodeId, own_key: bytes, pinned: Mapping[NodeId, str]
) -> Refusal | None:
    """Whether the plan's keys are the members' own, as far as this node can know; None: yes.

    Args:
        plan: with a secure sum, or without.
        node: this node.
        own_key: its raw Ed25519 public key.
        pinned: hex keys of other members, as this node saw them first or a person wrote them down.
    """
    if plan.secagg is None:
        return None
    if plan.secagg.keys.get(node) != own_key.hex():
        return Refusal("secagg.own_key", f"the plan names another signing key for {node}")
    for other, key in plan.secagg.keys.items():
        known = pinned.get(NodeId(other))
        if known is not None and known != key:
            return Refusal(
                "secagg.key_changed", f"the plan names another signing key for {other} than before"
            )
    return None


@dataclass(slots=True, kw_only=True)
class SecureSum:
    """Carries out the steps of secure sums for one node."""

    site: Site
    states: SecureStates

    # -- what everybody needs ----------------------------------------------------------------

    def _state(self, round_: RoundId, attempt: int) -> NodeState:
        state = self.states.load(round_.run)
        if state is None or (state.attempt.round, state.attempt.number) != (round_, attempt):
            raise CorruptStateError(f"there is no state of round {round_}, attempt {attempt}")
        return state

    def _attempt(self, record: RoundRecord, plan: Plan, number: int) -> Attempt:
        return attempt_of(plan, record.round, number, record.start_root)

    async def _get(self, round_: RoundId, attempt: int, kind: str) -> Any:
        request = secure_sum_pb2.GetRequest(round=round_ref(round_), attempt=attempt, kind=kind)
        # Once: a list that is not there yet is asked for again when there is news.
        answer = await self.site.connection.ask(lambda c: c.secure_sum.Get, request, attempts=1)
        return await asyncio.to_thread(from_bytes, _LISTS[kind], answer.body)

    async def _carry_out(self, round_: RoundId, move: machine.Move) -> None:
        """Durable first, then on the wire."""
        await asyncio.to_thread(self.states.keep, round_.run, move.state)
        for message in move.send:
            await self._post(round_, message)
        logger.info("%s", move.why)

    async def _post(self, round_: RoundId, message: Signed[Any] | DealBundle) -> None:
        if isinstance(message, DealBundle):
            kind = "deal"
        else:
            kind = _KINDS[type(message.body).__name__]
        request = secure_sum_pb2.PostRequest(
            round=round_ref(round_), kind=kind, body=message.to_bytes()
        )
        await self.site.connection.ask(lambda c: c.secure_sum.Post, request)

    # -- the steps ---------------------------------------------------------------------------

    async def ready(self, record: RoundRecord, plan: Plan, number: int) -> None:
        """READY of an attempt; gives up the attempt before it, if there was one in the round."""
        round_, key = record.round, self.site.signing_key
        state = await asyncio.to_thread(self.states.load, round_.run)
        if state is not None and state.attempt.round == round_ and state.attempt.number < number:
            try:
                await self._carry_out(round_, machine.abort(state, "secagg.restart", key))
            except (EquivocationError, WrongPhaseError):
                logger.info("%s was over for this node before", state.attempt)
            state = self.states.load(round_.run)
        move = machine.ready(
            state,
            self._attempt(record, plan, number),
            self.site.node,
            key,
            seed=self.site.random_bytes(32),
            seen_size=0,
            seen_root=NOTHING_SEEN,
        )
        await self._carry_out(round_, move)

    async def deal(self, round_: RoundId, number: int) -> None:
        """READY once more, in case it was lost, and DEAL as soon as START is there."""
        state = self._state(round_, number)
        if isinstance(state, ReadySent):
            await self._post(round_, state.ready)
        start = await self._get(round_, number, "start")
        key = self.site.signing_key
        await self._carry_out(round_, await asyncio.to_thread(machine.deal, state, start, key))

    async def acknowledge(self, round_: RoundId, number: int) -> None:
        """Open the packets; DEAL_OK or a complaint."""
        state = self._state(round_, number)
        delivery = await self._get(round_, number, "delivery")
        move = await asyncio.to_thread(
            machine.acknowledge,
            state,
            delivery,
            self.site.signing_key,
            checkpoint=NO_CHECKPOINT,
        )
        await self._carry_out(round_, move)

    async def masking(self, round_: RoundId, number: int) -> Masking | Uploaded:
        """The state from which masks are made, once everybody has agreed."""
        state = self._state(round_, number)
        if isinstance(state, Uploaded):
            return state
        if not isinstance(state, Masking):
            go = await self._get(round_, number, "go")
            move = await asyncio.to_thread(machine.go, state, go)
            await self._carry_out(round_, move)
            state = move.state
        if not isinstance(state, Masking):
            raise WrongPhaseError(f"round {round_}: this node is past masking")
        return state

    async def fix(self, round_: RoundId, number: int, *, root: Digest, size: int) -> None:
        """Fix the masked vector: from here on no other bytes can leave."""
        state = self._state(round_, number)
        move = machine.upload(state, self.site.signing_key, upload_root=root, length=size)
        await self._carry_out(round_, move)

    async def repost_header(self, round_: RoundId, number: int) -> None:
        """Hand in the signed header again, before bytes are sent."""
        state = self._state(round_, number)
        if isinstance(state, Uploaded):
            await self._post(round_, state.header)

    async def commit(self, round_: RoundId, number: int) -> None:
        """COMMIT to the survivor list, or ABORT when it does not stand up to the checks."""
        state, key = self._state(round_, number), self.site.signing_key
        survivors = await self._get(round_, number, "survivors")
        try:
            move = await asyncio.to_thread(machine.commit, state, survivors, key)
        except IntegrityError as error:
            logger.warning("round %s: %s", round_, error.diagnostics())
            detail = {"code": error.code, "reason": str(error)}
            await asyncio.to_thread(
                self.site.journal.note, "survivor list refused", detail, round_=round_
            )
            move = machine.abort(state, "secagg.survivors", key)
        await self._carry_out(round_, move)

    async def abort(self, round_: RoundId, number: int, reason: str) -> None:
        """ABORT the attempt, for good."""
        state = self._state(round_, number)
        await self._carry_out(round_, machine.abort(state, reason, self.site.signing_key))

    async def reveal(self, round_: RoundId, number: int) -> None:
        """One kind of share for each member."""
        state = self._state(round_, number)
        certificate = await self._get(round_, number, "commits")
        move = await asyncio.to_thread(machine.reveal, state, certificate, self.site.signing_key)
        await self._carry_out(round_, move)

    async def close(self, round_: RoundId) -> None:
        """Erase what is left of an attempt that is over."""
        state = await asyncio.to_thread(self.states.load, round_.run)
        if state is None or state.attempt.round != round_:
            raise NotFoundError(f"there is no state of round {round_}")
        await self._carry_out(round_, machine.close(state, "released"))

    # -- after the release -------------------------------------------------------------------

    def check_transcript(
        self,
        record: RoundRecord,
        plan: Plan,
        number: int,
        data: bytes,
        survivors: frozenset[NodeId],
    ) -> tuple[str, str]:
        """Look at how a sum was opened. Blocking.

        Returns:
            Objection code and detail; two empty strings when everything holds.
        """
        attempt = self._attempt(record, plan, number)
        state = self.states.load(record.round.run)
        mine = (
            state.header
            if isinstance(state, Uploaded | Committed | Revealed) and state.attempt == attempt
            else None
        )
        try:
            verified = verify_transcript(from_bytes(Transcript, data), attempt)
            if verified.listed.headers.keys() != survivors:
                return "secagg.transcript", "the transcript opens the sum of other nodes"
            if mine is not None:
                check_own_upload(verified, self.site.node, mine)
        except (IntegrityError, RefusedError) as error:
            return "secagg.transcript", str(error)
        return "", ""


def dither_seed(state: Masking) -> bytes:
    """The seed of the rounding in an attempt: encoding again after a crash gives the same bytes.

    Derived from the attempt's self seed under a context of its own; two different vectors under one
    set of masks would tell their difference (protocols/spec/masked-update.md, section 5).
    """
    ctx = state.agreed().ctx
    derive = HKDF(
        algorithm=hashes.SHA256(), length=32, salt=bytes.fromhex(ctx), info=b"minga/dither/v1"
    )
    return derive.derive(state.self_seed)
