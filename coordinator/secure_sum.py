"""The coordinator's part in a secure sum: what it accepts, and the lists it makes of it.

Pure over an open transaction's messages. Every list (START, DELIVERY, GO, SURVIVORS, the commit
certificate) is a function of messages that never change once they are accepted, so it needs no
place of its own in the ledger and any coordinator gives the same bytes. Nobody has to trust them:
each node checks them again (protocols/secagg/checks.py), and so does an auditor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from coordinator.ledger import RoundRow, Tx
from protocols.canonical import sha256_hex
from protocols.errors import (
    ConflictingUploadError,
    MalformedMessageError,
    NotFoundError,
    NotListedError,
    NotReadyError,
    WrongPhaseError,
)
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.round_vector import round_ring
from protocols.rounds import (
    AbortArrived,
    AgreementArrived,
    CommitArrived,
    Committing,
    ComplaintUpheld,
    DealArrived,
    Dealing,
    Event,
    Phase,
    ReadyArrived,
    Released,
    Revealing,
    SharesArrived,
    Training,
    Uploading,
)
from protocols.secagg import checks, dealing
from protocols.secagg import coordinator as lists
from protocols.secagg.attempts import NO_CHECKPOINT, attempt_of
from protocols.secagg.checks import Agreed, Listed, Started
from protocols.secagg.codec import from_bytes
from protocols.secagg.context import Attempt
from protocols.secagg.masks import MaskAdder
from protocols.secagg.messages import (
    Abort,
    Commit,
    Complaint,
    DealBundle,
    DealOk,
    Delivery,
    Ready,
    Reveal,
    Signed,
    Transcript,
    Upload,
    signed_from_bytes,
)
from protocols.secagg.unmask import mask_remover
from protocols.tlog.checkpoint import Checkpoint

READY: Final = "ready"
DEAL: Final = "deal"
DEAL_OK: Final = "deal_ok"
COMPLAINT: Final = "complaint"
UPLOAD: Final = "upload"
COMMIT: Final = "commit"
ABORT: Final = "abort"
REVEAL: Final = "reveal"

_BODIES: Final[dict[str, type[Any]]] = {
    READY: Ready,
    DEAL_OK: DealOk,
    COMPLAINT: Complaint,
    UPLOAD: Upload,
    COMMIT: Commit,
    ABORT: Abort,
    REVEAL: Reveal,
}


def read_message(kind: str, body: bytes) -> Signed[Any] | DealBundle:
    """Parse what was handed in.

    Raises:
        MalformedMessageError: an unknown kind, or bytes that are no message of it.
    """
    if kind == DEAL:
        return _bundle(body)
    if kind not in _BODIES:
        raise MalformedMessageError(f"{kind!r:.40} is no kind of message of a secure sum")
    return _signed(kind, body)


@functools.lru_cache(maxsize=4096)  # every message is read again with each that builds on it
def _signed(kind: str, body: bytes) -> Signed[Any]:
    return signed_from_bytes(_BODIES[kind], body)


@functools.lru_cache(maxsize=256)
def _bundle(body: bytes) -> DealBundle:
    return from_bytes(DealBundle, body)


def sender_of(message: Signed[Any] | DealBundle) -> tuple[NodeId, int]:
    """Who signed a message, and for which attempt; not verified yet."""
    signed = message.deal if isinstance(message, DealBundle) else message
    return signed.body.node, signed.body.attempt


@dataclass(frozen=True, slots=True)
class Sum:
    """The messages of one attempt, as one transaction sees them."""

    tx: Tx
    row: RoundRow
    plan: Plan
    attempt: Attempt

    @classmethod
    def of(cls, tx: Tx, row: RoundRow, plan: Plan, number: int) -> Sum:
        """Raises: PlanRefusedError: the plan has no secure sum."""
        return cls(tx, row, plan, attempt_of(plan, row.round, number, row.start_root))

    def _read(self, kind: str) -> dict[NodeId, bytes]:
        return self.tx.messages(self.row.round, self.attempt.number, kind)

    def signed(self, kind: str) -> dict[NodeId, Signed[Any]]:
        """All messages of a kind, by node."""
        return {node: _signed(kind, body) for node, body in self._read(kind).items()}

    def bundles(self) -> dict[NodeId, DealBundle]:
        """All deals, by node."""
        return {node: _bundle(body) for node, body in self._read(DEAL).items()}

    def members(self) -> frozenset[NodeId]:
        """U1: who is dealt to in this attempt.

        Raises:
            WrongPhaseError: not known yet, or not any more.
        """
        phase = self.row.phase
        if isinstance(phase, Dealing | Uploading | Committing | Revealing):
            if phase.attempt == self.attempt.number:
                return phase.ready
            raise WrongPhaseError(
                f"round {self.row.round} is at attempt {phase.attempt}, not {self.attempt.number}"
            )
        agreed = frozenset(self._read(DEAL_OK))  # after the phases: all of U1 had agreed
        if not agreed:
            raise WrongPhaseError(f"{self.attempt} never got to a sum")
        return agreed

    def started(self) -> Started:
        """START and what follows from it.

        Raises:
            NotReadyError: a member has not said READY in this attempt yet.
        """
        members = self.members()
        readys = {n: s for n, s in self.signed(READY).items() if n in members}
        missing = members - readys.keys()
        if missing:
            names = ", ".join(sorted(missing))
            raise NotReadyError(f"{self.attempt} waits for READY of {names}", retry_after_s=0.2)
        return checks.check_start(lists.make_start(readys), self.attempt)

    def start(self) -> Any:
        """The START message."""
        members = self.members()
        self.started()
        return lists.make_start({n: s for n, s in self.signed(READY).items() if n in members})

    def checkpoint(self) -> bytes:
        """What the attempt is bound to: the tree that ends with its ``round.start``.

        Nodes derive it from the log that they have verified (spec/log.md, 13.6).
        """
        order, leaf = self.tx.sequencer, None
        if order is not None:
            leaf = self.tx.start_leaf(self.row.round, self.attempt.number)
        if order is None or leaf is None:
            return NO_CHECKPOINT
        head = Checkpoint(origin=order.origin, size=leaf.index + 1, root=leaf.root)
        return head.to_text().encode()

    def abort_certificate(self) -> Digest:
        """SHA-256 of the aborts of this attempt.

        Raises:
            CheckFailedError: fewer than a quorum.
        """
        made = lists.make_abort_certificate(self.signed(ABORT), self.attempt)
        return sha256_hex(made.to_bytes())

    def _deliveries(self) -> tuple[Agreed, dict[NodeId, Delivery]]:
        members, bundles = self.members(), self.bundles()
        missing = members - bundles.keys()
        if missing:
            raise NotReadyError(f"{self.attempt} waits for DEAL of {', '.join(sorted(missing))}")
        chosen = {node: bundles[node] for node in members}
        return lists.make_deliveries(chosen, self.started(), self.checkpoint())

    def agreed(self) -> Agreed:
        """The facts of Dealing. Raises: NotReadyError: a deal is missing."""
        deals = [bundle.deal for node, bundle in sorted(self.bundles().items())]
        wanted = self.members()
        chosen = [deal for deal in deals if deal.body.node in wanted]
        if len(chosen) != len(wanted):
            raise NotReadyError(f"{self.attempt} waits for the deals of all its members")
        return checks.check_deals(chosen, self.started(), self.checkpoint())

    def delivery(self, node: NodeId) -> Delivery:
        """All DEALs with the packets for ``node``."""
        found = self._deliveries()[1].get(node)
        if found is None:
            raise NotListedError(f"{node} is not in the ready set of round {self.row.round}")
        return found

    def go(self) -> Any:
        """Everybody's DEAL_OK. Raises: NotReadyError: one is missing."""
        members = self.members()
        oks = {n: s for n, s in self.signed(DEAL_OK).items() if n in members}
        if oks.keys() != members:
            missing = ", ".join(sorted(members - oks.keys()))
            raise NotReadyError(f"{self.attempt} waits for DEAL_OK of {missing}")
        return lists.make_go(oks)

    def survivors(self) -> Any:
        """The proposed list, with the headers.

        Raises:
            WrongPhaseError: no list is proposed.
        """
        phase = self.row.phase
        chosen = getattr(phase, "survivors", None)
        if chosen is None:
            raise WrongPhaseError(f"round {self.row.round} has no survivor list yet")
        headers = self.signed(UPLOAD)
        if not chosen <= headers.keys():  # the list is of another attempt than was asked for
            raise WrongPhaseError(f"{self.attempt} has no survivor list")
        return lists.make_survivors({node: headers[node] for node in chosen})

    def listed(self) -> Listed:
        """The survivor list and what follows from it; it must be long enough to open."""
        return checks.check_survivors(self.survivors(), self.agreed())

    def certificate(self) -> Any:
        """The commits. Raises: CheckFailedError: too few."""
        return lists.make_commit_certificate(self.signed(COMMIT), self.listed())


