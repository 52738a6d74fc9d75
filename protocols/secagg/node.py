"""The node's side of a secure sum: what it may send, and what must be on disk before.

Each function takes the state that is on disk and what came from the coordinator, and gives a
``Move``: **make ``state`` durable (fsync), then send ``send``, then destroy what the old record
held.** In that order a crash anywhere leaves the node able to repeat exactly what it may already
have sent, and unable to say anything else: calling a function again on the state it led to gives
the same bytes again. Nothing is sent that is not in the durable state.

The caller still owes what is outside this package: that the plan, the START and the survivor list
are in the log before it acts on them, that the checkpoint is witnessed, that its ledger affords the
round, and that the masked vector is spooled to disk before ``upload`` is called.

Normative text: protocols/spec/masked-update.md, sections 3 to 9; the numbers are its clauses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.crypto.signatures import public_bytes
from protocols.errors import ConflictingUploadError, EquivocationError, WrongPhaseError
from protocols.identifiers import Digest, NodeId
from protocols.secagg.checks import (
    check_abort_certificate,
    check_commit_certificate,
    check_deals,
    check_go,
    check_start,
    check_survivors,
)
from protocols.secagg.context import Attempt
from protocols.secagg.dealing import check_parcels, make_bundle, open_parcels, where
from protocols.secagg.errors import BadShareError, CheckFailedError
from protocols.secagg.keys import AttemptKeys
from protocols.secagg.masks import MaskAdder, node_masks
from protocols.secagg.messages import (
    Abort,
    AbortCertificate,
    Commit,
    CommitCertificate,
    Complaint,
    DealBundle,
    DealOk,
    Delivery,
    Go,
    Ready,
    Reveal,
    RevealedShare,
    Signed,
    Start,
    Survivors,
    Upload,
)
from protocols.secagg.states import (
    AbortSent,
    Closed,
    Committed,
    DealOkSent,
    Dealt,
    Masking,
    NodeState,
    ReadySent,
    Revealed,
    Uploaded,
)
from protocols.tensors.ring import Ring


@dataclass(frozen=True, kw_only=True)
class Move:
    """Make ``state`` durable; then send ``send``; then destroy every older record."""

    state: NodeState
    send: tuple[Signed[Any] | DealBundle, ...] = ()
    erased: tuple[str, ...] = ()  # what the new record no longer holds
    why: str  # one line for the journal; names no secret


def _wrong(state: NodeState, got: str) -> WrongPhaseError:
    return WrongPhaseError(
        f"{state.attempt}: this node is {type(state).__name__}, cannot take {got}"
    )


def _check_key(attempt: Attempt, node: NodeId, key: Ed25519PrivateKey) -> None:
    if attempt.roster.key(node) != public_bytes(key):
        raise CheckFailedError(
            f"the key of this machine is not {node}'s on the roster", clause="1.3"
        )


# -- READY -------------------------------------------------------------------------------------


def ready(
    previous: NodeState | None,
    attempt: Attempt,
    node: NodeId,
    key: Ed25519PrivateKey,
    *,
    seed: bytes,
    seen_size: int,
    seen_root: Digest,
    certificate: AbortCertificate | None = None,
) -> Move:
    """Join an attempt, if what this node did before allows it (section 9).

    Args:
        previous: the durable state of this node's last attempt in this run, or None if there was
            none. After a loss of state the caller must not pass None for a round that had begun.
        attempt: as this node derived it: its own model root, the plan's roster and terms.
        seed: 32 fresh bytes from the operating system, for this attempt alone.
        seen_size, seen_root: the last log checkpoint this node accepted.
        certificate: aborts of the previous attempt, needed if this node had uploaded in it.

    Raises:
        WrongPhaseError: 9.1 not a later attempt; 9.2 the previous one is still under way;
            9.3 uploaded and no certificate; 9.4 committed in this round.
        CheckFailedError: the certificate does not hold (9.6), or the attempt has other terms than
            the one before in the same round (9.1).
        NotListedError: the node is not on the roster.
    """
    _check_key(attempt, node, key)
    if isinstance(previous, ReadySent) and previous.attempt == attempt:
        return Move(state=previous, send=(previous.ready,), why=f"{attempt}: READY again")
    _check_may_join(previous, attempt, certificate)
    keys = AttemptKeys.derive(seed, attempt, node)
    body = Ready(
        **where(attempt, node),
        roster_root=attempt.roster.root,
        model_root=attempt.model_root,
        plan_digest=attempt.plan_digest,
        ek=keys.ek,
        seen_size=seen_size,
        seen_root=seen_root,
    )
    state = ReadySent(attempt=attempt, node=node, seed=seed, ready=Signed.make(key, body))
    return Move(
        state=state,
        send=(state.ready,),
        erased=("everything of the attempt before",) if previous is not None else (),
        why=f"{attempt}: READY",
    )


def _check_may_join(
    previous: NodeState | None, attempt: Attempt, certificate: AbortCertificate | None
) -> None:
    if previous is None:
        return
    last = previous.attempt
    if (last.federation, last.round.run) != (attempt.federation, attempt.round.run):
        raise ValueError("a state belongs to one run: keep one for each")
    if (attempt.round.number, attempt.number) <= (last.round.number, last.number):
        raise WrongPhaseError(f"{attempt} is not later than {last}, which this node has joined")
    if attempt.round != last.round:
        return  # a new round has a fresh update; the old one is final whatever it became
    if replace(last, number=attempt.number) != attempt:
        raise CheckFailedError(f"{attempt} has other terms than {last}", clause="9.1")
    match previous:
        case Committed() | Revealed() | Closed(committed=True):
            raise WrongPhaseError(f"this node committed in {last}: it is done with the round")
        case Uploaded() | AbortSent(uploaded=True) | Closed(uploaded=True):
            if certificate is None:
                raise WrongPhaseError(
                    f"this node uploaded in {last}: {attempt} needs {last.terms.threshold} signed"
                    " aborts of it"
                )
            check_abort_certificate(certificate, last)
        case AbortSent() | Closed():
            pass
        case _:
            raise _wrong(previous, f"{attempt} before it has aborted")


# -- DEAL --------------------------------------------------------------------------------------


def deal(state: NodeState, start: Start, key: Ed25519PrivateKey) -> Move:
    """Deal to U1, once START is found good.

    Raises:
        CheckFailedError: 3.2 to 3.5; this node's READY is missing or another (3.3).
        EquivocationError: a second, different START for the attempt.
        WrongPhaseError: not the turn for it.
    """
    if isinstance(state, Dealt):
        if state.start != start:
            raise EquivocationError(f"{state.attempt}: the coordinator sent a second START")
        return Move(state=state, send=(state.bundle,), why=f"{state.attempt}: DEAL again")
    if not isinstance(state, ReadySent):
        raise _wrong(state, "START")
    attempt, node = state.attempt, state.node
    started = check_start(start, attempt)
    if state.ready not in start.readys:
        raise CheckFailedError("START lacks this node's READY, or lists another", clause="3.3")
    keys = AttemptKeys.derive(state.seed, attempt, node)
    bundle = make_bundle(started, node, keys, key)
    return Move(
        state=Dealt(attempt=attempt, node=node, seed=state.seed, start=start, bundle=bundle),
        send=(bundle,),
        why=f"{attempt}: DEAL to {len(started.readys)} nodes",
    )


# -- DEAL_OK or COMPLAINT ----------------------------------------------------------------------


def acknowledge(
    state: NodeState, delivery: Delivery, key: Ed25519PrivateKey, *, checkpoint: bytes
) -> Move:
    """Open every packet; sign DEAL_OK on the ctx, or complain and give the attempt up.

    Args:
        delivery: all DEALs of U1 with this node's packets.
        checkpoint: text of a checkpoint that this node has itself verified and that extends the
            last one it saw.

    Raises:
        CheckFailedError: 4.1 to 4.5, or the delivery names another checkpoint (4.10): what the
            coordinator relayed cannot be right. Nothing was sent; it may be asked again.
        EquivocationError: a second, different DELIVERY after DEAL_OK.
        WrongPhaseError: not the turn for it.
    """
    deals = tuple(parcel.deal for parcel in delivery.parcels)
    if isinstance(state, DealOkSent):
        if (state.deals, state.checkpoint) != (deals, delivery.checkpoint):
            raise EquivocationError(f"{state.attempt}: the coordinator sent a second DELIVERY")
        return Move(state=state, send=(state.deal_ok,), why=f"{state.attempt}: DEAL_OK again")
    if not isinstance(state, Dealt):
        raise _wrong(state, "DELIVERY")
    attempt, node = state.attempt, state.node
    if delivery.checkpoint != checkpoint:
        raise CheckFailedError("the delivery names a checkpoint nobody verified", clause="4.10")
    agreed = check_deals(deals, state.started(), checkpoint)
    if state.bundle.deal not in deals:
        raise CheckFailedError("this node's own DEAL was exchanged for another", clause="4.4")
    check_parcels(delivery.parcels, agreed, node)
    keys = AttemptKeys.derive(state.seed, attempt, node)
    try:
        held = open_parcels(delivery.parcels, agreed, node, keys)
    except BadShareError as error:
        return _complain(state, error, keys, key)
    deal_ok = Signed.make(key, DealOk(**where(attempt, node), ctx=agreed.ctx))
    return Move(
        state=DealOkSent(
            attempt=attempt,
            node=node,
            start=state.start,
            deals=deals,
            checkpoint=checkpoint,
            held=held,
            rk_secret=keys.rk_secret,
            self_seed=keys.self_seed,
            noise_seed=keys.noise_seed,
            deal_ok=deal_ok,
        ),
        send=(deal_ok,),
        erased=("seed", "EK", "the coefficients of the dealt shares"),
        why=f"{attempt}: all {len(deals)} packets are good",
    )


def _complain(
    state: Dealt, error: BadShareError, keys: AttemptKeys, key: Ed25519PrivateKey
) -> Move:
    """Complain with the dead EK: without this node's DEAL_OK nobody gets a GO, so no masked
    vector of the attempt will ever exist for the shares to open."""
    if error.culprit is None:
        raise error
    attempt, node = state.attempt, state.node
    body = Complaint(
        **where(attempt, node),
        ctx_deal=state.started().ctx_deal,
        against=error.culprit,
        ek_secret=keys.ek_secret,
    )
    complaint = Signed.make(key, body)
    given_up = _abort_body(attempt, node, "secagg.bad_packet", key)
    return Move(
        state=AbortSent(
            attempt=attempt, node=node, uploaded=False, abort=given_up, complaint=complaint
        ),
        send=(complaint, given_up),
        erased=_ALL,
        why=f"{attempt}: {error}",
    )


# -- GO, masks and UPLOAD ----------------------------------------------------------------------


def go(state: NodeState, message: Go) -> Move:
    """Everybody is on this node's ctx: masks may be made.

    Raises:
        CheckFailedError: somebody is missing, or is on another ctx (4.8).
        WrongPhaseError: not the turn for it.
    """
    if isinstance(state, Masking):
        return Move(state=state, why=f"{state.attempt}: GO again")
    if not isinstance(state, DealOkSent):
        raise _wrong(state, "GO")
    check_go(message, state.agreed())
    return Move(
        state=Masking(
            attempt=state.attempt,
            node=state.node,
            start=state.start,
            deals=state.deals,
            checkpoint=state.checkpoint,
            held=state.held,
            rk_secret=state.rk_secret,
            self_seed=state.self_seed,
            noise_seed=state.noise_seed,
        ),
        why=f"{state.attempt}: all {len(state.deals)} nodes agree on one context",
    )


def mask_adder(state: NodeState, ring: Ring) -> MaskAdder:
    """The masks of this node's vector. Adding them to two different vectors would tell their
    difference: the caller spools one masked vector and sends no byte of any other.

    Raises:
        WrongPhaseError: GO has not come, or the upload is fixed already.
    """
    if not isinstance(state, Masking):
        raise _wrong(state, "a request for masks")
    agreed = state.agreed()
    masks = node_masks(
        agreed.ctx,
        index=agreed.started.indices[state.node],
        self_seed=state.self_seed,
        rk_secret=state.rk_secret,
        rks=agreed.rks,
    )
    return MaskAdder(masks, ring)


def upload(state: NodeState, key: Ed25519PrivateKey, *, upload_root: Digest, length: int) -> Move:
    """Fix the masked vector. Before the durable state says so no byte of it may leave (5.2).

    Args:
        upload_root: of the masked vector, which is spooled and durable.
        length: its bytes.

    Raises:
        ConflictingUploadError: another vector has been fixed before (5.3).
        WrongPhaseError: not the turn for it.
    """
    if isinstance(state, Uploaded):
        body = state.header.body
        if (body.upload_root, body.length) != (upload_root, length):
            raise ConflictingUploadError(
                f"{state.attempt}: this node has fixed another masked vector before"
            )
        return Move(state=state, send=(state.header,), why=f"{state.attempt}: UPLOAD again")
    if not isinstance(state, Masking):
        raise _wrong(state, "an upload")
    attempt, node = state.attempt, state.node
    ctx = state.agreed().ctx
    header = Signed.make(
        key, Upload(**where(attempt, node), ctx=ctx, upload_root=upload_root, length=length)
    )
    return Move(
        state=Uploaded(
            attempt=attempt,
            node=node,
            start=state.start,
            deals=state.deals,
            checkpoint=state.checkpoint,
            held=state.held,
            header=header,
        ),
        send=(header,),
        erased=("RK", "b"),
        why=f"{attempt}: {length} masked bytes are fixed",
    )


# -- the verdict -------------------------------------------------------------------------------


def commit(state: NodeState, survivors: Survivors, key: Ed25519PrivateKey) -> Move:
    """Sign this survivor list, and with it give up every other end of the round (6.4).

    Raises:
        CheckFailedError: 6.1 to 6.3, 6.6: the caller may ``abort`` instead.
        EquivocationError: this node committed to another list, or aborted.
        WrongPhaseError: not the turn for it.
    """
    if isinstance(state, AbortSent):
        raise EquivocationError(f"{state.attempt}: this node has aborted and cannot commit")
    if isinstance(state, Committed):
        if state.survivors != survivors:
            raise EquivocationError(f"{state.attempt}: this node committed to another list")
        return Move(state=state, send=(state.commit,), why=f"{state.attempt}: COMMIT again")
    if not isinstance(state, Uploaded):
        raise _wrong(state, "SURVIVORS")
    attempt, node = state.attempt, state.node
    listed = check_survivors(survivors, state.agreed())
    if state.header not in survivors.headers:
        raise CheckFailedError(
            "the survivor list lacks this node's upload, or names another", clause="6.2"
        )
    signed = Signed.make(
        key, Commit(**where(attempt, node), ctx=listed.agreed.ctx, survivors=listed.digest)
    )
    return Move(
        state=Committed(
            attempt=attempt,
            node=node,
            start=state.start,
            deals=state.deals,
            checkpoint=state.checkpoint,
            held=state.held,
            header=state.header,
            survivors=survivors,
            commit=signed,
        ),
        send=(signed,),
        why=f"{attempt}: COMMIT to {len(survivors.headers)} survivors",
    )


def abort(state: NodeState, reason: str, key: Ed25519PrivateKey) -> Move:
    """Give the attempt up, for good: nothing of it will be revealed by this node.

    Args:
        reason: a rule id or short code, e.g. ``secagg.too_few_survivors``; it becomes public.

    Raises:
        EquivocationError: this node has committed (6.4).
        WrongPhaseError: the attempt is closed.
        MalformedMessageError: the reason is no code.
    """
    attempt, node = state.attempt, state.node
    match state:
        case Committed() | Revealed():
            raise EquivocationError(f"{attempt}: this node has committed and cannot abort")
        case Closed():
            raise _wrong(state, "an abort")
        case AbortSent():
            again = (state.complaint, state.abort) if state.complaint else (state.abort,)
            return Move(state=state, send=again, why=f"{attempt}: ABORT again")
        case _:
            signed = _abort_body(attempt, node, reason, key)
            uploaded = isinstance(state, Uploaded)
            return Move(
                state=AbortSent(attempt=attempt, node=node, uploaded=uploaded, abort=signed),
                send=(signed,),
                erased=_ALL,
                why=f"{attempt}: ABORT, {reason}",
            )


_ALL = ("every key and share of the attempt",)


def _abort_body(
    attempt: Attempt, node: NodeId, reason: str, key: Ed25519PrivateKey
) -> Signed[Abort]:
    body = Abort(**where(attempt, node), roster_root=attempt.roster.root, reason=reason)
    return Signed.make(key, body)


# -- REVEAL and the end ------------------------------------------------------------------------


def reveal(state: NodeState, certificate: CommitCertificate, key: Ed25519PrivateKey) -> Move:
    """Reveal one share for each member of U1, once enough survivors committed to one list.

    Raises:
        CheckFailedError: fewer than t commits to this node's own list (7.1).
        EquivocationError: a commit to another list is among them.
        WrongPhaseError: this node has not committed.
    """
    if isinstance(state, Revealed):
        return Move(state=state, send=(state.reveal,), why=f"{state.attempt}: REVEAL again")
    if not isinstance(state, Committed):
        raise _wrong(state, "commits")
    attempt, node = state.attempt, state.node
    listed = check_survivors(state.survivors, state.agreed())
    check_commit_certificate(certificate, listed)
    shares = []
    for held in state.held:
        kind = listed.kind_for(held.dealer)
        opening = held.opening(kind)
        shares.append(
            RevealedShare(
                of=held.dealer,
                kind=kind,
                share=opening.share,
                salt=opening.salt,
                path=opening.path,
            )
        )
    body = Reveal(
        **where(attempt, node),
        ctx=listed.agreed.ctx,
        survivors=listed.digest,
        shares=tuple(shares),
    )
    signed = Signed.make(key, body)
    return Move(
        state=Revealed(
            attempt=attempt,
            node=node,
            header=state.header,
            commit=state.commit,
            reveal=signed,
        ),
        send=(signed,),
        erased=("every share that was not revealed",),
        why=f"{attempt}: REVEAL, {len(listed.headers)} survived, {len(listed.lost)} lost",
    )


def close(state: NodeState, outcome: Literal["released", "aborted", "burned"]) -> Move:
    """The attempt has ended: keep what this node may not do again, erase the rest.

    Args:
        outcome: what the log says; it goes into the journal line only. What is allowed afterwards
            follows from what this node itself did, never from what it was told.
    """
    match state:
        case Closed():
            return Move(state=state, why=f"{state.attempt}: closed already")
        case Committed() | Revealed():
            uploaded, committed = True, True
        case Uploaded() | AbortSent(uploaded=True):
            uploaded, committed = True, False
        case _:
            uploaded, committed = False, False
    return Move(
        state=Closed(
            attempt=state.attempt, node=state.node, uploaded=uploaded, committed=committed
        ),
        erased=_ALL,
        why=f"{state.attempt}: {outcome}",
    )
