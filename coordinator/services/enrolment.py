"""Exchanging a one-time token for a certificate, and a certificate for its successor.

The node makes its keys at the site and sends a certificate request and its Ed25519 signing key;
the proof binds the two to the token. A token works once; the same request may be repeated, because
an answer can be lost, and gets a certificate for the same key again.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from coordinator.ca import CertificateAuthority
from coordinator.clock import Clock
from coordinator.leaves import say_certificate
from coordinator.ledger import Ledger, Tx
from coordinator.services.caller import Callers
from coordinator.trust_repository import TrustRepository
from policies.audit.replay import peek
from protocols.canonical import hash_fields
from protocols.crypto.identity import Identity, read_csr, spiffe_uri, spki_digest
from protocols.crypto.signatures import Context, verify
from protocols.enrolment import enrolment_proof_body
from protocols.errors import NotPermittedError, TokenRefusedError
from protocols.gen import enrolment_pb2, enrolment_pb2_grpc
from protocols.governance.approval import check_approval, check_request
from protocols.governance.documents import member_refusal
from protocols.governance.errors import TrustRefusedError
from protocols.governance.people import check_ask
from protocols.identifiers import Digest, FederationId, NodeId, parse_node_id
from protocols.rounds_codec import to_ms
from protocols.tlog.kinds import EnrolRequest
from protocols.wire import read_bytes

MAX_APPROVAL_AGE_S: Final = 72 * 3600.0


def check_asked_names(
    csr: x509.CertificateSigningRequest, federation: FederationId, identity: Identity
) -> None:
    """A request may be silent about names, or ask for exactly its own.

    The certificate's name is made here in any case; whoever asks for another one is refused, so
    that an attempt is seen.

    Raises:
        NotPermittedError: it asks for another name, or for more than one.
    """
    try:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    except ValueError:
        raise NotPermittedError("the request asks for names that cannot be read") from None
    wanted = x509.UniformResourceIdentifier(spiffe_uri(federation, identity))
    if list(names) != [wanted]:
        raise NotPermittedError(f"the request asks for other names than that of {identity}")


def check_fresh_keys(
    tx: Tx, csr: x509.CertificateSigningRequest, signing_key: bytes, node: NodeId
) -> None:
    """Neither key is somebody else's.

    Raises:
        NotPermittedError: one of them is.
    """
    known = tx.certificate(spki_digest(csr))
    if known is not None and (known.subject_role, known.subject_name) != ("node", node):
        raise NotPermittedError("the key of the request belongs to somebody else")
    if any(row.signing_key == signing_key and row.node != node for row in tx.nodes()):
        raise NotPermittedError("the signing key belongs to another node")


class _Issuer:
    def __init__(
        self,
        *,
        authority: CertificateAuthority,
        ledger: Ledger,
        clock: Clock,
        hours: int,
        person_hours: int = 24,
        trust: TrustRepository | None = None,
        log_vkey: str = "",
    ) -> None:
        self._authority = authority
        self._ledger = ledger
        self._clock = clock
        self._lifetime = timedelta(hours=hours)
        self._person_lifetime = timedelta(hours=person_hours)
        self._trust = trust
        self._log_vkey = log_vkey

    def _issue(
        self,
        tx: Tx,
        csr: x509.CertificateSigningRequest,
        node: NodeId,
        leaf: bytes,
        approval: bytes | None = None,
    ) -> bytes:
        request = self._requested(tx, csr, node, leaf, approval)
        public_key = csr.public_key()
        certificate = self._authority.issue(
            public_key,  # type: ignore[arg-type]  # read_csr made sure of the kind
            Identity("node", node),
            now=self._clock.now(),
            lifetime=self._lifetime,
        )
        return self._enter(tx, certificate, Identity("node", node), request)

    def _enter(
        self, tx: Tx, certificate: x509.Certificate, identity: Identity, request: Digest | None
    ) -> bytes:
        """Enter a certificate into the ledger and the log; its bytes."""
        der = certificate.public_bytes(serialization.Encoding.DER)
        tx.add_certificate(
            serial=certificate.serial_number,
            spki_sha256=spki_digest(certificate),
            subject_role=identity.role,
            subject_name=identity.name,
            not_after=certificate.not_valid_after_utc,
            der=der,
        )
        if tx.logs:
            say_certificate(tx, certificate, self._authority.federation, request)
        return der

    def _requested(
        self,
        tx: Tx,
        csr: x509.CertificateSigningRequest,
        node: NodeId,
        leaf: bytes,
        approval: bytes | None,
    ) -> Digest | None:
        """Log what the node asks for; the leaf's hash, None without a log.

        With an approval the leaf carries it too: whoever reads the log checks it.
        """
        if not tx.logs:
            return None
        if not leaf:
            raise NotPermittedError(
                "this federation keeps a round log: the request is to be signed"
            )
        found = peek(leaf)
        said = found[1] if found else None
        if not isinstance(said, EnrolRequest) or (said.node, said.spki_sha256) != (
            node,
            spki_digest(csr),
        ):
            raise NotPermittedError("the signed request is for another node or key")
        row = tx.node(node)
        if row is None or row.signing_key.hex() != said.signing_key:
            raise NotPermittedError("the signed request names another signing key")
        if approval is not None and said.approval is None:
            raise TrustRefusedError(
                f"the signed request of {node} does not carry its institution's approval",
                rule="trust.key",
            )
        return tx.append_leaf(leaf)

    def _response(self, der: bytes) -> enrolment_pb2.EnrolResponse:
        until = x509.load_der_x509_certificate(der).not_valid_after_utc
        root = self._authority.certificate.public_bytes(serialization.Encoding.DER)
        return enrolment_pb2.EnrolResponse(
            federation=self._authority.federation,
            certificate_der=der,
            issuer_der=[root],
            not_after_ms=to_ms(until),
            trust_root=(self._trust.first_root() if self._trust is not None else None) or b"",
            log_vkey=self._log_vkey,
        )

    def _approved(self, node: NodeId, request: enrolment_pb2.EnrolRequest) -> bytes | None:
        """The approval of the institution, verified; None: nothing is signed yet.

        Raises:
            TrustRefusedError: trust.member, trust.emergency, trust.key, trust.bootstrap …
        """
        state = self._trust.state() if self._trust is not None else None
        if state is None:
            return None
        now = self._clock.now()
        refusal = member_refusal(state.members, state.emergencies, node, now)
        if refusal is not None:
            raise refusal
        if not request.approval:
            raise TrustRefusedError(
                f"{node} joins with an approval by its institution's key", rule="trust.key"
            )
        said = check_approval(
            request.approval,
            federation=state.federation,
            institution=node,
            keys=state.members.keys_of(node),
        )
        check_request(
            said,
            csr=request.csr_der,
            signing_key=request.signing_key,
            now=now,
            max_age_s=MAX_APPROVAL_AGE_S,
        )
        return request.approval


class EnrolmentService(_Issuer, enrolment_pb2_grpc.EnrolmentServicer):
    """Answers callers without a client certificate, on a port of its own."""

    async def Join(
        self, request: enrolment_pb2.EnrolRequest, context: grpc.aio.ServicerContext
    ) -> enrolment_pb2.EnrolResponse:
        """Use a token."""
        node = parse_node_id(request.institution)
        # Without a token: a member whose certificate expired, by its institution's word alone.
        secret = b""
        if request.token_secret or not request.approval:
            secret = read_bytes(request.token_secret, what="a token", size=32)
        signing_key = read_bytes(request.signing_key, what="a signing key", size=32)
        token_hash = hashlib.sha256(secret).digest()
        csr = read_csr(request.csr_der)
        check_asked_names(csr, self._authority.federation, Identity("node", node))
        verify(
            signing_key,
            Context.ENROLMENT,
            enrolment_proof_body(token_hash, request.csr_der, signing_key),
            request.proof,
        )
        request_hash = hash_fields("minga/enrolment-request/v1", request.csr_der, signing_key)
        now = self._clock.now()
        approval = self._approved(node, request)

        def enrol(tx: Tx) -> bytes:
            check_fresh_keys(tx, csr, signing_key, node)
            if not secret:
                row = tx.node(node)
                if approval is None or row is None:
                    raise TokenRefusedError("the first join needs an invitation")
                if row.signing_key != signing_key:
                    raise TokenRefusedError("another signing key needs an invitation")
                tx.add_node(node, signing_key, now, approval)
                return self._issue(tx, csr, node, request.leaf, approval)
            before = tx.token_use(token_hash)
            if before is None:
                institution = tx.use_token(token_hash, now, request_hash)
                if institution != node:
                    raise TokenRefusedError("the token is for another institution")
                tx.add_node(node, signing_key, now, approval)
            elif before != request_hash:
                raise TokenRefusedError("the token was used before")
            return self._issue(tx, csr, node, request.leaf, approval)

        return self._response(await self._ledger.run("enrol", enrol))

    async def JoinPerson(
        self, request: enrolment_pb2.PersonEnrolRequest, context: grpc.aio.ServicerContext
    ) -> enrolment_pb2.EnrolResponse:
        """Certify a person of the signed list; asking again is harmless."""
        state = self._trust.state() if self._trust is not None else None
        if state is None:
            raise TrustRefusedError(
                "no list of people is signed: the federation is not governed",
                rule="trust.bootstrap",
            )
        csr, now = read_csr(request.csr_der), self._clock.now()
        said = check_ask(
            request.request,
            csr=request.csr_der,
            federation=state.federation,
            admins=state.admins,
            members=state.members,
            now=now,
        )
        identity = Identity(said.role, said.person)
        check_asked_names(csr, self._authority.federation, identity)

        def certify(tx: Tx) -> bytes:
            known = tx.certificate(spki_digest(csr))
            if known is not None and (known.subject_role, known.subject_name) != (
                identity.role,
                identity.name,
            ):
                raise NotPermittedError("the key of the request belongs to somebody else")
            certificate = self._authority.issue(
                csr.public_key(),  # type: ignore[arg-type]  # read_csr made sure of the kind
                identity,
                now=now,
                lifetime=self._person_lifetime,
            )
            return self._enter(tx, certificate, identity, None)

        return self._response(await self._ledger.run("enrol_person", certify))


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
        check_asked_names(csr, self._authority.federation, Identity("node", node))
        key = spki_digest(csr)

        def renew(tx: Tx) -> bytes:
            known = tx.certificate(key)
            if known is not None and known.subject_name != node:
                raise NotPermittedError("the key of the request belongs to somebody else")
            return self._issue(tx, csr, node, request.leaf)

        return self._response(await self._ledger.run("renew", renew))
