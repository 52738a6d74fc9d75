"""A person of the signed list asks for a certificate: signed by the key that the list names.

    minga.person-request/1   federation, person, role, the certificate request, when; key, signature

No invitation is needed: membership/admins.json names the key id, the role and the term, and whoever
holds the key shows it here. So the coordinator cannot let anybody in as an auditor or an admin whom
the admins did not name. Normative text: protocols/spec/enrolment.md, section 7.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Signature, Signer, SSlibKey

from protocols.canonical import canonical_bytes, sha256_hex
from protocols.crypto.identity import read_csr, spki_digest
from protocols.crypto.signatures import Context, signing_input
from protocols.errors import MalformedMessageError
from protocols.governance.documents import (
    Admins,
    DigestText,
    Document,
    Members,
    Name,
    Person,
    TimeText,
    parse_time,
    time_text,
)
from protocols.governance.errors import TrustRefusedError
from protocols.governance.keys import key_to_value, parse_key
from protocols.identifiers import FederationId, parse_federation_id

MAX_AGE_S: Final = 600.0  # a request is made and sent at once
_CLOCKS_S: Final = 300.0

CertifiedRole = Literal["admin", "auditor", "partner", "release-board", "witness"]


class PersonStatement(Document):
    """What is signed."""

    schema_: Literal["minga.person-request/1"] = Field(
        default="minga.person-request/1", alias="schema"
    )
    federation: Annotated[str, AfterValidator(parse_federation_id)]
    person: Name
    role: CertifiedRole
    csr_sha256: DigestText
    spki_sha256: DigestText  # of the TLS key
    asked_at: TimeText


class PersonRequest(Document):
    """A statement with its signature."""

    statement: PersonStatement
    key: dict[str, Any]  # as a TUF key
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{64,2048}$")]

    @property
    def public(self) -> SSlibKey:
        """Raises: MalformedMessageError, TrustRefusedError."""
        return parse_key(self.key)


def ask(
    *, federation: FederationId, person: str, role: str, csr: bytes, signer: Signer, now: datetime
) -> PersonRequest:
    """Ask for a certificate with the key that the signed list names.

    Args:
        federation: whose.
        person: handle, as listed.
        role: one of the person's.
        csr: PKCS#10, DER.
        signer: of the key; a file or a token.
        now: UTC.

    Raises:
        MalformedMessageError: no such role, or no certificate request.
    """
    statement = PersonStatement.make(
        federation=federation,
        person=person,
        role=role,
        csr_sha256=sha256_hex(csr),
        spki_sha256=spki_digest(read_csr(csr)),
        asked_at=time_text(now),
    )
    body = signing_input(Context.PERSON_ENROL, statement.to_bytes())
    public = signer.public_key
    if not isinstance(public, SSlibKey):
        raise MalformedMessageError("a person's key is a key of the trust repository")
    return PersonRequest.make(
        statement=statement.model_dump(mode="json", by_alias=True),
        key=key_to_value(public),
        signature=signer.sign(body).signature,
    )


def check_ask(
    data: bytes,
    *,
    csr: bytes,
    federation: FederationId,
    admins: Admins,
    members: Members,
    now: datetime,
) -> PersonStatement:
    """Read a request and see that the signed list gives this very key this role, now.

    Raises:
        MalformedMessageError: it cannot be read.
        TrustRefusedError: trust.key, trust.duties, trust.expired or trust.member.
    """
    request = PersonRequest.from_bytes(data)
    said, key = request.statement, request.public
    if said.federation != federation:
        raise TrustRefusedError(f"the request is for {said.federation}", rule="trust.key")
    person = listed(admins, said.person, said.role)
    if person.keyid != key.keyid:
        raise TrustRefusedError(
            f"the key of the request is not the one that the list of people names for {person.id}",
            rule="trust.key",
        )
    body = signing_input(Context.PERSON_ENROL, said.to_bytes())
    try:
        key.verify_signature(Signature(key.keyid, request.signature), body)
    except (UnverifiedSignatureError, VerificationError):
        raise TrustRefusedError(
            f"the request is not signed by the key of {person.id}", rule="trust.key"
        ) from None
    if (said.csr_sha256, said.spki_sha256) != (sha256_hex(csr), spki_digest(read_csr(csr))):
        raise TrustRefusedError("the signature is for another request", rule="trust.key")
    age = (now - parse_time(said.asked_at)).total_seconds()
    if not -_CLOCKS_S <= age <= MAX_AGE_S:
        raise TrustRefusedError(
            f"the request is of {said.asked_at}: ask again, and check the clock",
            rule="trust.expired",
        )
    check_person(person, members, now)
    return said


def listed(admins: Admins, name: str, role: str) -> Person:
    """A person whom the signed list gives a role.

    Raises:
        TrustRefusedError: trust.duties.
    """
    found = next((person for person in admins.people if person.id == name), None)
    if found is None or role not in found.roles:
        raise TrustRefusedError(
            f"the signed list of people names no {role} {name}", rule="trust.duties"
        )
    return found


def check_person(person: Person, members: Members, now: datetime) -> None:
    """A person's term is in force, and their institution, if it is a member, is an active one.

    Raises:
        TrustRefusedError: trust.expired or trust.member.
    """
    if not in_term(person, now):
        raise TrustRefusedError(
            f"the term of {person.id} is from {person.term_from} to {person.term_until}",
            rule="trust.expired",
        )
    member = members.get(person.institution)
    if member is not None and member.status != "active":
        raise TrustRefusedError(
            f"{person.institution}, the institution of {person.id}, is {member.status}",
            rule="trust.member",
        )


def in_term(person: Person, now: datetime) -> bool:
    """Whether a person holds their office at ``now``."""
    return parse_time(person.term_from) <= now < parse_time(person.term_until)


def canonical_ask(request: PersonRequest) -> bytes:
    """The bytes that are sent."""
    return canonical_bytes(request.model_dump(mode="json", by_alias=True))
