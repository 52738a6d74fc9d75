"""Leaves: what a party says about an act of its own, signed by it (DSSE over in-toto).

    entry     = JCS({"payload": base64(statement), "payloadType": ..., "signatures": [one]})
    statement = JCS of an in-toto Statement v1, at most one per entry
    signed    = "DSSEv1 <len(type)> <type> <len(statement)> <statement>"

The operator of the log only orders leaves. Who may sign is the replayed membership's business and
an argument here, never read from a leaf. Each signer's leaves form a chain (``seq``, ``prev``), so
a leaf that the operator drops is missed by the next one.

The log cannot forget, and laws grant erasure: nothing in a leaf may identify a person.
``Statement`` refuses what looks like an e-mail address, a tripwire and no more; ``pseudonym`` hides
a value.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NewType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from protocols.canonical import canonical_bytes, parse_canonical
from protocols.crypto.signatures import BadSignatureError, parse_public_key, public_bytes
from protocols.errors import IntegrityError, MalformedMessageError
from protocols.identifiers import Digest, parse_digest
from protocols.tlog.merkle import EMPTY_ROOT, leaf_hash
from protocols.tlog.note import check_ed25519
from protocols.tlog.text import HASH_BYTES, decode_base64, decode_hash, encode_base64

MAX_LEAF: Final = 32 * 1024  # bytes of an entry; what is larger is a blob named by its digest
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_BASE: Final = "https://minga.example/predicate/"
FIRST_PREV: Final = Digest("0" * 64)
SALT_BYTES: Final = 32
_MAX_INT: Final = 2**53 - 1  # what JCS writes exactly
_MAX_NAME: Final = 256  # characters

KINDS: Final = frozenset(
    {
        "log.genesis",
        "log.closed",
        "log.heartbeat",
        "tuf.published",
        "policy.proposed",
        "ballot",
        "member.statement",
        "cert.issued",
        "enrol.request",
        "code.approved",
        "dataset.declared",
        "override.granted",
        "emergency.notice",
        "objection.resolved",
        "eval.report",
        "release.approved",
        "release.withdrawn",
        "incident",
        "audit.report",
        "round.plan",
        "round.join",
        "round.decline",
        "round.start",
        "update.commit",
        "round.survivors",
        "round.aggregate",
        "round.confirm",
        "round.objection",
        "round.closed",
        "round.aborted",
    }
)
_COMMON: Final = frozenset({"seq", "prev", "seen", "time"})
_TIME: Final = re.compile(r"[2-9][0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
# Anchored at the "@": what precedes is only glanced at, so hostile text costs linear time.
_EMAIL: Final = re.compile(r"(?<=[\w.+-])@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}")

KeyId = NewType("KeyId", str)  # SHA-256 of the SPKI DER of a public key, 64 hexadecimal digits


class BrokenChainError(IntegrityError):
    """A leaf does not follow its signer's previous one."""

    code = "leaf_chain"


@lru_cache(maxsize=1024)  # an auditor asks for each of many leaves
def key_id_of(public_key: bytes) -> KeyId:
    """The keyid of an Ed25519 public key of 32 raw bytes.

    Raises:
        MalformedMessageError: not a usable public key.
    """
    der = Ed25519PublicKey.from_public_bytes(parse_public_key(public_key)).public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    return KeyId(hashlib.sha256(der).hexdigest())


