"""Making a DEAL, opening the packets of the others, and judging a complaint."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest, NodeId
from protocols.secagg.checks import (
    Agreed,
    Started,
    check_body,
    check_bundle,
    packet_leaf,
    packet_leaves,
)
from protocols.secagg.context import Attempt
from protocols.secagg.errors import BadShareError, CheckFailedError
from protocols.secagg.keys import AttemptKeys, self_seed_commitment, x25519_public
from protocols.secagg.messages import Complaint, Deal, DealBundle, Packet, Parcel, Signed
from protocols.secagg.packets import Dealing, HeldShares, deal_shares, seal, unseal
from protocols.secagg.paths import root_from_path
from protocols.tlog.merkle import tree_root


def where(attempt: Attempt, node: NodeId) -> dict[str, Any]:
    """The fields that every body of ``node`` in ``attempt`` begins with."""
    return {
        "federation": attempt.federation,
        "round": attempt.round,
        "attempt": attempt.number,
        "node": node,
    }


def _shares(started: Started, node: NodeId, keys: AttemptKeys) -> Dealing:
    return deal_shares(
        started.ctx_deal,
        keys,
        dealer=node,
        dealer_index=started.indices[node],
        threshold=started.attempt.terms.threshold,
        indices=list(started.indices.values()),
    )


def make_bundle(
    started: Started, node: NodeId, keys: AttemptKeys, key: Ed25519PrivateKey
) -> DealBundle:
    """The DEAL of ``node`` with one sealed packet for each other member of U1."""
    own, dealing = started.indices[node], _shares(started, node, keys)
    sealed = {
        peer: seal(
            dealing.held[to],
            started.ctx_deal,
            keys,
            started.readys[peer].ek,
            dealer=own,
            to=to,
        )
        for peer, to in started.indices.items()
        if peer != node
    }
    body = Deal(
        **where(started.attempt, node),
        ctx_deal=started.ctx_deal,
        rk=keys.rk,
        seed_commitment=self_seed_commitment(started.ctx_deal, own, keys.self_seed),
        share_root=dealing.share_root,
        packets_root=Digest(tree_root(packet_leaves(node, sealed, started)).hex()),
    )
    packets = tuple(Packet(to=peer, sealed=packet) for peer, packet in sealed.items())
    return DealBundle(deal=Signed.make(key, body), packets=packets)


def check_parcels(parcels: tuple[Parcel, ...], agreed: Agreed, node: NodeId) -> None:
    """Each packet is the one that its dealer signed for this node.

    Raises:
        CheckFailedError: 4.5; the coordinator's doing, for it relays what the dealer signed.
    """
    started = agreed.started
    place, to, size = started.places[node], started.indices[node], len(started.readys)
    for parcel in parcels:
        dealer = parcel.node
        if (parcel.sealed is None) != (dealer == node):
            raise CheckFailedError(
                f"want one packet from each other member, see {dealer}", clause="4.5"
            )
        if parcel.sealed is None:
            continue
        leaf = packet_leaf(started.indices[dealer], to, parcel.sealed)
        try:
            root = root_from_path(leaf, place, size, parcel.path).hex()
        except MalformedMessageError as error:
            raise CheckFailedError(f"the packet from {dealer}: {error}", clause="4.5") from None
        if root != agreed.deals[dealer].packets_root:
            raise CheckFailedError(
                f"the packet from {dealer} is not the one it signed", clause="4.5"
            )


def open_parcels(
    parcels: tuple[Parcel, ...], agreed: Agreed, node: NodeId, keys: AttemptKeys
) -> tuple[HeldShares, ...]:
    """This node's shares of every member of U1, each checked against its dealer's commitment.

    Args:
        parcels: of exactly U1, after ``check_parcels``.

    Raises:
        BadShareError: 4.6; ``culprit`` is the dealer.
    """
    started = agreed.started
    held = []
    for parcel in parcels:
        if parcel.sealed is None:
            held.append(_shares(started, node, keys).held[started.indices[node]])
        else:
            deal = agreed.deals[parcel.node]
            held.append(_open(started, deal, node, keys.ek_secret, parcel.sealed))
    return tuple(held)


def _open(started: Started, deal: Deal, to: NodeId, ek_secret: bytes, sealed: bytes) -> HeldShares:
    return unseal(
        sealed,
        started.ctx_deal,
        ek_secret,
        started.readys[deal.node].ek,
        dealer=deal.node,
        dealer_index=started.indices[deal.node],
        to=started.indices[to],
        place=started.places[to],
        ready=len(started.readys),
        share_root=deal.share_root,
    )


def judge_complaint(
    signed: Signed[Complaint], bundle: DealBundle, started: Started
) -> tuple[NodeId, str]:
    """Who is at fault, the dealer or the complainant; anyone with the messages finds the same.

    Args:
        signed: names the dealer and carries the complainant's EK.
        bundle: what that dealer signed.

    Returns:
        The member at fault and one sentence.

    Raises:
        CheckFailedError, NotListedError, BadSignatureError: the complaint or the bundle is not
            valid evidence: wrong attempt, signature, context or dealer.
    """
    complaint = check_body(signed, started.attempt)
    deal = check_bundle(bundle, started)
    plaintiff, dealer = complaint.node, complaint.against
    if complaint.ctx_deal != started.ctx_deal or plaintiff not in started.readys:
        raise CheckFailedError("the complaint is about another START", clause="4.9")
    if dealer != deal.node or dealer == plaintiff:
        raise CheckFailedError(f"the complaint is not about {deal.node}'s packets", clause="4.9")
    if x25519_public(complaint.ek_secret) != started.readys[plaintiff].ek:
        return plaintiff, f"{plaintiff} complains with a key that is not its EK"
    sealed = next(packet.sealed for packet in bundle.packets if packet.to == plaintiff)
    try:
        _open(started, deal, plaintiff, complaint.ek_secret, sealed)
    except BadShareError as error:
        return dealer, str(error)
    return plaintiff, f"the packet from {dealer} to {plaintiff} is good"
