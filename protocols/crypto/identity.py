"""Who a certificate speaks for: exactly one SPIFFE URI, read strictly.

    spiffe://<federation>.minga.example/inst/<institution>/node/1      a node agent
    spiffe://<federation>.minga.example/operator/<name>                who runs the coordinator
    spiffe://<federation>.minga.example/<role>/<person>                a person of the signed list:
                                                admin, auditor, partner, witness, release-board
    spiffe://<federation>.minga.example/coordinator                    the coordinator itself

Names are compared whole, never by prefix. Whether the certificate is in force (issuer, dates) is
the TLS layer's and ``certificate_in_force``'s business; this module only says whom it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from protocols.canonical import sha256_hex
from protocols.errors import MalformedMessageError, NotEnrolledError
from protocols.identifiers import Digest, FederationId, parse_federation_id, parse_node_id

Role = Literal[
    "node", "operator", "coordinator", "admin", "auditor", "partner", "witness", "release-board"
]
# Roles of people whom membership/admins.json names; the operator's certificate comes from `init`.
PERSON_ROLES: Final[tuple[Role, ...]] = (
    "admin", "auditor", "partner", "release-board", "witness",
)  # fmt: skip
_DOMAIN_SUFFIX = ".minga.example"
_MAX_URI = 2048


@dataclass(frozen=True, slots=True)
class Identity:
    """A role and a name inside one federation; the coordinator's name is ``coordinator``."""

    role: Role
    name: str

    def __str__(self) -> str:
        return self.name if self.role == "coordinator" else f"{self.role} {self.name}"


def trust_domain(federation: FederationId) -> str:
    """The SPIFFE trust domain of a federation."""
    return f"{federation}{_DOMAIN_SUFFIX}"


def spiffe_uri(federation: FederationId, identity: Identity) -> str:
    """The URI that a certificate for ``identity`` carries."""
    base = f"spiffe://{trust_domain(federation)}"
    match identity.role:
        case "node":
            return f"{base}/inst/{parse_node_id(identity.name)}/node/1"
        case "coordinator":
            return f"{base}/coordinator"
        case role:
            return f"{base}/{role}/{parse_node_id(identity.name)}"


def parse_spiffe_uri(uri: str, federation: FederationId) -> Identity:
    """Read a SPIFFE URI of this federation.

    Raises:
        MalformedMessageError: another scheme, trust domain, path or name.
    """
    base = f"spiffe://{trust_domain(parse_federation_id(federation))}/"
    if len(uri) > _MAX_URI or not uri.startswith(base):
        raise MalformedMessageError(f"{uri!r:.120} is not an identity of federation {federation}")
    match uri.removeprefix(base).split("/"):
        case ["inst", name, "node", "1"]:
            return Identity("node", parse_node_id(name))
        case ["operator", name]:
            return Identity("operator", parse_node_id(name))
        case [
            "admin" | "auditor" | "partner" | "release-board" | "witness" as role,
            name,
        ]:
            return Identity(role, parse_node_id(name))
        case ["coordinator"]:
            return Identity("coordinator", "coordinator")
        case _:
            raise MalformedMessageError(f"{uri!r:.120} names no role of a federation")


def identity_of_certificate(certificate: x509.Certificate, federation: FederationId) -> Identity:
    """The one identity a certificate names.

    Raises:
        NotEnrolledError: no URI, more than one, or one that is not of this federation.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise NotEnrolledError("the certificate names no identity") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise NotEnrolledError(f"the certificate names {len(uris)} identities; exactly one counts")
    try:
        identity = parse_spiffe_uri(uris[0], federation)
    except MalformedMessageError as error:
        raise NotEnrolledError(str(error)) from None
    if identity.role != "coordinator" and len(list(names)) != 1:
        raise NotEnrolledError("the certificate carries names beside its identity")
    return identity


def certificate_in_force(certificate: x509.Certificate, now: datetime) -> None:
    """Check dates and use of a client certificate again, on an open connection.

    Raises:
        NotEnrolledError: expired, not yet valid, or not for clients.
    """
    if now >= certificate.not_valid_after_utc:
        raise NotEnrolledError(
            f"the certificate expired at {certificate.not_valid_after_utc:%FT%TZ}"
        )
    if now < certificate.not_valid_before_utc:
        raise NotEnrolledError("the certificate is not valid yet: check the clock")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        raise NotEnrolledError("the certificate has no extended key usage") from None
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise NotEnrolledError("the certificate is not for clients")


def spki_digest(certificate: x509.Certificate | x509.CertificateSigningRequest) -> Digest:
    """SHA-256 of the subject public key info: names a key, whoever certified it."""
    return sha256_hex(
        certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def read_csr(der: bytes) -> x509.CertificateSigningRequest:
    """A certificate request whose own signature holds and whose key is ECDSA P-256.

    Extensions in the request are ignored: the issuer alone says whom a certificate names.

    Raises:
        MalformedMessageError: unreadable, badly signed, or another kind of key.
    """
    try:
        csr = x509.load_der_x509_csr(der)
        key = csr.public_key()
        sound = csr.is_signature_valid and isinstance(csr.signature_hash_algorithm, hashes.SHA256)
    except Exception as error:  # noqa: BLE001 - whatever the parser finds wrong is malformed
        raise MalformedMessageError(f"not a certificate request: {error!s:.120}") from None
    if not sound:
        raise MalformedMessageError("the certificate request is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise MalformedMessageError("the certificate request must hold an ECDSA P-256 key")
    return csr
