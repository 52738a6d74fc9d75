"""A person of the signed list gets a certificate: asked for with the key that the list names.

    DIR/person.key, person.crt, ca.crt   for TLS; the key is made here and never leaves
    DIR/client.toml                      for `minga run … --config DIR/client.toml`

The certificate lasts a day: asking again is the renewal, and it takes the key each time.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.signer import Signer

from infra.runs.client import error_of
from protocols.crypto.identity import Identity, identity_of_certificate
from protocols.errors import ConfigurationError, NotEnrolledError
from protocols.gen import enrolment_pb2, enrolment_pb2_grpc
from protocols.governance.people import ask, canonical_ask
from protocols.identifiers import FederationId, parse_federation_id

_CALL_S = 30.0


def federation_of(root: x509.Certificate) -> FederationId:
    """Whose root certificate it is. Raises: ConfigurationError."""
    names = root.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if not names:
        raise ConfigurationError("the root certificate names no federation")
    return parse_federation_id(names[0].value)


def certify(
    folder: Path,
    *,
    person: str,
    role: str,
    signer: Signer,
    root: Path,
    coordinator: str,
    enrolment: str,
    now: datetime,
) -> dict[str, Any]:
    """Ask for a certificate and keep it; facts about it.

    Args:
        folder: where it is kept; made if missing, what is in it is replaced.
        person: handle, as the signed list has it.
        role: admin, auditor, partner, release-board or witness.
        signer: of the person's key.
        root: the federation's root certificate, PEM.
        coordinator: HOST:PORT for calls with the certificate.
        enrolment: HOST:PORT where it is asked for.
        now: UTC.

    Raises:
        ConfigurationError: the root cannot be read.
        TrustRefusedError: the signed list says otherwise.
        UnreachableError: nobody answers, or not with this root.
    """
    try:
        pem = root.read_bytes()
        federation = federation_of(x509.load_pem_x509_certificate(pem))
    except (OSError, ValueError):
        raise ConfigurationError(f"{root} is no root certificate") from None
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    request = ask(federation=federation, person=person, role=role, csr=csr, signer=signer, now=now)
    message = enrolment_pb2.PersonEnrolRequest(request=canonical_ask(request), csr_der=csr)
    with grpc.secure_channel(enrolment, grpc.ssl_channel_credentials(pem)) as channel:
        stub: Any = enrolment_pb2_grpc.EnrolmentStub(channel)
        try:
            answer = stub.JoinPerson(message, timeout=_CALL_S)
        except grpc.RpcError as error:
            raise error_of(error, enrolment) from None
    certificate = x509.load_der_x509_certificate(answer.certificate_der)
    identity = identity_of_certificate(certificate, federation)
    if identity != Identity(role, person) or certificate.public_key() != key.public_key():  # type: ignore[arg-type]
        raise NotEnrolledError(f"the certificate that came is of {identity}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _replace(folder / "person.key", secret, 0o600)
    _replace(folder / "person.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    _replace(folder / "ca.crt", pem, 0o644)
    config = {
        "coordinator": coordinator,
        "ca": "ca.crt",
        "certificate": "person.crt",
        "key": "person.key",
    }
    _replace(folder / "client.toml", tomli_w.dumps(config).encode(), 0o644)
    return {
        "federation": federation,
        "identity": str(identity),
        "until": f"{certificate.not_valid_after_utc:%FT%TZ}",
        "config": str(folder / "client.toml"),
    }


def _replace(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
