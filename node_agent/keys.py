"""The node's keys: made here, never sent, readable by their owner alone.

keys/tls.pem      ECDSA P-256 key, its certificate and the chain, in one file: a renewal
                  replaces them together, so that a crash never leaves a key with another's
                  certificate. BoringSSL, which gRPC uses, wants P-256.
keys/signing.pem  Ed25519: signs upload headers. Pinned by the coordinator at enrolment.
keys/root.pem     the trust anchor, from the invitation.
keys/request/     key and certificate request, and what they are for: kept, so that asking
                  again after a lost answer, or after a crash, sends the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent.spool import sync_folder
from protocols.crypto.identity import Identity, identity_of_certificate, spki_digest
from protocols.errors import ConfigurationError, FederationError, NotEnrolledError
from protocols.identifiers import FederationId, NodeId

_PEM = serialization.Encoding.PEM
_DER = serialization.Encoding.DER


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsIdentity:
    """What a channel needs, as PEM; and what people ask about the certificate."""

    key: bytes = field(repr=False)
    chain: bytes = field(repr=False)  # leaf first
    root: bytes = field(repr=False)
    not_before: datetime  # UTC
    not_after: datetime  # UTC
    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRequest:
    """A key that waits for its certificate."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    csr: bytes = field(repr=False)  # DER


def write_secret(path: Path, data: bytes) -> None:
    """Write or replace a secret file: 0600 from its first byte, whole or not at all, durable."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def certificate_pem(der: bytes) -> bytes:
    """DER to PEM.

    Raises:
        NotEnrolledError: not a certificate.
    """
    try:
        return x509.load_der_x509_certificate(der).public_bytes(_PEM)
    except ValueError:
        raise NotEnrolledError("what was sent as a certificate is none") from None


class KeyStore:
    """The files in ``keys/``. No key appears in a repr or an error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tls_path = folder / "tls.pem"
        self.signing_path = folder / "signing.pem"
        self.root_path = folder / "root.pem"
        self._request = folder / "request"

    # -- signing ---------------------------------------------------------------------------------

    def make_signing_key(self) -> Ed25519PrivateKey:
        """The signing key; made the first time it is asked for."""
        if not self.signing_path.exists():
            key = Ed25519PrivateKey.generate()
            write_secret(
                self.signing_path,
                key.private_bytes(
                    _PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ),
            )
        return self.signing_key()

    def signing_key(self) -> Ed25519PrivateKey:
        """Read the signing key.

        Raises:
            ConfigurationError: missing or unreadable.
        """
        key = self._read_key(self.signing_path)
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{self.signing_path} does not hold an Ed25519 key")
        return key

    # -- certificate requests --------------------------------------------------------------------

    def request(self, name: str, *, purpose: str) -> CertificateRequest:
        """The key and request for a certificate; made the first time, then the same.

        ECDSA signs with fresh randomness, so the request itself is kept, not only its key.

        Args:
            name: of the node; the issuer ignores it.
            purpose: what it is for, without secrets. Another purpose gets another key.
        """
        key_path, csr_path = self._request / "key.pem", self._request / "csr.der"
        mark = self._request / "purpose"
        known = mark.read_text("utf-8") if mark.exists() else None
        if known != purpose:
            self.forget_request()
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
            csr = x509.CertificateSigningRequestBuilder().subject_name(subject)
            write_secret(key_path, _key_pem(key))
            write_secret(csr_path, csr.sign(key, hashes.SHA256()).public_bytes(_DER))
            write_secret(mark, purpose.encode())  # last: from now on the request is whole
        own = self._read_key(key_path)
        if not isinstance(own, ec.EllipticCurvePrivateKey):
            raise ConfigurationError(f"{key_path} does not hold an ECDSA key")
        return CertificateRequest(key=own, csr=csr_path.read_bytes())

    def forget_request(self) -> None:
        """The next request is for a new key."""
        for name in ("purpose", "csr.der", "key.pem"):  # the mark first: no half request counts
            (self._request / name).unlink(missing_ok=True)

    def accept(
        self,
        request: CertificateRequest,
        *,
        certificate: bytes,
        issuers: tuple[bytes, ...],
        root: bytes,
        node: NodeId,
        federation: FederationId,
    ) -> TlsIdentity:
        """Take a certificate into use, once it is shown to be ours.

        1. It certifies the key of the request.
        2. It names this node of this federation, and nobody else.
        3. The trust anchor itself issued it: nodes have no intermediate certificates.

        Args:
            request: whose key is certified.
            certificate: DER.
            issuers: DER, as the coordinator sent them; kept in the chain, not trusted.
            root: PEM of the trust anchor.
            node: this node.
            federation: its federation.

        Raises:
            NotEnrolledError: the certificate is not this node's.
        """
        try:
            leaf = x509.load_der_x509_certificate(certificate)
            anchor = x509.load_pem_x509_certificate(root)
            if spki_digest(leaf) != spki_digest(x509.load_der_x509_csr(request.csr)):
                raise NotEnrolledError("the certificate is for another key than the one requested")
            identity = identity_of_certificate(leaf, federation)
            leaf.verify_directly_issued_by(anchor)
        except FederationError:
            raise
        except Exception as error:  # noqa: BLE001 - parsers and signatures fail in many ways
            raise NotEnrolledError(
                f"the certificate does not come from the trust anchor ({type(error).__name__})"
            ) from None
        if identity != Identity("node", node):
            raise NotEnrolledError(f"the certificate names {identity}, this node is {node}")
        chain = b"".join(certificate_pem(der) for der in (certificate, *issuers))
        write_secret(self.root_path, root)
        write_secret(self.tls_path, _key_pem(request.key) + chain)
        return self.tls()

    # -- in use ----------------------------------------------------------------------------------

    def tls(self) -> TlsIdentity:
        """The key and certificate in use.

        Raises:
            NotEnrolledError: there is none yet.
            ConfigurationError: the file cannot be read.
        """
        try:
            data, root = self.tls_path.read_bytes(), self.root_path.read_bytes()
        except FileNotFoundError as error:
            raise NotEnrolledError(
                f"{error.filename} is missing: this node has not joined a federation"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{error.filename}: {error.strerror}") from None
        marker = b"-----BEGIN CERTIFICATE-----"
        key, found, rest = data.partition(marker)
        try:
            leaf = x509.load_pem_x509_certificate(found + rest)
            own = serialization.load_pem_private_key(key, None)
            x509.load_pem_x509_certificate(root)
        except (ValueError, TypeError):
            raise ConfigurationError(f"{self.tls_path} or {self.root_path} is damaged") from None
        if own.public_key() != leaf.public_key():
            raise ConfigurationError(f"{self.tls_path}: the key is not the certificate's")
        return TlsIdentity(
            key=key,
            chain=found + rest,
            root=root,
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            serial=leaf.serial_number,
        )

    def certificate(self) -> x509.Certificate:
        """The leaf in use. Raises: as ``tls``."""
        return x509.load_pem_x509_certificate(self.tls().chain)

    def _read_key(self, path: Path) -> object:
        try:
            return serialization.load_pem_private_key(path.read_bytes(), None)
        except FileNotFoundError:
            raise ConfigurationError(f"{path} is missing") from None
        except (OSError, ValueError, TypeError):
            raise ConfigurationError(f"{path} cannot be read as a private key") from None


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
