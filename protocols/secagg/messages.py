"""What is sent in a secure sum, byte for byte.

    READY   node -> coordinator   EK; the model, plan and roster this node goes by
    START   coordinator -> nodes  U1: the READYs of all who were ready in time
    DEAL    node -> coordinator   RK, commitments to b, to all shares and to all packets; packets
    DELIVERY coordinator -> node  the DEALs of U1, this node's packets, the log checkpoint
    DEAL_OK | COMPLAINT  node     everything opened, on this ctx | this dealer's packet is bad
    GO      coordinator -> nodes  the DEAL_OKs of all of U1
    UPLOAD  node -> coordinator   header of the masked vector; the bytes travel elsewhere
    SURVIVORS coordinator -> nodes  U3: the headers of all who uploaded in time
    COMMIT | ABORT  node          this one list may be opened | this attempt never
    REVEAL  node -> coordinator   one share for each member of U1

Every message is canonical JSON (RFC 8785), binary fields in lower-case hexadecimal. A node's
messages are signed under a context of their own; the coordinator's carry no signature because they
say nothing of their own: they are lists of signed messages, and the log has their digests.

``X.from_bytes`` raises MalformedMessageError and nothing else. It checks form only; whether a
well-formed message is true is checked in ``node``, ``coordinator`` and ``verify``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.canonical import canonical_bytes, hash_hex, parse_canonical
from protocols.crypto.signatures import SIGNATURE_BYTES, Context, sign, verify
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest, FederationId, NodeId, RoundId
from protocols.secagg import codec, shamir
from protocols.secagg.codec import Codec
from protocols.secagg.context import MAX_ATTEMPT, Attempt, Roster
from protocols.secagg.keys import SALT_BYTES, parse_x25519
from protocols.secagg.packets import FIXED_BYTES, MAX_PACKET, TAG_BYTES, Kind, Opening
from protocols.secagg.paths import MAX_PATH
from protocols.secagg.threshold import MAX_ROSTER

MAX_CHECKPOINT: Final = 1024  # bytes of checkpoint text
MAX_UPLOAD: Final = 2**50  # bytes of one masked vector
REASON: Final = r"[a-z][a-z0-9_.-]{0,63}"  # a rule id or a short code, never free text

# The fields that every signed body begins with: which attempt, and who speaks.
_WHERE: Final[Mapping[str, Codec[Any]]] = {
    "federation": codec.FEDERATION,
    "round": codec.ROUND,
    "attempt": codec.integer(1, MAX_ATTEMPT),
    "node": codec.NODE,
}
_REASON: Final = codec.text(REASON)
_HASH: Final = codec.hex_of(32)
_PATH: Final = codec.list_of(_HASH, most=MAX_PATH)


class _Message:
    """Reading and writing shared by all messages."""

    SCHEMA: ClassVar[str]
    FIELDS: ClassVar[Mapping[str, Codec[Any]]]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return codec.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises: MalformedMessageError."""
        return codec.from_bytes(cls, data)


@dataclass(frozen=True, kw_only=True)
class Body(_Message):
    """The body of a node's message; ``to_bytes`` is what gets signed."""

    CONTEXT: ClassVar[Context]

    federation: FederationId
    round: RoundId
    attempt: int
    node: NodeId  # who signs

    def to_bytes(self) -> bytes:
        """Canonical JSON: the bytes that are signed and hashed, made once for each value."""
        return self._bytes

    @functools.cached_property
    def _bytes(self) -> bytes:
        return codec.to_bytes(self)


B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed(Generic[B]):
    """A body with the signature of the node it names. Unverified until ``check`` has passed."""

    body: B
    signature: bytes  # 64 bytes, Ed25519

    @classmethod
    def make(cls, key: Ed25519PrivateKey, body: B) -> Signed[B]:
        """Sign a body under its own context. Ed25519 is deterministic: same body, same bytes."""
        return cls(body=body, signature=sign(key, body.CONTEXT, body.to_bytes()))

    def check(self, roster: Roster) -> B:
        """The body, if the roster's key of the node that it names has signed it.

        Raises:
            NotListedError: the node is not on the roster.
            BadSignatureError: it has not signed this.
        """
        body = self.body
        _verify_once(roster.key(body.node), body.CONTEXT, body.to_bytes(), self.signature)
        return body

    def to_json(self) -> dict[str, Any]:
        return {"body": codec.to_json(self.body), "signature": self.signature.hex()}

    def to_bytes(self) -> bytes:
        """Canonical JSON: ``{"body":{...},"signature":"<128 hex digits>"}``."""
        return canonical_bytes(self.to_json())


