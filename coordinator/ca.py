"""The federation's certificate authority: one root, leaves of ECDSA P-256, SPIFFE names.

BoringSSL, which gRPC uses, wants ECDSA P-256. A leaf carries exactly one URI that says whom it
speaks for; only the coordinator's has host names beside it. Extensions of a request are ignored:
the issuer alone decides what a certificate says. Private keys are written 0600 and never printed.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocols.crypto.identity import Identity, spiffe_uri
from protocols.errors import ConfigurationError, ExistsError
from protocols.identifiers import FederationId

BACKDATED = timedelta(minutes=5)  # clocks differ
ROOT_DAYS = 3650
COORDINATOR_DAYS = 365

PublicKey = ec.EllipticCurvePublicKey


def new_tls_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP256R1())


def write_private(path: Path, data: bytes) -> None:
    """Write a secret so that only its owner can read it, from the first byte on.

    Raises:
        ExistsError: there is a file already; keys are never overwritten.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ExistsError(f"{path} exists; keys are never overwritten") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM without a passphrase: guarded by its file's mode."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """PEM of one certificate."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateAuthority:
    """Issues leaves for one federation."""

    federation: FederationId
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, federation: FederationId, *, now: datetime) -> CertificateAuthority:
        """A new self-signed root."""
        key = new_tls_key()
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Minga federation"),
                x509.NameAttribute(NameOID.COMMON_NAME, federation),
            ]
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + timedelta(days=ROOT_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(federation=federation, certificate=certificate, key=key)

    @classmethod
    def load(cls, federation: FederationId, keys: Path) -> CertificateAuthority:
        """Read ``ca.crt`` and ``ca.key``.

        Raises:
            ConfigurationError: missing or unreadable.
        """
        try:
            certificate = x509.load_pem_x509_certificate((keys / "ca.crt").read_bytes())
            key = serialization.load_pem_private_key((keys / "ca.key").read_bytes(), None)
        except (OSError, ValueError, TypeError):
            raise ConfigurationError(f"{keys}: ca.crt or ca.key cannot be read") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigurationError(f"{keys}/ca.key is not an ECDSA key")
        return cls(federation=federation, certificate=certificate, key=key)

    def issue(
        self,
        public_key: PublicKey,
        identity: Identity,
        *,
        now: datetime,
        lifetime: timedelta,
        hosts: tuple[str, ...] = (),
    ) -> x509.Certificate:
        """Certify a key for one identity.

        Args:
            public_key: ECDSA P-256; its owner has shown that it holds the private half.
            identity: what the certificate says.
            now: UTC.
            lifetime: how long it is in force.
            hosts: DNS names or IP addresses, for the coordinator only.
        """
        if hosts and identity.role != "coordinator":
            raise ValueError("only the coordinator's certificate names hosts")
        uri = spiffe_uri(self.federation, identity)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
        names.extend(_host_name(host) for host in hosts)
        usage = (
            ExtendedKeyUsageOID.SERVER_AUTH
            if identity.role == "coordinator"
            else ExtendedKeyUsageOID.CLIENT_AUTH
        )
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(min(now + lifetime, self.certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority, critical=False)
            .sign(self.key, hashes.SHA256())
        )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