# -- accepting ---------------------------------------------------------------------------------


def accept_message(summed: Sum, kind: str, message: Signed[Any] | DealBundle) -> Event | None:
    """Check a message against the attempt and the phase.

    Returns:
        What the round machine should be told; None: it is only kept (an upload's header, an abort
        before the verdict).

    Raises:
        WrongPhaseError: not the phase for it.
        NotListedError, CheckFailedError, BadSignatureError: a clause does not hold.
        NotReadyError: it comes before what it builds on; send it again.
    """
    return _ACCEPT[kind](summed, message)


def _phase(summed: Sum, *allowed: type[Any]) -> Phase:
    phase: Phase = summed.row.phase
    if not any(type(phase) is kind for kind in allowed):
        name = type(phase).__name__
        raise WrongPhaseError(f"round {summed.row.round} is {name}: cannot take that message")
    return phase


def _ready(summed: Sum, signed: Signed[Ready]) -> Event | None:
    node = checks.check_ready(signed, summed.attempt).node
    phase = _phase(summed, Training, Dealing)
    if isinstance(phase, Training):
        if summed.attempt.number != 1:
            raise WrongPhaseError("the first attempt has number 1")
        return ReadyArrived(node)
    if node not in summed.members():
        raise NotListedError(f"{node} is not in the ready set of round {summed.row.round}")
    return ReadyArrived(node, summed.attempt.number)


