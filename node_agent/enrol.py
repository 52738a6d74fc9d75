"""How a node gets its certificate, and the next one.

An invitation is one word, ``minga1.<institution>.<secret>.<root certificate>``: the very first
connection is verified against the root it carries. TLS key and signing key are made here and never
leave; what is sent is a certificate request, the public signing key, and a proof that binds both to
the invitation. The request is kept, so that a repeated join sends the same bytes: neither a lost
answer nor a crash at any instant costs the invitation. Normative text: protocols/spec/enrolment.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent.client import OPTIONS, Backoff, Connection, rebuild_error, retrying
from node_agent.keys import (
    CertificateRequest,
    KeyStore,
    TlsIdentity,
    certificate_pem,
    write_secret,
)
from node_agent.log import LogPaths, NodeLog, enrol_leaf, now_unix, witness_key
from node_agent.log_store import LogStore
from protocols.canonical import sha256_hex
from protocols.crypto.identity import spki_digest
from protocols.crypto.signatures import Context, public_bytes, sign
from protocols.enrolment import Invitation, enrolment_proof_body
from protocols.errors import DigestMismatchError, NotEnrolledError
from protocols.gen import enrolment_pb2, enrolment_pb2_grpc
from protocols.identifiers import FederationId, NodeId, parse_federation_id
from protocols.tlog.note import VerifierKey

RENEW_AFTER = 2 / 3  # of the certificate's lifetime
_RENEW_SPREAD = 0.1  # of the lifetime: nodes that joined together do not renew together


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """What a successful join brought."""

    federation: FederationId
    node: NodeId
    identity: TlsIdentity
    trust_root: bytes | None = None  # 1.root.json; None: the federation is not governed


def request_for(
    keys: KeyStore, invitation: Invitation
) -> tuple[Ed25519PrivateKey, CertificateRequest, bytes]:
    """The signing key, the certificate request and the token's hash; made once, then the same."""
    signing_key = keys.make_signing_key()
    token_hash = hashlib.sha256(invitation.secret).digest()
    request = keys.request(invitation.institution, purpose=f"join {token_hash.hex()}")
    return signing_key, request, token_hash


async def join(
    keys: KeyStore,
    invitation: Invitation,
    *,
    enrolment: str,
    rng: Random,
    approval: bytes = b"",
    log: LogPaths | None = None,
) -> Enrolled:
    """Exchange an invitation for a certificate.

    Args:
        keys: the node's key store; keys are made the first time.
        invitation: parsed.
        enrolment: HOST:PORT of the enrolment service.
        rng: jitter of retries.
        approval: the institution's statement about these very keys; needed once the federation is
            founded.
        log: where the node keeps what belongs to the round log; None: it takes no part in one.

    Raises:
        TokenRefusedError: used by another request, expired or unknown.
        NotEnrolledError: the answer is not a certificate for this node.
        UnreachableError: nobody answers, or the certificate there is not the federation's.
    """
    signing_key, request, token_hash = request_for(keys, invitation)
    root = certificate_pem(invitation.root_der)
    public = public_bytes(signing_key)
    message = enrolment_pb2.EnrolRequest(
        institution=invitation.institution,
        token_secret=invitation.secret,
        csr_der=request.csr,
        signing_key=public,
        proof=sign(
            signing_key, Context.ENROLMENT, enrolment_proof_body(token_hash, request.csr, public)
        ),
        approval=approval,
        leaf=_asked(log, signing_key, invitation, request.csr, approval),
    )
    credentials = grpc.ssl_channel_credentials(root_certificates=root)
    async with grpc.aio.secure_channel(enrolment, credentials, options=list(OPTIONS)) as channel:
        stub: Any = enrolment_pb2_grpc.EnrolmentStub(channel)

        async def once() -> Any:
            try:
                return await stub.Join(message, timeout=30.0)
            except grpc.aio.AioRpcError as error:
                raise rebuild_error(error, enrolment) from None

        answer = await retrying(once, rng=rng, backoff=Backoff(), attempts=5)
    if log is not None and answer.log_vkey:
        _keep_anchor(log, answer.log_vkey)
        _mark_taken(log, request.csr)
    federation = parse_federation_id(answer.federation)
    identity = keys.accept(
        request,
        certificate=answer.certificate_der,
        issuers=tuple(answer.issuer_der),
        root=root,
        node=invitation.institution,
        federation=federation,
    )
    return Enrolled(
        federation=federation,
        node=invitation.institution,
        identity=identity,
        trust_root=check_trust_root(answer.trust_root, invitation),
    )


