"""The coordinator's side of a secure sum: what it may accept, and what it makes of it.

Nothing here needs to be trusted by anybody: every list made below is checked again by each node
before it acts, and by auditors afterwards, with the functions of ``checks``. A coordinator that
skips a check only breaks its own round. It holds no secret before the members reveal theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from protocols.errors import EquivocationError
from protocols.identifiers import NodeId
from protocols.secagg import shamir
from protocols.secagg.checks import (
    Agreed,
    Listed,
    Started,
    check_abort_certificate,
    check_commit_certificate,
    check_deals,
    packet_leaves,
)
from protocols.secagg.context import Attempt
from protocols.secagg.errors import BadShareError, CheckFailedError, TooFewSharesError
from protocols.secagg.messages import (
    Abort,
    AbortCertificate,
    Body,
    Commit,
    CommitCertificate,
    DealBundle,
    DealOk,
    Delivery,
    Go,
    OpenedSecret,
    Parcel,
    Ready,
    Reveal,
    Signed,
    Start,
    Survivors,
    Transcript,
    Upload,
)
from protocols.secagg.packets import Kind
from protocols.secagg.paths import inclusion_path
from protocols.secagg.unmask import OpenedSecrets, check_secret

B = TypeVar("B", bound=Body)


def is_new(signed: Signed[B], known: Mapping[NodeId, Signed[B]]) -> bool:
    """Whether a message is the first of its kind from its sender in this attempt.

    Args:
        signed: already checked.
        known: what was accepted before, by sender.

    Returns:
        False for the same message again: answer as the first time, count nothing.

    Raises:
        EquivocationError: the sender said something else before; both messages are evidence.
    """
    before = known.get(signed.body.node)
    if before is None:
        return True
    if before.body != signed.body:
        raise EquivocationError(
            f"{signed.body.node} sent a second, different {type(signed.body).__name__}"
        )
    return False


def conflict(first: Signed[Any], second: Signed[Any]) -> str | None:
    """Whether two messages of one member contradict each other: evidence against it.

    Both are verified by the caller. A member owes one READY, DEAL, DEAL_OK, UPLOAD and REVEAL for
    an attempt, one COMMIT for a round, and never both COMMIT and ABORT for an attempt.

    Returns:
        One sentence, or None when an honest member may have sent both.
    """
    a, b = first.body, second.body
    if (a.federation, a.round, a.node) != (b.federation, b.round, b.node) or a == b:
        return None
    same_attempt = a.attempt == b.attempt
    if isinstance(a, Commit) and isinstance(b, Commit):
        return f"{a.node} committed to two survivor lists of round {a.round}"
    if not same_attempt:
        return None
    kinds = {type(a).__name__, type(b).__name__}
    if kinds == {"Commit", "Abort"}:
        return f"{a.node} committed and aborted in round {a.round}, attempt {a.attempt}"
    if kinds == {"Reveal", "Abort"}:
        return f"{a.node} aborted and revealed in round {a.round}, attempt {a.attempt}"
    if type(a) is type(b) and not isinstance(a, Abort):
        return f"{a.node} sent two different {type(a).__name__} messages"
    return None


def _ordered(messages: Mapping[NodeId, Signed[B]]) -> tuple[Signed[B], ...]:
    return tuple(messages[node] for node in sorted(messages))


def make_start(readys: Mapping[NodeId, Signed[Ready]]) -> Start:
    """START with all valid READYs of the attempt: leaving one out is censorship that shows."""
    return Start(readys=_ordered(readys))


def make_deliveries(
    bundles: Mapping[NodeId, DealBundle], started: Started, checkpoint: bytes
) -> tuple[Agreed, dict[NodeId, Delivery]]:
    """What each member of U1 is sent once all have dealt.

    Args:
        bundles: of exactly U1, each after ``checks.check_bundle``.
        checkpoint: text of the witnessed log checkpoint everybody will be shown.

    Raises:
        CheckFailedError: 4.1, 4.3, 4.4.
    """
    ordered = [bundles[node] for node in sorted(bundles)]
    agreed = check_deals([bundle.deal for bundle in ordered], started, checkpoint)
    parcels: dict[NodeId, list[Parcel]] = {node: [] for node in started.readys}
    for bundle in ordered:
        dealer = bundle.deal.body.node
        sealed = {packet.to: packet.sealed for packet in bundle.packets}
        leaves = packet_leaves(dealer, sealed, started)
        for to, place in started.places.items():
            path = () if to == dealer else inclusion_path(leaves, place)
            parcels[to].append(Parcel(deal=bundle.deal, sealed=sealed.get(to), path=path))
    return agreed, {
        node: Delivery(parcels=tuple(found), checkpoint=checkpoint)
        for node, found in parcels.items()
    }


def make_go(deal_oks: Mapping[NodeId, Signed[DealOk]]) -> Go:
    """GO with every member's DEAL_OK."""
    return Go(deal_oks=_ordered(deal_oks))


