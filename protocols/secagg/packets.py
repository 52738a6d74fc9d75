"""Shares sealed for one peer, each attributable to its dealer.

A dealer shares two secrets among U1, its RK and its b, and commits to all shares at once:
``share_root`` is the Merkle root over two leaves for each member of U1, RK then b,

    leaf = SHA-256 of (ctx_deal | dealer | receiver | kind | share | salt), framed

so a share that is later revealed either matches what its dealer signed, or the revealer is lying.
The salt hides a share from whoever sees its leaf as somebody's sibling. A packet holds one
receiver's two shares, their salts and the common rest of their paths:

    33 B RK share | 33 B b share | 16 B RK salt | 16 B b salt | 32 B x path

sealed with AES-256-GCM (NIST SP 800-38D) under a key used for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocols.canonical import hash_fields
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest, NodeId
from protocols.secagg import codec, shamir
from protocols.secagg.context import u16
from protocols.secagg.errors import BadShareError
from protocols.secagg.keys import SALT_BYTES, AttemptKeys, packet_key
from protocols.secagg.paths import MAX_PATH, inclusion_path, root_from_path
from protocols.tlog.merkle import leaf_hash, tree_root

NONCE: Final = bytes(12)  # each packet key seals exactly one packet
TAG_BYTES: Final = 16
FIXED_BYTES: Final = 2 * shamir.SHARE_BYTES + 2 * SALT_BYTES
MAX_PACKET: Final = FIXED_BYTES + 32 * (MAX_PATH - 1) + TAG_BYTES


class Kind(StrEnum):
    """Which of a member's two secrets a share belongs to."""

    KEY = "rk"
    SEED = "b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One share with what proves that its dealer dealt it. Secret until it is revealed."""

    share: bytes = field(repr=False)  # 33 bytes
    salt: bytes = field(repr=False)  # 16 bytes
    path: tuple[bytes, ...]  # hashes up to share_root


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShares:
    """The two shares that one dealer dealt to this node."""

    SCHEMA: ClassVar[str] = "minga.secagg.held/1"
    FIELDS: ClassVar[Mapping[str, codec.Codec[Any]]] = {
        "dealer": codec.NODE,
        "rk_share": codec.hex_of(shamir.SHARE_BYTES),
        "b_share": codec.hex_of(shamir.SHARE_BYTES),
        "rk_salt": codec.hex_of(SALT_BYTES),
        "b_salt": codec.hex_of(SALT_BYTES),
        "rest": codec.list_of(codec.hex_of(32), most=MAX_PATH),
        "rk_leaf": codec.hex_of(32),
        "b_leaf": codec.hex_of(32),
    }

    dealer: NodeId
    rk_share: bytes = field(repr=False)
    b_share: bytes = field(repr=False)
    rk_salt: bytes = field(repr=False)
    b_salt: bytes = field(repr=False)
    rest: tuple[bytes, ...] = field(repr=False)  # path of the pair's common parent
    rk_leaf: bytes = field(repr=False)
    b_leaf: bytes = field(repr=False)

    def opening(self, kind: Kind) -> Opening:
        """What is revealed for one of the two; the other stays hidden behind its leaf hash."""
        if kind is Kind.KEY:
            return Opening(share=self.rk_share, salt=self.rk_salt, path=(self.b_leaf, *self.rest))
        return Opening(share=self.b_share, salt=self.b_salt, path=(self.rk_leaf, *self.rest))