def pseudonym(salt: bytes, value: bytes) -> Digest:
    """SHA-256(salt || value): how a leaf names what identifies a person.

    The salt is fresh for each value and kept outside the log; deleting it is the erasure.

    Raises:
        ValueError: the salt does not have 32 bytes; short ones could be searched.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes")
    return Digest(hashlib.sha256(salt + value).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The last witnessed checkpoint that the signer had accepted."""

    size: int  # leaves
    root: bytes  # 32 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a leaf says. ``fields`` depend on the kind; the rest every leaf has."""

    kind: str
    subject: str  # e.g. fed/<federation>/<run>/round/42, tuf/policy/7
    digest: Digest  # of the object that the subject names
    seq: int  # of this signer's leaves, from 1
    prev: Digest  # leaf hash of this signer's previous leaf; 64 zeros for the first
    seen: Seen
    time: datetime  # UTC, whole seconds; a claim
    fields: Mapping[str, Any]
    source: InitVar[bytes] = b""  # the canonical bytes that it was read from, where it was read

    def __post_init__(self, source: bytes) -> None:
        if self.kind not in KINDS:
            raise MalformedMessageError(f"no leaf is of the kind {self.kind!r:.80}")
        if not 1 <= len(self.subject) <= _MAX_NAME or not self.subject.isprintable():
            raise MalformedMessageError(f"the subject has 1 to {_MAX_NAME} printable characters")
        parse_digest(self.digest)
        parse_digest(self.prev)
        if not 1 <= self.seq <= _MAX_INT:
            raise MalformedMessageError("seq counts from 1")
        if not 0 <= self.seen.size <= _MAX_INT or len(self.seen.root) != HASH_BYTES:
            raise MalformedMessageError("seen is a size below 2**53 and a 32-byte root")
        if self.seen.size == 0 and self.seen.root != EMPTY_ROOT:
            raise MalformedMessageError("seen has another root than SHA-256 of nothing at size 0")
        if self.time.tzinfo is not UTC or self.time.microsecond or self.time.year < 2000:
            raise MalformedMessageError("the time of a leaf is whole seconds in UTC, from 2000 on")
        if _COMMON & self.fields.keys():
            raise MalformedMessageError("a field of the kind is named like a common one")
        text = source or canonical_bytes(dict(self.fields)) + b" " + self.subject.encode()
        if b"@" in text and _EMAIL.search(text.decode()) is not None:
            # The address is not repeated in the message: it goes to diagnostics.
            raise MalformedMessageError("the leaf holds what looks like an e-mail address")
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))

    def to_bytes(self) -> bytes:
        """The statement in canonical form (RFC 8785)."""
        seen = {"size": self.seen.size, "root": encode_base64(self.seen.root)}
        predicate: dict[str, Any] = {
            **self.fields,
            "seq": self.seq,
            "prev": self.prev,
            "seen": seen,
            "time": f"{self.time:%Y-%m-%dT%H:%M:%SZ}",
        }
        return canonical_bytes(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": self.subject, "digest": {"sha256": self.digest}}],
                "predicateType": f"{PREDICATE_BASE}{self.kind}/v1",
                "predicate": predicate,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Statement:
        """Read a canonical statement; ``to_bytes`` gives the same bytes back.

        Raises:
            MalformedMessageError: any other form, an unknown kind, or what looks like a person.
        """
        top = _object(
            parse_canonical(data, limit=MAX_LEAF),
            {"_type", "subject", "predicateType", "predicate"},
            "the statement",
        )
        if top["_type"] != STATEMENT_TYPE:
            raise MalformedMessageError("the statement is not an in-toto Statement v1")
        subjects = top["subject"]
        if not isinstance(subjects, list) or len(subjects) != 1:
            raise MalformedMessageError("a leaf has exactly one subject")
        subject = _object(subjects[0], {"name", "digest"}, "the subject")
        digest = _object(subject["digest"], {"sha256"}, "the digest of the subject")
        predicate = top["predicate"]
        if not isinstance(predicate, dict) or not predicate.keys() >= _COMMON:
            raise MalformedMessageError("the predicate has no seq, prev, seen or time")
        seen = _object(predicate["seen"], {"size", "root"}, "seen")
        return cls(
            kind=_kind(top["predicateType"]),
            subject=_text(subject["name"], "the name of the subject"),
            digest=parse_digest(digest["sha256"]),
            seq=_integer(predicate["seq"], "seq"),
            prev=parse_digest(predicate["prev"]),
            seen=Seen(
                size=_integer(seen["size"], "the size in seen"),
                root=decode_hash(_text(seen["root"], "the root in seen"), "the root in seen"),
            ),
            time=_time(predicate["time"]),
            fields={key: value for key, value in predicate.items() if key not in _COMMON},
            source=data,
        )


def _object(value: Any, keys: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        raise MalformedMessageError(f"{what} must be an object of {', '.join(sorted(keys))}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise MalformedMessageError(f"{what} must be text")
    return value


def _integer(value: Any, what: str) -> int:
    if type(value) is not int:  # true is an int, and is not a number here
        raise MalformedMessageError(f"{what} must be an integer")
    return value


def _kind(value: Any) -> str:
    text = _text(value, "predicateType")
    if not text.startswith(PREDICATE_BASE) or not text.endswith("/v1"):
        raise MalformedMessageError(f"not a predicate type of Minga: {text!r:.80}")
    return text.removeprefix(PREDICATE_BASE).removesuffix("/v1")


def _time(value: Any) -> datetime:
    text = _text(value, "time")
    if _TIME.fullmatch(text) is None:
        raise MalformedMessageError("time must be written like 2026-12-01T02:00:00Z")
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise MalformedMessageError(f"there is no time {text}") from None


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A leaf whose signature was verified."""

    entry: bytes  # as in the bundle
    signer: KeyId
    statement: Statement

    @property
    def hash(self) -> Digest:
        """The leaf hash: the receipt, and the ``prev`` of the signer's next leaf."""
        return Digest(leaf_hash(self.entry).hex())


def sign_leaf(statement: Statement, key: Ed25519PrivateKey) -> Leaf:
    """Sign a statement as the party that did the act; the same bytes every time.

    Raises:
        MalformedMessageError: the leaf would be larger than 32 KiB.
    """
    payload = statement.to_bytes()
    signer = key_id_of(public_bytes(key))
    signature = {"keyid": signer, "sig": encode_base64(key.sign(pae(PAYLOAD_TYPE, payload)))}
    entry = canonical_bytes(
        {
            "payload": encode_base64(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [signature],
        }
    )
    if len(entry) > MAX_LEAF:
        raise MalformedMessageError(f"a leaf of {len(entry)} bytes; at most {MAX_LEAF}")
    return Leaf(entry=entry, signer=signer, statement=statement)


def open_leaf(entry: bytes, keys: Mapping[KeyId, bytes]) -> Leaf:
    """Read and verify an entry.

    1. The envelope is canonical, at most 32 KiB, with one signature. 2. Its keyid is that of a key
    of the membership. 3. The signature verifies over the payload. 4. Those same bytes, and no
    second reading of the envelope, parse as a statement. The caller still owes the chain
    (``extend_chain``) and whether this member may say this.

    Args:
        entry: as in the bundle.
        keys: the membership's keys at this index of the log, 32 raw bytes each, by ``key_id_of``.

    Raises:
        MalformedMessageError: steps 1 and 4.
        BadSignatureError: steps 2 and 3.
    """
    payload, signer, signed = _envelope(entry)
    key = keys.get(signer)
    if key is None:
        raise BadSignatureError(f"the leaf is signed by {signer}, which is no member's key")
    if key_id_of(key) != signer:
        raise ValueError("the membership lists a key under another key's id")
    check_ed25519(key, pae(PAYLOAD_TYPE, payload), signed, signer)
    return Leaf(entry=entry, signer=signer, statement=Statement.parse(payload))


# The one canonical spelling of an envelope: what matches needs no second look at its form.
_ENVELOPE: Final = re.compile(
    rb'\{"payload":"([A-Za-z0-9+/=]*)","payloadType":"application/vnd\.in-toto\+json",'
    rb'"signatures":\[\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/=]*)"\}\]\}'
)


def _envelope(entry: bytes) -> tuple[bytes, KeyId, bytes]:
    """Payload, keyid and signature of an entry; nothing verified.

    Raises:
        MalformedMessageError: any other form; only then is it read as JSON, to say what is wrong.
    """
    match = _ENVELOPE.fullmatch(entry) if len(entry) <= MAX_LEAF else None
    if match is not None:
        text, signer, sig = (part.decode("ascii") for part in match.groups())
        payload = decode_base64(text, "the payload")
        return payload, KeyId(Digest(signer)), decode_base64(sig, "the signature")
    top = _object(
        parse_canonical(entry, limit=MAX_LEAF),
        {"payload", "payloadType", "signatures"},
        "the envelope",
    )
    if top["payloadType"] != PAYLOAD_TYPE:
        raise MalformedMessageError(f"the payload type of a leaf is {PAYLOAD_TYPE}")
    signatures = top["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise MalformedMessageError("a leaf has exactly one signature")
    signature = _object(signatures[0], {"keyid", "sig"}, "the signature")
    payload = decode_base64(_text(top["payload"], "payload"), "the payload")
    signed = decode_base64(_text(signature["sig"], "sig"), "the signature")
    return payload, KeyId(parse_digest(signature["keyid"])), signed


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainHead:
    """The last leaf of one signer."""

    seq: int
    leaf: Digest


def extend_chain(head: ChainHead | None, leaf: Leaf) -> ChainHead:
    """Put ``leaf`` behind its signer's last one; None before the first.

    The same leaf again changes nothing: after a lost answer a signer sends the same bytes.

    Raises:
        BrokenChainError: the leaf skips one, forks the chain, or does not begin it with 1.
    """
    said, found = leaf.statement, leaf.hash
    if head is not None and head.leaf == found:
        return head
    seq, prev = (1, FIRST_PREV) if head is None else (head.seq + 1, head.leaf)
    if (said.seq, said.prev) != (seq, prev):
        raise BrokenChainError(
            f"leaf {said.seq} of {leaf.signer} after {said.prev}: wanted is leaf {seq} after {prev}"
        )
    return ChainHead(seq=seq, leaf=found)
