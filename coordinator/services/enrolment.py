"""Exchanging a one-time token for a certificate, and a certificate for its successor.

The node makes its keys at the site and sends a certificate request and its Ed25519 signing key;
the proof binds the two to the token. A token works once; the same request may be repeated, because
an answer can be lost, and gets a certificate for the same key again.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from coordinator.ca import CertificateAuthority
from coordinator.clock import Clock
from coordinator.ledger import Ledger, Tx
from coordinator.services.caller import Callers
from protocols.canonical import hash_fields
from protocols.crypto.identity import Identity, read_csr, spki_digest
from protocols.crypto.signatures import Context, verify
from protocols.enrolment import enrolment_proof_body
from protocols.errors import NotPermittedError, TokenRefusedError
from protocols.gen import enrolment_pb2, enrolment_pb2_grpc
from protocols.identifiers import NodeId, parse_node_id
from protocols.rounds_codec import to_ms
from protocols.wire import read_bytes


class _Issuer:
    def __init__(
        self, *, authority: CertificateAuthority, ledger: Ledger, clock: Clock, hours: int
    ) -> None:
        self._authority = authority
        self._ledger = ledger
        self._clock = clock
        self._lifetime = timedelta(hours=hours)

    def _issue(self, tx: Tx, csr: x509.CertificateSigningRequest, node: NodeId) -> bytes:
        public_key = csr.public_key()
        certificate = self._authority.issue(
            public_key,  # type: ignore[arg-type]  # read_csr made sure of the kind
            Identity("node", node),
            now=self._clock.now(),
            lifetime=self._lifetime,
        )
        der = certificate.public_bytes(serialization.Encoding.DER)
        tx.add_certificate(
            serial=certificate.serial_number,
            spki_sha256=spki_digest(certificate),
            subject_role="node",
            subject_name=node,
            not_after=certificate.not_valid_after_utc,
            der=der,
        )
        return der

    def _response(self, der: bytes) -> enrolment_pb2.EnrolResponse:
        until = x509.load_der_x509_certificate(der).not_valid_after_utc
        root = self._authority.certificate.public_bytes(serialization.Encoding.DER)
        return enrolment_pb2.EnrolResponse(
            federation=self._authority.federation,
            certificate_der=der,
            issuer_der=[root],
            not_after_ms=to_ms(until),
        )


class EnrolmentService(_Issuer, enrolment_pb2_grpc.EnrolmentServicer):
    """Answers callers without a client certificate, on a port of its own."""

    async def Join(
        self, request: enrolment_pb2.EnrolRequest, context: grpc.aio.ServicerContext
    ) -> enrolment_pb2.EnrolResponse:
        """Use a token."""
        node = parse_node_id(request.institution)
        secret = read_bytes(request.token_secret, what="a token", size=32)
        signing_key = read_bytes(request.signing_key, what="a signing key", size=32)
        token_hash = hashlib.sha256(secret).digest()
        csr = read_csr(request.csr_der)
        verify(
            signing_key,
            Context.ENROLMENT,
            enrolment_proof_body(token_hash, request.csr_der, signing_key),
            request.proof,
        )
        request_hash = hash_fields("minga/enrolment-request/v1", request.csr_der, signing_key)
        now = self._clock.now()

        def enrol(tx: Tx) -> bytes:
            before = tx.token_use(token_hash)
            if before is None:
                institution = tx.use_token(token_hash, now, request_hash)
                if institution != node:
                    raise TokenRefusedError("the token is for another institution")
                tx.add_node(node, signing_key, now)
            elif before != request_hash:
                raise TokenRefusedError("the token was used before")
            return self._issue(tx, csr, node)

        return self._response(await self._ledger.run("enrol", enrol))


class RenewalService(_Issuer, enrolment_pb2_grpc.RenewalServicer):
    """Renews a certificate that is still in force; the new key is certified at once."""

    def __init__(self, *, callers: Callers, **issuer: object) -> None:
        super().__init__(**issuer)  # type: ignore[arg-type]
        self._callers = callers

    async def Renew(
        self, request: enrolment_pb2.RenewRequest, context: grpc.aio.ServicerContext
    ) -> enrolment_pb2.EnrolResponse:
        """Certify a new key for the caller."""
        node = await self._callers.node(context)
        csr = read_csr(request.csr_der)
        key = spki_digest(csr)

        def renew(tx: Tx) -> bytes:
            known = tx.certificate(key)
            if known is not None and known.subject_name != node:
                raise NotPermittedError("the key of the request belongs to somebody else")
            return self._issue(tx, csr, node)

        return self._response(await self._ledger.run("renew", renew))