def share_leaf(
    ctx_deal: Digest, *, dealer: int, to: int, kind: Kind, share: bytes, salt: bytes
) -> bytes:
    """Leaf hash of one share, 32 bytes."""
    return leaf_hash(
        hash_fields(
            "minga/share-leaf/v1",
            bytes.fromhex(ctx_deal),
            u16(dealer),
            u16(to),
            kind.value.encode(),
            share,
            salt,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealing:
    """Everything one node deals: the commitment, and what each member of U1 gets."""

    share_root: Digest
    held: Mapping[int, HeldShares] = field(repr=False)  # by the receiver's index


def deal_shares(
    ctx_deal: Digest,
    keys: AttemptKeys,
    *,
    dealer: NodeId,
    dealer_index: int,
    threshold: int,
    indices: Sequence[int],
) -> Dealing:
    """Share RK and b among the members of U1.

    Args:
        indices: of U1 in ascending order, the dealer's own among them.
    """
    rk = shamir.split(
        keys.rk_secret, threshold=threshold, indices=indices, randomness=keys.rk_randomness
    )
    b = shamir.split(
        keys.self_seed, threshold=threshold, indices=indices, randomness=keys.b_randomness
    )
    leaves: list[bytes] = []
    for place, to in enumerate(indices):
        for kind, shares in ((Kind.KEY, rk), (Kind.SEED, b)):
            salt = keys.salt(to, len(leaves) % 2)
            leaves.append(
                share_leaf(
                    ctx_deal, dealer=dealer_index, to=to, kind=kind, share=shares[place], salt=salt
                )
            )
    held = {
        to: HeldShares(
            dealer=dealer,
            rk_share=rk[place],
            b_share=b[place],
            rk_salt=keys.salt(to, 0),
            b_salt=keys.salt(to, 1),
            rest=inclusion_path(leaves, 2 * place)[1:],
            rk_leaf=leaves[2 * place],
            b_leaf=leaves[2 * place + 1],
        )
        for place, to in enumerate(indices)
    }
    return Dealing(share_root=Digest(tree_root(leaves).hex()), held=held)


def _associated(ctx_deal: Digest, dealer: int, to: int) -> bytes:
    return bytes.fromhex(ctx_deal) + u16(dealer) + u16(to)


def seal(
    held: HeldShares,
    ctx_deal: Digest,
    keys: AttemptKeys,
    peer_ek: bytes,
    *,
    dealer: int,
    to: int,
) -> bytes:
    """Seal one receiver's shares: AES-256-GCM, AAD = ctx_deal || dealer || to."""
    plain = held.rk_share + held.b_share + held.rk_salt + held.b_salt + b"".join(held.rest)
    key = packet_key(ctx_deal, keys.ek_secret, peer_ek, dealer=dealer, to=to)
    return AESGCM(key).encrypt(NONCE, plain, _associated(ctx_deal, dealer, to))


def unseal(
    packet: bytes,
    ctx_deal: Digest,
    own_ek_secret: bytes,
    dealer_ek: bytes,
    *,
    dealer: NodeId,
    dealer_index: int,
    to: int,
    place: int,
    ready: int,
    share_root: Digest,
) -> HeldShares:
    """Open a packet and check both shares against the dealer's commitment.

    Args:
        packet: as the dealer signed it.
        place: the receiver's place in U1, from 0; ready: members of U1.

    Raises:
        BadShareError: it does not open, has not the right form, or holds shares other than the
            committed ones. The packet is signed, so this proves the dealer at fault to whoever
            holds the receiver's EK.
    """
    key = packet_key(ctx_deal, own_ek_secret, dealer_ek, dealer=dealer_index, to=to)
    try:
        plain = AESGCM(key).decrypt(NONCE, packet, _associated(ctx_deal, dealer_index, to))
    except (InvalidTag, ValueError):
        raise BadShareError(
            f"the packet from {dealer} does not open", clause="4.6", culprit=dealer
        ) from None
    rest_bytes = len(plain) - FIXED_BYTES
    if rest_bytes < 0 or rest_bytes % 32 or rest_bytes // 32 >= MAX_PATH:
        raise BadShareError(
            f"the packet from {dealer} has {len(plain)} bytes inside", clause="4.6", culprit=dealer
        )
    rk_share, b_share, rk_salt, b_salt = plain[:33], plain[33:66], plain[66:82], plain[82:98]
    leaves = [
        share_leaf(ctx_deal, dealer=dealer_index, to=to, kind=kind, share=share, salt=salt)
        for kind, share, salt in ((Kind.KEY, rk_share, rk_salt), (Kind.SEED, b_share, b_salt))
    ]
    held = HeldShares(
        dealer=dealer,
        rk_share=rk_share,
        b_share=b_share,
        rk_salt=rk_salt,
        b_salt=b_salt,
        rest=tuple(plain[k : k + 32] for k in range(FIXED_BYTES, len(plain), 32)),
        rk_leaf=leaves[0],
        b_leaf=leaves[1],
    )
    for kind in Kind:
        check_opening(
            held.opening(kind),
            ctx_deal,
            dealer=dealer,
            dealer_index=dealer_index,
            to=to,
            place=place,
            ready=ready,
            kind=kind,
            share_root=share_root,
            culprit=dealer,
            clause="4.6",
        )
    return held


def check_opening(
    opening: Opening,
    ctx_deal: Digest,
    *,
    dealer: NodeId,
    dealer_index: int,
    to: int,
    place: int,
    ready: int,
    kind: Kind,
    share_root: Digest,
    culprit: NodeId,
    clause: str,
) -> None:
    """Check that a share is the one that ``dealer`` committed to for the member of index ``to``.

    Args:
        place: that member's place in U1, from 0; ready: members of U1.
        culprit, clause: who and what to name: the dealer when its packet is opened, the revealer
            when a share is revealed.

    Raises:
        BadShareError: it is not.
    """
    try:
        shamir.parse_share(opening.share)
        leaf = share_leaf(
            ctx_deal,
            dealer=dealer_index,
            to=to,
            kind=kind,
            share=opening.share,
            salt=opening.salt,
        )
        leaf_place = 2 * place + (kind is Kind.SEED)
        root = root_from_path(leaf, leaf_place, 2 * ready, opening.path)
    except MalformedMessageError as error:
        raise BadShareError(
            f"the {kind} share of {dealer}: {error}", clause=clause, culprit=culprit
        ) from None
    if root.hex() != share_root:
        raise BadShareError(
            f"the {kind} share of {dealer} is not the one it committed to",
            clause=clause,
            culprit=culprit,
        )
