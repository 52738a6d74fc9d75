"""This node's part in a secure sum: what ``protocols.secagg.node`` decides, made durable and sent.

The order is always the one that module asks for: make the new state durable (which destroys the
old one), note in the journal how far the node has come, then send. Every step may be repeated: the
same state gives the same bytes. Lists are fetched before a step and the state is read inside it,
one step at a time: what comes late for an attempt that was given up finds it given up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from node_agent.bulk import fetch_bytes
from node_agent.records import RoundRecord, UploadRecord
from node_agent.rules import Refusal
from node_agent.secure_state import SecureKnown, SecureStates, outline
from node_agent.site import Site
from protocols.canonical import hash_fields
from protocols.errors import (
    CorruptStateError,
    DigestMismatchError,
    EquivocationError,
    FederationError,
    IntegrityError,
    NotFoundError,
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
from protocols.secagg.states import Masking, NodeState, ReadySent, Uploaded
from protocols.secagg.verify import Verified, verify_transcript
from protocols.upload import UploadHeader
from protocols.wire import round_ref

logger = logging.getLogger(__name__)
MAX_TRANSCRIPT: Final = 64 * 2**20  # bytes; 64 nodes make some 20 MiB
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


def check_not_lost(state: NodeState | None, said: SecureKnown | None, round_: RoundId) -> None:
    """Refuse to go on from a state that is older than what this node did in a round.

    Args:
        state: on the disk.
        said: how far the node had come, by its journal.
        round_: in which it is about to act.

    Raises:
        CorruptStateError: the state was lost or rolled back.
    """
    if said is None or said.round != round_:
        return
    if state is None or outline(state).order < said.order:
        raise CorruptStateError(
            f"secagg.state_lost: round {round_}: this node was {said.stage} in attempt"
            f" {said.attempt}, its state of the secure sum is lost or older"
        )


@dataclass(slots=True, kw_only=True)
class SecureSum:
    """Carries out the steps of secure sums for one node."""

    site: Site
    states: SecureStates
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    # -- what everybody needs ----------------------------------------------------------------

    def _state(self, round_: RoundId, attempt: int) -> NodeState:
        state = self.states.load(round_.run)
        check_not_lost(state, self.site.journal.stage(round_.run), round_)
        if state is None or (state.attempt.round, state.attempt.number) != (round_, attempt):
            raise NotFoundError(f"there is no state of round {round_}, attempt {attempt}")
        return state

    def _keep(self, move: machine.Move) -> machine.Move:
        """Durable first: then it may be sent."""
        self.states.keep(move.state.attempt.round.run, move.state)
        self.site.journal.add_stage(outline(move.state))
        logger.info("%s", move.why)
        return move

    def _step(
        self, round_: RoundId, attempt: int, move_on: Callable[[NodeState], machine.Move]
    ) -> machine.Move:
        """Decide on the durable state and keep what follows, as one step. Blocking."""
        with self._one_at_a_time:
            return self._keep(move_on(self._state(round_, attempt)))

    async def _carry_out(
        self, round_: RoundId, attempt: int, move_on: Callable[[NodeState], machine.Move]
    ) -> NodeState:
        """A step, then what it sends."""
        move = await asyncio.to_thread(self._step, round_, attempt, move_on)
        await self._send(round_, move)
        return move.state

    async def _send(self, round_: RoundId, move: machine.Move) -> None:
        for message in move.send:
            await self._post(round_, message)

    async def _get(self, round_: RoundId, attempt: int, kind: str) -> Any:
        request = secure_sum_pb2.GetRequest(round=round_ref(round_), attempt=attempt, kind=kind)
        # Once: a list that is not there yet is asked for again when there is news.
        answer = await self.site.connection.ask(lambda c: c.secure_sum.Get, request, attempts=1)
        return await asyncio.to_thread(from_bytes, _LISTS[kind], answer.body)

    async def _post(self, round_: RoundId, message: Signed[Any] | DealBundle) -> None:
        kind = "deal" if isinstance(message, DealBundle) else _KINDS[type(message.body).__name__]
        request = secure_sum_pb2.PostRequest(
            round=round_ref(round_), kind=kind, body=message.to_bytes()
        )
        await self.site.connection.ask(lambda c: c.secure_sum.Post, request)

    def _seen(self) -> tuple[int, Digest]:
        """The last checkpoint of the log that this node accepted."""
        if self.site.log is None:
            return 0, NOTHING_SEEN
        seen = self.site.log.verifier.seen
        return seen.size, Digest(seen.root.hex())

    async def committed(self, round_: RoundId, number: int) -> tuple[Digest, Digest]:
        """The context that this node's upload is bound to, and the digest of the deals in it.

        Raises:
            WrongPhaseError: no vector is fixed, or this node has gone further.
        """
        state = await asyncio.to_thread(self._state, round_, number)
        if not isinstance(state, Uploaded):
            raise WrongPhaseError(f"round {round_}: this node has no vector to hand in")
        deals = hash_fields("minga/deals/v1", *(deal.body.to_bytes() for deal in state.deals))
        return state.agreed().ctx, Digest(deals.hex())

    # -- the steps ---------------------------------------------------------------------------

    async def ready(self, record: RoundRecord, plan: Plan, number: int) -> None:
        """READY of an attempt; gives up the attempt before it, if there was one in the round."""
        round_ = record.round
        moves = await asyncio.to_thread(self._join_attempt, record, plan, number)
        for move in moves:
            await self._send(round_, move)

    def _join_attempt(self, record: RoundRecord, plan: Plan, number: int) -> list[machine.Move]:
        round_, key = record.round, self.site.signing_key
        moves: list[machine.Move] = []
        with self._one_at_a_time:
            state = self.states.load(round_.run)
            check_not_lost(state, self.site.journal.stage(round_.run), round_)
            if state is not None and state.attempt.round == round_:
                last = state.attempt.number
                if last < number:
                    try:
                        given_up = machine.abort(state, "secagg.restart", key)
                        moves.append(self._keep(given_up))
                        state = given_up.state
                    except (EquivocationError, WrongPhaseError):
                        logger.info("%s was over for this node before", state.attempt)
            move = machine.ready(
                state,
                attempt_of(plan, round_, number, record.start_root),
                self.site.node,
                key,
                seed=self.site.random_bytes(32),
                seen_size=self._seen()[0],
                seen_root=self._seen()[1],
            )
            moves.append(self._keep(move))
        return moves

    async def deal(self, round_: RoundId, number: int) -> None:
        """READY once more, in case it was lost, and DEAL as soon as START is there."""
        state = await asyncio.to_thread(self._state, round_, number)
        if isinstance(state, ReadySent):
            await self._post(round_, state.ready)
        start, key = await self._get(round_, number, "start"), self.site.signing_key
        await self._carry_out(round_, number, lambda state: machine.deal(state, start, key))

    async def acknowledge(self, round_: RoundId, number: int) -> None:
        """Open the packets; DEAL_OK or a complaint."""
        log, key = self.site.log, self.site.signing_key
        checkpoint = NO_CHECKPOINT if log is None else log.bound_checkpoint(round_, number)
        delivery = await self._get(round_, number, "delivery")
        await self._carry_out(
            round_,
            number,
            lambda state: machine.acknowledge(state, delivery, key, checkpoint=checkpoint),
        )

    async def masking(self, round_: RoundId, number: int) -> Masking | Uploaded:
        """The state from which masks are made, once everybody has agreed.

        Raises:
            WrongPhaseError: this node has gone further, or has given the attempt up.
        """
        state = await asyncio.to_thread(self._state, round_, number)
        if not isinstance(state, Masking | Uploaded):
            go = await self._get(round_, number, "go")
            state = await self._carry_out(round_, number, lambda state: machine.go(state, go))
        if not isinstance(state, Masking | Uploaded):
            raise WrongPhaseError(f"round {round_}: this node is past masking")
        return state

    async def fix(self, round_: RoundId, number: int, *, root: Digest, size: int) -> None:
        """Fix the masked vector: from here on no other bytes can leave. Nothing is sent yet."""
        key = self.site.signing_key
        await asyncio.to_thread(
            self._step,
            round_,
            number,
            lambda state: machine.upload(state, key, upload_root=root, length=size),
        )

    async def post_header(self, round_: RoundId, number: int) -> None:
        """Hand in the signed header; bytes are sent after it.

        Raises:
            WrongPhaseError: no vector is fixed, or this node has gone further.
        """
        state = await asyncio.to_thread(self._state, round_, number)
        if not isinstance(state, Uploaded):
            raise WrongPhaseError(f"round {round_}: this node has no vector to hand in")
        await self._post(round_, state.header)

    async def commit(self, round_: RoundId, number: int) -> None:
        """COMMIT to the survivor list, or ABORT when it does not stand up to the checks."""
        survivors, key = await self._get(round_, number, "survivors"), self.site.signing_key

        def verdict(state: NodeState) -> machine.Move:
            try:
                return machine.commit(state, survivors, key)
            except IntegrityError as error:
                logger.warning("round %s: %s", round_, error.diagnostics())
                detail = {"code": error.code, "reason": str(error)}
                self.site.journal.note("survivor list refused", detail, round_=round_)
                return machine.abort(state, "secagg.survivors", key)

        await self._carry_out(round_, number, verdict)

    async def abort(self, round_: RoundId, number: int, reason: str) -> None:
        """ABORT the attempt, for good."""
        key = self.site.signing_key
        await self._carry_out(round_, number, lambda state: machine.abort(state, reason, key))

    async def reveal(self, round_: RoundId, number: int) -> None:
        """One kind of share for each member."""
        commits, key = await self._get(round_, number, "commits"), self.site.signing_key
        await self._carry_out(round_, number, lambda state: machine.reveal(state, commits, key))

    async def close(self, round_: RoundId, number: int) -> None:
        """Erase what is left of an attempt that is over, whatever state it is in."""

        def erase() -> None:
            with self._one_at_a_time:
                state = self.states.load(round_.run)
                if state is None or (state.attempt.round, state.attempt.number) != (round_, number):
                    raise NotFoundError(f"there is no state of round {round_}, attempt {number}")
                self._keep(machine.close(state, "released"))

        await asyncio.to_thread(erase)

    # -- after the release -------------------------------------------------------------------

    async def check_opening(
        self,
        plan: Plan,
        round_: RoundId,
        number: int,
        *,
        model_root: Digest,
        transcript: Digest | None,
        survivors: frozenset[NodeId],
    ) -> tuple[str, str]:
        """Whether a sum was opened as the specification demands, and with this node's own upload.

        Args:
            plan: of the run.
            round_: that was released.
            number: of its attempt.
            model_root: of the model that the round starts from, as this node derived it.
            transcript: blob that says how the sum was opened; None: none is named.
            survivors: whose updates are in the sum.

        Returns:
            Objection code and detail; two empty strings when everything holds.

        Raises:
            NotReadyError: the transcript cannot be had now.
        """
        if transcript is None:
            return "secagg.transcript", "a secure sum was opened and nothing says how"
        try:
            data = await fetch_bytes(
                self.site.connection, transcript, limit=MAX_TRANSCRIPT, round_=round_
            )
        except (NotFoundError, DigestMismatchError) as error:
            return "secagg.transcript", str(error)
        attempt = attempt_of(plan, round_, number, model_root)
        mine = await asyncio.to_thread(self.site.journal.upload, round_, number)
        try:
            verified = await asyncio.to_thread(_read_transcript, data, attempt)
        except FederationError as error:  # whatever it is: these bytes will not get better
            return "secagg.transcript", str(error)
        return check_own_part(verified, self.site.node, mine, survivors)


def _read_transcript(data: bytes, attempt: Attempt) -> Verified:
    return verify_transcript(from_bytes(Transcript, data), attempt)


def check_own_part(
    verified: Verified, node: NodeId, mine: UploadRecord | None, survivors: frozenset[NodeId]
) -> tuple[str, str]:
    """Whether a verified transcript opens the sum that was published, with what this node sent.

    Args:
        verified: the transcript.
        node: this node.
        mine: the vector this node made in the attempt, if it made one.
        survivors: whose updates are said to be in the sum.

    Returns:
        Objection code and detail; two empty strings when everything holds.
    """
    listed = verified.listed.headers
    if listed.keys() != survivors:
        return "secagg.transcript", "the transcript opens the sum of other nodes"
    if node not in listed:
        return "", ""
    header = UploadHeader.from_bytes(mine.header) if mine is not None else None
    named = (listed[node].upload_root, listed[node].length)
    if header is None or (header.root, header.size) != named:
        return "secagg.transcript", "the transcript names another upload of this node"
    return "", ""


def dither_seed(state: Masking) -> bytes:
    """The seed of the rounding in an attempt: encoding again after a crash gives the same bytes.

    Two different vectors under one set of masks would tell their difference
    (protocols/spec/masked-update.md, section 5). Derived, under a context of its own, from both
    secrets of the attempt: after a release one of them is public, and never both.
    """
    ctx = state.agreed().ctx
    derive = HKDF(
        algorithm=hashes.SHA256(), length=32, salt=bytes.fromhex(ctx), info=b"minga/dither/v1"
    )
    return derive.derive(state.rk_secret + state.self_seed)