@functools.lru_cache(maxsize=1024)  # six messages of each of 64 members, and some to spare
def _verify_once(public_key: bytes, context: Context, body: bytes, signature: bytes) -> None:
    """``verify``, remembered: lists repeat what was verified when it first came. Only success is
    remembered, under everything that it depends on."""
    verify(public_key, context, body, signature)


_SIGNATURE: Final = codec.hex_of(SIGNATURE_BYTES)


def signed_from_json(cls: type[B], value: Any) -> Signed[B]:
    """Raises: MalformedMessageError."""
    if not isinstance(value, dict) or value.keys() != {"body", "signature"}:
        raise MalformedMessageError(f"a signed {cls.SCHEMA} has a body and a signature")
    signature = _SIGNATURE.decode(value["signature"])
    return Signed(body=codec.from_json(cls, value["body"]), signature=signature)


def signed_from_bytes(cls: type[B], data: bytes) -> Signed[B]:
    """Read a signed message of the kind ``cls``.

    Raises:
        MalformedMessageError: and nothing else.
    """
    return signed_from_json(cls, parse_canonical(data))


def signed_codec(cls: type[B]) -> Codec[Signed[B]]:
    """A signed message within another."""
    return Codec(
        encode=lambda value: value.to_json(), decode=lambda value: signed_from_json(cls, value)
    )


def _check_order(what: str, nodes: list[NodeId]) -> None:
    """Lists of members are in roster order, which is ascending, without repetition."""
    if nodes != sorted(set(nodes)):
        raise MalformedMessageError(f"{what} must name each node once, in ascending order")


# -- getting ready -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ready(Body):
    """This node has trained and can deal. No field depends on its data."""

    SCHEMA: ClassVar[str] = "minga.secagg.ready/1"
    CONTEXT: ClassVar[Context] = Context.READY
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_WHERE,
        "roster_root": codec.DIGEST,
        "model_root": codec.DIGEST,
        "plan_digest": codec.DIGEST,
        "ek": codec.hex_of(32),
        "seen_size": codec.integer(0, 2**53 - 1),
        "seen_root": codec.DIGEST,
    }

    roster_root: Digest
    model_root: Digest
    plan_digest: Digest
    ek: bytes  # 32 bytes, X25519 public
    seen_size: int  # last log checkpoint this node accepted
    seen_root: Digest

    def __post_init__(self) -> None:
        parse_x25519(self.ek)


@dataclass(frozen=True, kw_only=True)
class Start(_Message):
    """U1: all valid READYs received by the deadline, in roster order."""

    SCHEMA: ClassVar[str] = "minga.secagg.start/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "readys": codec.list_of(signed_codec(Ready), most=MAX_ROSTER)
    }

    readys: tuple[Signed[Ready], ...]

    def __post_init__(self) -> None:
        _check_order("START", [signed.body.node for signed in self.readys])

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """U1 in roster order."""
        return tuple(signed.body.node for signed in self.readys)

    def ctx_deal(self, attempt: Attempt) -> Digest:
        """The digest that dealing is bound to."""
        return attempt.ctx_deal([signed.body.to_bytes() for signed in self.readys])


# -- dealing -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Deal(Body):
    """One member's masking key and its commitments."""

    SCHEMA: ClassVar[str] = "minga.secagg.deal/1"
    CONTEXT: ClassVar[Context] = Context.DEAL
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_WHERE,
        "ctx_deal": codec.DIGEST,
        "rk": codec.hex_of(32),
        "seed_commitment": _HASH,
        "share_root": codec.DIGEST,
        "packets_root": codec.DIGEST,
    }

    ctx_deal: Digest
    rk: bytes  # 32 bytes, X25519 public
    seed_commitment: bytes  # 32 bytes, Hb
    share_root: Digest
    packets_root: Digest

    def __post_init__(self) -> None:
        parse_x25519(self.rk)


_SEALED: Final = codec.hex_of(FIXED_BYTES + TAG_BYTES, MAX_PACKET)


@dataclass(frozen=True, kw_only=True)
class Packet(_Message):
    """Two shares sealed for one receiver."""

    SCHEMA: ClassVar[str] = "minga.secagg.packet/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {"to": codec.NODE, "sealed": _SEALED}

    to: NodeId
    sealed: bytes


@dataclass(frozen=True, kw_only=True)
class DealBundle(_Message):
    """A DEAL with one packet for each other member of U1."""

    SCHEMA: ClassVar[str] = "minga.secagg.deal-bundle/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "deal": signed_codec(Deal),
        "packets": codec.list_of(codec.record_of(Packet), most=MAX_ROSTER - 1),
    }

    deal: Signed[Deal]
    packets: tuple[Packet, ...]

    def __post_init__(self) -> None:
        _check_order("the packets", [packet.to for packet in self.packets])