def _deal(summed: Sum, bundle: DealBundle) -> Event | None:
    _phase(summed, Dealing, Uploading)
    checks.check_bundle(bundle, summed.started())
    return DealArrived(bundle.deal.body.node, summed.attempt.number)


def _deal_ok(summed: Sum, signed: Signed[DealOk]) -> Event | None:
    _phase(summed, Dealing, Uploading)
    body = checks.check_deal_ok(signed, summed.agreed())
    return AgreementArrived(body.node, summed.attempt.number)


def _complaint(summed: Sum, signed: Signed[Complaint]) -> Event | None:
    _phase(summed, Dealing)
    accused = summed.bundles().get(signed.body.against)
    if accused is None:
        raise NotListedError(f"{signed.body.against} has not dealt in {summed.attempt}")
    at_fault, _ = dealing.judge_complaint(signed, accused, summed.started())
    return ComplaintUpheld(at_fault, summed.attempt.number)


def _upload(summed: Sum, signed: Signed[Upload]) -> Event | None:
    _phase(summed, Uploading, Committing, Revealing)
    checks.check_header(signed, summed.agreed())
    return None


def _commit(summed: Sum, signed: Signed[Commit]) -> Event | None:
    _phase(summed, Committing, Revealing, Released)  # a late one is evidence, and counts no more
    body = checks.check_commit(signed, summed.listed())
    return CommitArrived(body.node, summed.attempt.number)


