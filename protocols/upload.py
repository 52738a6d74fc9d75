"""The signed header of an upload: what a node says it sends, before it sends it.

One header names one vector for one attempt of one round: a second, different header for the same
attempt is refused and is evidence. The receipt of a finished upload is the hash of the header, so
it names the vector too. Normative text: protocols/spec/upload.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.canonical import canonical_bytes, hash_fields, parse_canonical
from protocols.crypto.signatures import Context, sign, verify
from protocols.errors import MalformedMessageError
from protocols.identifiers import (
    Digest,
    FederationId,
    NodeId,
    RoundId,
    RunId,
    parse_digest,
    parse_federation_id,
    parse_node_id,
    parse_run_id,
)
from protocols.tensors.units import unit_count
from protocols.tlog.merkle import tree_root

UPLOAD_SCHEMA: Final = "minga.upload/1"
_MAX_HEADER = 4096  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadHeader:
    """What is sent, for which attempt, made from which model under which plan."""

    federation: FederationId
    run: RunId
    round: int
    attempt: int  # from 1
    node: NodeId
    plan: Digest
    model: Digest  # model_root the local step started from
    coordinates: int  # d: of the exchanged vector, metrics included
    ring: int  # bits
    size: int  # bytes of the packed vector
    root: Digest  # of the 4 MiB units

    @property
    def round_id(self) -> RoundId:
        """The round this upload belongs to."""
        return RoundId(self.run, self.round)

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is signed."""
        return canonical_bytes({"schema": UPLOAD_SCHEMA, **asdict(self)})

    @property
    def receipt(self) -> bytes:
        """32 bytes that acknowledge exactly this upload."""
        return hash_fields("minga/upload-receipt/v1", self.to_bytes())

    @property
    def upload_id(self) -> bytes:
        """32 bytes that name the upload while it is under way: one per node and attempt.

        The header's content is not part of it, so a second header meets the first one.
        """
        return hash_fields(
            "minga/upload-id/v1",
            self.federation.encode(),
            self.run.encode(),
            self.round.to_bytes(4, "big"),
            self.attempt.to_bytes(4, "big"),
            self.node.encode(),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> UploadHeader:
        """Read a header strictly.

        Raises:
            MalformedMessageError: not canonical, a field missing, unknown or out of range.
        """
        value = parse_canonical(data, limit=_MAX_HEADER)
        names = {"schema", *cls.__slots__}
        if not isinstance(value, dict) or set(value) != names or value["schema"] != UPLOAD_SCHEMA:
            raise MalformedMessageError(f"an upload header is {UPLOAD_SCHEMA} with {sorted(names)}")
        return cls(
            federation=parse_federation_id(value["federation"]),
            run=parse_run_id(value["run"]),
            round=_integer(value, "round", 0, 10**6 - 1),
            attempt=_integer(value, "attempt", 1, 10**6),
            node=parse_node_id(value["node"]),
            plan=parse_digest(value["plan"]),
            model=parse_digest(value["model"]),
            coordinates=_integer(value, "coordinates", 1, 2**40),
            ring=_integer(value, "ring", 16, 24),
            size=_integer(value, "size", 1, 2**42),
            root=parse_digest(value["root"]),
        )


def _integer(value: dict[str, Any], name: str, low: int, high: int) -> int:
    found = value[name]
    if not isinstance(found, int) or isinstance(found, bool) or not low <= found <= high:
        raise MalformedMessageError(
            f"upload header: {name} must be an integer from {low} to {high}, got {found!r:.40}"
        )
    return found


def sign_header(key: Ed25519PrivateKey, header: UploadHeader) -> bytes:
    """The node's signature over its header, 64 bytes."""
    return sign(key, Context.UPLOAD_HEADER, header.to_bytes())


def verify_header(public_key: bytes, header: bytes, signature: bytes) -> UploadHeader:
    """Check signature, then read; the verified bytes are the ones that are read.

    Raises:
        BadSignatureError: not signed by this key as an upload header.
        MalformedMessageError: signed, but not a header.
    """
    verify(public_key, Context.UPLOAD_HEADER, header, signature)
    return UploadHeader.from_bytes(header)


def check_unit_hashes(header: UploadHeader, unit_hashes: tuple[bytes, ...]) -> None:
    """The announced unit hashes must be the header's root and cover its bytes.

    Raises:
        MalformedMessageError: wrong number, a hash of another size, or another root.
    """
    want = unit_count(header.size)
    if len(unit_hashes) != want or any(len(unit) != 32 for unit in unit_hashes):
        raise MalformedMessageError(
            f"{header.size} bytes have {want} unit hashes of 32 bytes, got {len(unit_hashes)}"
        )
    if tree_root(unit_hashes).hex() != header.root:
        raise MalformedMessageError("the unit hashes do not have the root that the header names")