def _asked(
    log: LogPaths | None,
    key: Ed25519PrivateKey,
    invitation: Invitation,
    csr: bytes,
    approval: bytes,
) -> bytes:
    """The signed request for the round log; empty without one.

    Where members are signed, nothing is said before the institution approved it: what a node said
    once it cannot say otherwise, and the join without an approval is refused anyway.
    """
    if log is None or (invitation.trust_root and not approval):
        return b""
    node = invitation.institution
    store = LogStore(log.store)
    try:
        leaf = enrol_leaf(
            store,
            key=key,
            node=node,
            csr=csr,
            spki=spki_digest(x509.load_der_x509_csr(csr)),
            witness=witness_key(log, node),
            approval=approval,
        )
    finally:
        store.close()
    return leaf.entry


def _mark_taken(log: LogPaths, csr: bytes) -> None:
    store = LogStore(log.store)
    try:
        leaf = store.own(f"enrol.request {sha256_hex(csr)}")
        if leaf is not None:
            store.taken([leaf.seq], now_unix())
    finally:
        store.close()


def _keep_anchor(log: LogPaths, vkey: str) -> None:
    """Remember the log's key; it never changes here.

    Raises:
        DigestMismatchError: the coordinator names another log than before.
    """
    key = VerifierKey.parse(vkey)
    if log.vkey.exists():
        if log.vkey.read_text("utf-8").strip() != vkey:
            raise DigestMismatchError(
                "the coordinator names another log than at the first join: do not go on"
            )
        return
    write_secret(log.vkey, key.to_text().encode() + b"\n")


def check_trust_root(data: bytes, invitation: Invitation) -> bytes | None:
    """The first root of the trust repository, if the invitation named one.

    Raises:
        DigestMismatchError: the coordinator gave another one than the invitation names.
    """
    if not invitation.trust_root:
        return None
    if hashlib.sha256(data).digest() != invitation.trust_root:
        raise DigestMismatchError(
            "the coordinator shows another first root than the invitation names: do not go on, "
            "and ask the admins for the digest of theirs"
        )
    return data


def renewal_due(identity: TlsIdentity, *, rng: Random) -> datetime:
    """When to ask for the next certificate: two thirds of the lifetime, and a little chance."""
    lifetime: timedelta = identity.not_after - identity.not_before
    return identity.not_before + lifetime * (RENEW_AFTER + rng.uniform(0.0, _RENEW_SPREAD))


async def renew(
    keys: KeyStore,
    connection: Connection,
    *,
    node: NodeId,
    federation: FederationId,
    log: NodeLog | None = None,
) -> TlsIdentity:
    """Get a certificate for a new key, and use it from now on, without a restart.

    Raises:
        NotEnrolledError: the present certificate is not in force any more: join again.
        NotReadyError: nobody answers; the present certificate stays in use.
    """
    serial = keys.tls().serial
    request = keys.request(node, purpose=f"renew {serial:x}")
    leaf = None
    if log is not None:
        leaf = await log.renewal(request.csr, spki_digest(x509.load_der_x509_csr(request.csr)))
    message = enrolment_pb2.RenewRequest(csr_der=request.csr, leaf=leaf.entry if leaf else b"")
    answer = await connection.ask(lambda c: c.renewal.Renew, message)
    if log is not None and leaf is not None:
        await log.taken(leaf)
    if answer.federation != federation:
        raise NotEnrolledError(f"the certificate is of federation {answer.federation!r:.60}")
    identity = keys.accept(
        request,
        certificate=answer.certificate_der,
        issuers=tuple(answer.issuer_der),
        root=keys.tls().root,
        node=node,
        federation=federation,
    )
    keys.forget_request()
    connection.renew(identity)
    return identity