def _abort(summed: Sum, signed: Signed[Abort]) -> Event | None:
    body = checks.check_abort(signed, summed.attempt)
    phase = summed.row.phase
    if isinstance(phase, Committing | Revealing) and phase.attempt == summed.attempt.number:
        return AbortArrived(body.node, summed.attempt.number)
    return None


def _reveal(summed: Sum, signed: Signed[Reveal]) -> Event | None:
    _phase(summed, Revealing, Released)
    body = checks.check_reveal(signed, summed.listed())
    return SharesArrived(body.node, summed.attempt.number)


_ACCEPT: Final[dict[str, Callable[[Sum, Any], Event | None]]] = {
    READY: _ready,
    DEAL: _deal,
    DEAL_OK: _deal_ok,
    COMPLAINT: _complaint,
    UPLOAD: _upload,
    COMMIT: _commit,
    ABORT: _abort,
    REVEAL: _reveal,
}


# -- giving ------------------------------------------------------------------------------------


def make_list(summed: Sum, kind: str, node: NodeId) -> bytes:
    """The list that ``node`` asks for, canonical bytes.

    Raises:
        NotReadyError: not all messages it is made of are here.
        WrongPhaseError, NotListedError: the list does not exist, or not for this node.
        NotFoundError: no such list.
    """
    if node not in summed.attempt.roster:
        raise NotListedError(f"{node} is not on the roster of run {summed.plan.run}")
    match kind:
        case "start":
            made = summed.start()
        case "delivery":
            made = summed.delivery(node)
        case "go":
            made = summed.go()
        case "survivors":
            made = summed.survivors()
        case "commits":
            made = summed.certificate()
        case _:
            raise NotFoundError(f"{kind!r:.40} is no list of a secure sum")
    data: bytes = made.to_bytes()
    return data


def check_uploaded(
    tx: Tx, round_id: RoundId, node: NodeId, attempt: int, root: Digest, size: int
) -> None:
    """A masked vector counts only with its signed header in the attempt's messages.

    Raises:
        NotReadyError: there is none.
        ConflictingUploadError: it names another vector.
    """
    kept = tx.messages(round_id, attempt, UPLOAD).get(node)
    if kept is None:
        raise NotReadyError("hand in the signed header of the masked vector first")
    body = signed_from_bytes(Upload, kept).body
    if (body.upload_root, body.length) != (root, size):
        raise ConflictingUploadError("the vector is not the one that the signed header names")


# -- opening -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What opens a sum: a transcript to publish, and the remover of what masks are left."""

    transcript: Transcript
    remover: MaskAdder


def open_masks(summed: Sum) -> Opening:
    """Reconstruct the secrets of a released attempt from its reveals.

    Raises:
        IntegrityError: a dealer's shares do not give what it committed to; the sum stays closed.
    """
    listed = summed.listed()
    reveals = summed.signed(REVEAL)
    checked = [checks.check_reveal(signed, listed) for signed in reveals.values()]
    found = lists.reconstruct(checked, listed)
    members = summed.members()
    transcript = lists.make_transcript(
        start=summed.start(),
        bundles={node: bundle for node, bundle in summed.bundles().items() if node in members},
        checkpoint=summed.checkpoint(),
        go=summed.go(),
        survivors=summed.survivors(),
        certificate=summed.certificate(),
        reveals=reveals,
        opened=found.opened,
    )
    remover = mask_remover(
        listed.agreed.ctx,
        round_ring(summed.plan),
        roster=summed.attempt.roster,
        deals=listed.agreed.deals,
        opened=found.opened,
    )
    return Opening(transcript=transcript, remover=remover)