@dataclass(frozen=True, kw_only=True)
class Parcel(_Message):
    """One DEAL as a receiver gets it: with its own packet and the proof that it was dealt."""

    SCHEMA: ClassVar[str] = "minga.secagg.parcel/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "deal": signed_codec(Deal),
        "sealed": codec.optional(_SEALED),
        "path": _PATH,
    }

    deal: Signed[Deal]
    sealed: bytes | None  # None in the receiver's own DEAL
    path: tuple[bytes, ...]  # up to packets_root

    @property
    def node(self) -> NodeId:
        """Who dealt."""
        return self.deal.body.node


@dataclass(frozen=True, kw_only=True)
class Delivery(_Message):
    """All DEALs of U1, in roster order, and the checkpoint everybody is shown."""

    SCHEMA: ClassVar[str] = "minga.secagg.delivery/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "parcels": codec.list_of(codec.record_of(Parcel), most=MAX_ROSTER),
        "checkpoint": codec.hex_of(1, MAX_CHECKPOINT),
    }

    parcels: tuple[Parcel, ...]
    checkpoint: bytes  # text of the log checkpoint, without signatures

    def __post_init__(self) -> None:
        _check_order("DELIVERY", [parcel.node for parcel in self.parcels])


@dataclass(frozen=True, kw_only=True)
class DealOk(Body):
    """This node opened every packet and found every share as committed, under this ctx."""

    SCHEMA: ClassVar[str] = "minga.secagg.deal-ok/1"
    CONTEXT: ClassVar[Context] = Context.DEAL_OK
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {**_WHERE, "ctx": codec.DIGEST}

    ctx: Digest


@dataclass(frozen=True, kw_only=True)
class Complaint(Body):
    """This dealer's packet is bad. Carries the complainant's EK, dead by now, so that anyone can
    open that packet and see who is at fault."""

    SCHEMA: ClassVar[str] = "minga.secagg.complaint/1"
    CONTEXT: ClassVar[Context] = Context.COMPLAINT
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_WHERE,
        "ctx_deal": codec.DIGEST,
        "against": codec.NODE,
        "ek_secret": codec.hex_of(32),
    }

    ctx_deal: Digest
    against: NodeId
    ek_secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Go(_Message):
    """Every member's DEAL_OK: all of U1 are on one ctx."""

    SCHEMA: ClassVar[str] = "minga.secagg.go/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "deal_oks": codec.list_of(signed_codec(DealOk), most=MAX_ROSTER)
    }

    deal_oks: tuple[Signed[DealOk], ...]

    def __post_init__(self) -> None:
        _check_order("GO", [signed.body.node for signed in self.deal_oks])


# -- uploading and committing ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Upload(Body):
    """Header of a masked vector: what this node's one contribution to this attempt is."""

    SCHEMA: ClassVar[str] = "minga.secagg.upload/1"
    CONTEXT: ClassVar[Context] = Context.UPLOAD
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_WHERE,
        "ctx": codec.DIGEST,
        "upload_root": codec.DIGEST,
        "length": codec.integer(1, MAX_UPLOAD),
    }

    ctx: Digest
    upload_root: Digest  # Merkle root over the 4 MiB units of the packed masked vector
    length: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Survivors(_Message):
    """U3: the headers of all whose masked vector arrived in time, in roster order."""

    SCHEMA: ClassVar[str] = "minga.secagg.survivors/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "headers": codec.list_of(signed_codec(Upload), most=MAX_ROSTER)
    }

    headers: tuple[Signed[Upload], ...]

    def __post_init__(self) -> None:
        _check_order("SURVIVORS", [signed.body.node for signed in self.headers])

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """U3 in roster order."""
        return tuple(signed.body.node for signed in self.headers)


@dataclass(frozen=True, kw_only=True)
class Commit(Body):
    """This list, and no other, may be opened in this round."""

    SCHEMA: ClassVar[str] = "minga.secagg.commit/1"
    CONTEXT: ClassVar[Context] = Context.COMMIT
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_WHERE,
        "ctx": codec.DIGEST,
        "survivors": codec.DIGEST,
    }

    ctx: Digest
    survivors: Digest  # H(U3)


@dataclass(frozen=True, kw_only=True)
class Abort(Body):
    """This node never reveals anything in this attempt, under whatever ctx it may be shown."""

    SCHEMA: ClassVar[str] = "minga.secagg.abort/1"
    CONTEXT: ClassVar[Context] = Context.ABORT
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_WHERE,
        "roster_root": codec.DIGEST,
        "reason": _REASON,
    }

    roster_root: Digest
    reason: str

    def __post_init__(self) -> None:
        _REASON.decode(self.reason)  # it becomes public: a code, never free text