def make_survivors(headers: Mapping[NodeId, Signed[Upload]]) -> Survivors:
    """U3: all whose masked vector is complete and durable. A list too short to open may be
    proposed too; members answer it with ABORT."""
    return Survivors(headers=_ordered(headers))


def make_commit_certificate(
    commits: Mapping[NodeId, Signed[Commit]], listed: Listed
) -> CommitCertificate:
    """The proof that this list may be opened.

    Raises:
        CheckFailedError: fewer than t commits (7.1).
    """
    certificate = CommitCertificate(commits=_ordered(commits))
    check_commit_certificate(certificate, listed)
    return certificate


def make_abort_certificate(
    aborts: Mapping[NodeId, Signed[Abort]], attempt: Attempt
) -> AbortCertificate:
    """The proof that nothing of this attempt can be opened.

    Raises:
        CheckFailedError: fewer than t aborts (9.6).
    """
    certificate = AbortCertificate(aborts=_ordered(aborts))
    check_abort_certificate(certificate, attempt)
    return certificate


# -- opening -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """The secrets that open a sum, and who dealt badly on the way."""

    opened: OpenedSecrets
    faults: Mapping[NodeId, str]  # dealers whose shares do not agree; the secrets are right anyway


def reconstruct(reveals: Iterable[Reveal], listed: Listed) -> Reconstruction:
    """One secret for each member of U1, each as its owner committed to it.

    Every revealed share has been checked against its dealer's commitment, so shares that do not
    lie on one polynomial are the dealer's doing. Its secret is still found when any t consecutive
    shares give what it committed to.

    Args:
        reveals: of distinct survivors, each after ``checks.check_reveal``.

    Raises:
        TooFewSharesError: fewer than t survivors revealed.
        BadShareError: a dealer's shares give nothing it committed to; ``culprit`` names it. The
            sum cannot be opened.
    """
    started = listed.agreed.started
    threshold = started.attempt.terms.threshold
    shares: dict[NodeId, dict[int, bytes]] = {node: {} for node in started.readys}
    for reveal in reveals:
        index = started.indices[reveal.node]
        for share in reveal.shares:
            shares[share.of][index] = share.share
    seeds: dict[NodeId, bytes] = {}
    secrets: dict[NodeId, bytes] = {}
    faults: dict[NodeId, str] = {}
    for node, found in shares.items():
        kind = listed.kind_for(node)

        def is_right(secret: bytes, node: NodeId = node, kind: Kind = kind) -> bool:
            try:
                check_secret(
                    listed.agreed.deals[node],
                    started.indices[node],
                    self_seed=secret if kind is Kind.SEED else None,
                    rk_secret=secret if kind is Kind.KEY else None,
                )
            except CheckFailedError:
                return False
            return True

        secret, fault = _recover(found, threshold, is_right)
        if secret is None:
            raise BadShareError(
                f"the {kind} shares that {node} dealt do not open: {fault}",
                clause="8.4",
                culprit=node,
            )
        if fault is not None:
            faults[node] = fault
        (seeds if kind is Kind.SEED else secrets)[node] = secret
    return Reconstruction(
        opened=OpenedSecrets(self_seeds=seeds, pair_secrets=secrets), faults=faults
    )


def _recover(
    shares: Mapping[int, bytes], threshold: int, is_right: Callable[[bytes], bool]
) -> tuple[bytes | None, str | None]:
    """The secret that ``is_right`` accepts, and what is wrong with the shares, if anything."""
    if len(shares) < threshold:
        raise TooFewSharesError(f"{len(shares)} survivors have revealed, {threshold} are needed")
    fault = "they give another secret than the one committed to"
    try:
        secret = shamir.reconstruct(shares, threshold=threshold)
        if is_right(secret):
            return secret, None
    except BadShareError as error:
        fault = str(error)
    ordered = sorted(shares)
    for first in range(len(ordered) - threshold + 1):
        some = {x: shares[x] for x in ordered[first : first + threshold]}
        try:
            secret = shamir.reconstruct(some, threshold=threshold)
        except BadShareError:
            continue
        if is_right(secret):
            return secret, fault
    return None, fault


def make_transcript(
    *,
    start: Start,
    bundles: Mapping[NodeId, DealBundle],
    checkpoint: bytes,
    go: Go,
    survivors: Survivors,
    certificate: CommitCertificate,
    reveals: Mapping[NodeId, Signed[Reveal]],
    opened: OpenedSecrets,
) -> Transcript:
    """Everything that is published beside an opened sum."""

    def listed(secrets: Mapping[NodeId, bytes]) -> tuple[OpenedSecret, ...]:
        return tuple(OpenedSecret(node=node, secret=secrets[node]) for node in sorted(secrets))

    return Transcript(
        start=start,
        deals=tuple(bundles[node].deal for node in sorted(bundles)),
        checkpoint=checkpoint,
        go=go,
        survivors=survivors,
        certificate=certificate,
        reveals=_ordered(reveals),
        self_seeds=listed(opened.self_seeds),
        pair_secrets=listed(opened.pair_secrets),
    )
