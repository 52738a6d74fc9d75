"""What an attempt is bound to: roster, terms, and the two context digests.

``ctx_deal`` names everything that is fixed before shares are dealt: federation, round, attempt,
roster, starting model, plan and the READY messages of all members. ``ctx`` adds the DEALs and the
log checkpoint that every member was shown. Every packet key hangs on the first, every mask key on
the second: members who were shown different things cannot open each other's packets, and their
masks do not cancel.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from protocols.canonical import hash_fields
from protocols.crypto.signatures import parse_public_key
from protocols.errors import MalformedMessageError, NotListedError, PlanRefusedError
from protocols.identifiers import Digest, FederationId, NodeId, RoundId, parse_node_id
from protocols.secagg import codec
from protocols.secagg.threshold import MAX_ROSTER, SecaggTerms
from protocols.tlog.merkle import leaf_hash, tree_root

MAX_ATTEMPT = 2**16 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One line of the roster: an institution and the key that signs for it."""

    SCHEMA: ClassVar[str] = "minga.secagg.member/1"
    FIELDS: ClassVar[Mapping[str, codec.Codec[Any]]] = {"node": codec.NODE, "key": codec.hex_of(32)}

    node: NodeId
    key: bytes  # 32 bytes, Ed25519 public identity key IK

    def __post_init__(self) -> None:
        parse_node_id(self.node)
        parse_public_key(self.key)


@dataclass(frozen=True)
class Roster:
    """The members of a plan, in ascending order; a member's index is its place, from 1.

    Indices name shares and the sign of a pair mask, so every party must count alike: order and
    keys are hashed into ``root``. Two members never share a key: one institution, one voice.
    """

    SCHEMA: ClassVar[str] = "minga.secagg.roster/1"
    FIELDS: ClassVar[Mapping[str, codec.Codec[Any]]] = {
        "members": codec.list_of(codec.record_of(Member), most=MAX_ROSTER)
    }

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        nodes = [member.node for member in self.members]
        if nodes != sorted(set(nodes)):
            raise MalformedMessageError("the roster must be unique and in ascending order")
        if len({member.key for member in self.members}) != len(nodes):
            raise MalformedMessageError("two members of the roster have the same key")
        if not 1 <= len(nodes) <= MAX_ROSTER:
            raise MalformedMessageError(f"a roster has 1 to {MAX_ROSTER} members")

    @functools.cached_property
    def _places(self) -> dict[NodeId, int]:
        return {member.node: place for place, member in enumerate(self.members, start=1)}

    def __contains__(self, node: object) -> bool:
        return node in self._places

    def __len__(self) -> int:
        return len(self.members)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(member.node for member in self.members)

    def index(self, node: NodeId) -> int:
        """From 1, in roster order.

        Raises:
            NotListedError: no member of that name.
        """
        place = self._places.get(node)
        if place is None:
            raise NotListedError(f"{node} is not on the roster")
        return place

    def key(self, node: NodeId) -> bytes:
        """32 bytes, the member's Ed25519 public key.

        Raises:
            NotListedError: no member of that name.
        """
        return self.members[self.index(node) - 1].key

    @functools.cached_property
    def root(self) -> Digest:
        """Merkle root (RFC 6962) over one leaf for each member: index, name, key."""
        leaves = [
            leaf_hash(hash_fields("minga/roster-member/v1", u16(place), m.node.encode(), m.key))
            for place, m in enumerate(self.members, start=1)
        ]
        return Digest(tree_root(leaves).hex())


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try of one round's secure sum, as the plan and the round fix it before any message."""

    SCHEMA: ClassVar[str] = "minga.secagg.attempt/1"
    # FIELDS is set below, where SecaggTerms has its codec.
    FIELDS: ClassVar[Mapping[str, codec.Codec[Any]]]

    federation: FederationId
    round: RoundId
    number: int  # attempts of a round count from 1
    roster: Roster
    terms: SecaggTerms
    model_root: Digest  # the round's starting model, as this party derived it
    plan_digest: Digest

    def __post_init__(self) -> None:
        if self.terms.roster_size != len(self.roster):
            raise MalformedMessageError(
                f"the terms are for {self.terms.roster_size} members, the roster has"
                f" {len(self.roster)}"
            )
        if not 1 <= self.number <= MAX_ATTEMPT:
            raise MalformedMessageError(f"an attempt has a number from 1 to {MAX_ATTEMPT}")

    def __str__(self) -> str:
        return f"round {self.round}, attempt {self.number}"

    def ctx_deal(self, ready_bodies: Sequence[bytes]) -> Digest:
        """The digest that dealing is bound to.

        Args:
            ready_bodies: canonical bodies of the READY messages of U1, in roster order. Each names
                its node and its EK, so the set, the keys and their owners are all fixed by it.
        """
        ready_set = hash_fields("minga/ready-set/v1", *ready_bodies)
        return Digest(
            hash_fields(
                "minga/ctx-deal/v1",
                self.federation.encode(),
                self.round.run.encode(),
                self.round.number.to_bytes(8, "big"),
                self.number.to_bytes(8, "big"),
                bytes.fromhex(self.roster.root),
                bytes.fromhex(self.model_root),
                bytes.fromhex(self.plan_digest),
                ready_set,
            ).hex()
        )


_TERMS_FIELDS = ("roster_size", "threshold", "colluders", "min_surviving")
_SIZE = codec.integer(0, MAX_ROSTER)


def _read_terms(value: Any) -> SecaggTerms:
    if not isinstance(value, list) or len(value) != len(_TERMS_FIELDS):
        raise MalformedMessageError("want the four sizes of a secure sum")
    read = dict(zip(_TERMS_FIELDS, map(_SIZE.decode, value), strict=True))
    try:
        return SecaggTerms(**read)
    except PlanRefusedError as error:
        raise MalformedMessageError(str(error)) from None


Attempt.FIELDS = {
    "federation": codec.FEDERATION,
    "round": codec.ROUND,
    "number": codec.integer(1, MAX_ATTEMPT),
    "roster": codec.record_of(Roster),
    "terms": codec.Codec(
        encode=lambda terms: [getattr(terms, name) for name in _TERMS_FIELDS], decode=_read_terms
    ),
    "model_root": codec.DIGEST,
    "plan_digest": codec.DIGEST,
}


def ctx_of(ctx_deal: Digest, deal_bodies: Sequence[bytes], checkpoint: bytes) -> Digest:
    """The digest that masks, headers and verdicts are bound to.

    Args:
        ctx_deal: from ``Attempt.ctx_deal``.
        deal_bodies: canonical bodies of the DEALs of U1, in roster order.
        checkpoint: text of the log checkpoint without its signatures; it commits to the transcript
            of the round before. The caller has verified it and its witnesses.
    """
    deals = hash_fields("minga/deals/v1", *deal_bodies)
    return Digest(hash_fields("minga/ctx/v1", bytes.fromhex(ctx_deal), deals, checkpoint).hex())


def survivors_digest(ctx: Digest, header_bodies: Sequence[bytes]) -> Digest:
    """H(U3): the survivor list with what each of them uploaded.

    Args:
        ctx: of the attempt.
        header_bodies: canonical bodies of the upload headers of U3, in roster order.
    """
    return Digest(hash_fields("minga/survivors/v1", bytes.fromhex(ctx), *header_bodies).hex())


def u16(value: int) -> bytes:
    """Two bytes, big-endian: how an index enters a key derivation or an associated datum."""
    return value.to_bytes(2, "big")
