"""An institution says which keys are its node's: signed by a key that the membership names.

    minga.enrol-approval/1   federation, institution, the node's keys, when

Without it a coordinator could name whatever key it likes for a member, certify it, and be that
member. With it, a key of a member is what the member's own offline key signed for, and every node
checks that itself (rule trust.key). Normative text: protocols/spec/enrolment.md, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, Field

from protocols.canonical import sha256_hex
from protocols.crypto.identity import read_csr, spki_digest
from protocols.crypto.signatures import BadSignatureError, Context, public_bytes, sign, verify
from protocols.governance.documents import (
    DigestText,
    Document,
    HexKey,
    Name,
    TimeText,
    parse_time,
    time_text,
)
from protocols.governance.errors import TrustRefusedError
from protocols.identifiers import FederationId, NodeId, parse_federation_id


class Statement(Document):
    """What is signed."""

    schema_: Literal["minga.enrol-approval/1"] = Field(
        default="minga.enrol-approval/1", alias="schema"
    )
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    institution: Name
    node: Literal["1"]
    signing_key: HexKey  # of updates and messages
    csr_sha256: DigestText
    spki_sha256: DigestText  # of the TLS key
    approved_at: TimeText


class Approval(Document):
    """A statement with its signature."""

    statement: Statement
    key: HexKey
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


def statement_for(
    *,
    federation: FederationId,
    institution: NodeId,
    csr: bytes,
    signing_key: bytes,
    now: datetime,
) -> Statement:
    """What an institution signs for its node. Raises: MalformedMessageError."""
    return Statement(
        federation=federation,
        institution=institution,
        node="1",
        signing_key=signing_key.hex(),
        csr_sha256=sha256_hex(csr),
        spki_sha256=spki_digest(read_csr(csr)),
        approved_at=time_text(now),
    )


def approve(statement: Statement, key: Ed25519PrivateKey) -> Approval:
    """Sign a statement with a key of the institution."""
    return Approval(
        statement=statement,
        key=public_bytes(key).hex(),
        signature=sign(key, Context.ENROL_APPROVAL, statement.to_bytes()).hex(),
    )


def check_approval(
    data: bytes,
    *,
    federation: FederationId,
    institution: NodeId,
    keys: Sequence[bytes],
) -> Statement:
    """Read an approval and verify that a key of the institution signed it.

    Args:
        data: canonical JSON.
        federation: in which it has to hold.
        institution: of whose node it has to speak.
        keys: the institution's, by the signed membership; 32 raw bytes each.

    Raises:
        MalformedMessageError: it cannot be read.
        TrustRefusedError: trust.key: it is somebody else's, or signed by another key.
    """
    approval = Approval.from_bytes(data)
    said = approval.statement
    if (said.federation, said.institution) != (federation, institution):
        raise TrustRefusedError(
            f"the approval is for {said.institution} in {said.federation}", rule="trust.key"
        )
    key = bytes.fromhex(approval.key)
    if key not in keys:
        raise TrustRefusedError(
            f"the approval of {institution} is signed by a key that the membership does not name",
            rule="trust.key",
        )
    try:
        verify(key, Context.ENROL_APPROVAL, said.to_bytes(), bytes.fromhex(approval.signature))
    except BadSignatureError:
        raise TrustRefusedError(
            f"the approval of {institution} is not signed by its key", rule="trust.key"
        ) from None
    return said


def check_request(
    statement: Statement, *, csr: bytes, signing_key: bytes, now: datetime, max_age_s: float
) -> None:
    """An approval is for this very request, and not an old one.

    Raises:
        TrustRefusedError: trust.key or trust.expired.
    """
    if (statement.csr_sha256, statement.signing_key) != (sha256_hex(csr), signing_key.hex()):
        raise TrustRefusedError("the approval is for another request", rule="trust.key")
    age = (now - parse_time(statement.approved_at)).total_seconds()
    if not -300 <= age <= max_age_s:
        raise TrustRefusedError(
            f"the approval is of {statement.approved_at}: approve the request again",
            rule="trust.expired",
        )