@dataclass(frozen=True, kw_only=True)
class CommitCertificate(_Message):
    """Commits to one list by at least ``threshold`` survivors: it may be opened."""

    SCHEMA: ClassVar[str] = "minga.secagg.commit-certificate/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "commits": codec.list_of(signed_codec(Commit), most=MAX_ROSTER)
    }

    commits: tuple[Signed[Commit], ...]

    def __post_init__(self) -> None:
        _check_order("the commits", [signed.body.node for signed in self.commits])


@dataclass(frozen=True, kw_only=True)
class AbortCertificate(_Message):
    """Aborts of one attempt by at least ``threshold`` members: it can never be opened."""

    SCHEMA: ClassVar[str] = "minga.secagg.abort-certificate/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "aborts": codec.list_of(signed_codec(Abort), most=MAX_ROSTER)
    }

    aborts: tuple[Signed[Abort], ...]

    def __post_init__(self) -> None:
        _check_order("the aborts", [signed.body.node for signed in self.aborts])


# -- revealing ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RevealedShare(_Message):
    """This node's share of one secret of one peer, with its proof."""

    SCHEMA: ClassVar[str] = "minga.secagg.revealed-share/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "of": codec.NODE,
        "kind": codec.Codec(
            encode=lambda kind: kind.value,
            decode=lambda value: Kind(codec.text("rk|b").decode(value)),
        ),
        "share": codec.hex_of(shamir.SHARE_BYTES),
        "salt": codec.hex_of(SALT_BYTES),
        "path": _PATH,
    }

    of: NodeId
    kind: Kind
    share: bytes = field(repr=False)
    salt: bytes = field(repr=False)
    path: tuple[bytes, ...] = field(repr=False)

    @property
    def opening(self) -> Opening:
        """The share with its proof, as ``packets`` checks it."""
        return Opening(share=self.share, salt=self.salt, path=self.path)


@dataclass(frozen=True, kw_only=True)
class Reveal(Body):
    """One share for each member of U1: of b if it survived, of RK if it was lost."""

    SCHEMA: ClassVar[str] = "minga.secagg.reveal/1"
    CONTEXT: ClassVar[Context] = Context.REVEAL
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        **_WHERE,
        "ctx": codec.DIGEST,
        "survivors": codec.DIGEST,
        "shares": codec.list_of(codec.record_of(RevealedShare), most=MAX_ROSTER),
    }

    ctx: Digest
    survivors: Digest  # H(U3)
    shares: tuple[RevealedShare, ...]  # in roster order

    def __post_init__(self) -> None:
        _check_order("the shares", [share.of for share in self.shares])


# -- afterwards --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OpenedSecret(_Message):
    """A reconstructed secret: public from the moment the sum is."""

    SCHEMA: ClassVar[str] = "minga.secagg.opened/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {"node": codec.NODE, "secret": _HASH}

    node: NodeId
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Transcript(_Message):
    """All that is needed to check an opened sum again: published beside it."""

    SCHEMA: ClassVar[str] = "minga.secagg.transcript/1"
    FIELDS: ClassVar[Mapping[str, Codec[Any]]] = {
        "start": codec.record_of(Start),
        "deals": codec.list_of(signed_codec(Deal), most=MAX_ROSTER),
        "checkpoint": codec.hex_of(1, MAX_CHECKPOINT),
        "go": codec.record_of(Go),
        "survivors": codec.record_of(Survivors),
        "certificate": codec.record_of(CommitCertificate),
        "reveals": codec.list_of(signed_codec(Reveal), most=MAX_ROSTER),
        "self_seeds": codec.list_of(codec.record_of(OpenedSecret), most=MAX_ROSTER),
        "pair_secrets": codec.list_of(codec.record_of(OpenedSecret), most=MAX_ROSTER),
    }

    start: Start
    deals: tuple[Signed[Deal], ...]  # of U1, in roster order
    checkpoint: bytes
    go: Go
    survivors: Survivors
    certificate: CommitCertificate
    reveals: tuple[Signed[Reveal], ...]
    self_seeds: tuple[OpenedSecret, ...]  # b of U3
    pair_secrets: tuple[OpenedSecret, ...]  # RK of U1 without U3

    def __post_init__(self) -> None:
        _check_order("the deals", [signed.body.node for signed in self.deals])
        _check_order("the reveals", [signed.body.node for signed in self.reveals])
        _check_order("the self seeds", [opened.node for opened in self.self_seeds])
        _check_order("the pair secrets", [opened.node for opened in self.pair_secrets])

    @property
    def digest(self) -> Digest:
        """What the log names."""
        return hash_hex("minga/secagg-transcript/v1", self.to_bytes())
