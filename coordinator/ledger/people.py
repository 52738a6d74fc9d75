"""Invitations, nodes and certificates in a ledger transaction."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.rows import CertificateRow, NodeRow, NodeStatus, ProgressRow
from coordinator.ledger.schema import certificates, nodes, progress, tokens
from coordinator.ledger.statements import Statements
from protocols.errors import ExistsError, NotFoundError, TokenRefusedError
from protocols.identifiers import Digest, NodeId, parse_node_id
from protocols.rounds_codec import from_ms, to_ms

_USE_TOKEN = (
    sa.update(tokens)
    .where(
        tokens.c.token_hash == bindparam("hash_"),
        tokens.c.used_at.is_(None),
        tokens.c.expires_at > bindparam("at"),
    )
    .values(used_at=bindparam("at"), request_hash=bindparam("request"))
    .returning(tokens.c.institution)
)
_TOKEN = sa.select(tokens).where(tokens.c.token_hash == bindparam("hash_"))
_NODE = sa.select(nodes).where(nodes.c.node_id == bindparam("node"))
_NODES = sa.select(nodes).order_by(nodes.c.node_id)
_SEEN = (
    sa.update(nodes)
    .where(nodes.c.node_id == bindparam("node"))
    .values(seen_at=bindparam("at"), state=bindparam("said"), agent_version=bindparam("version"))
)
_STATUS = (
    sa.update(nodes)
    .where(nodes.c.node_id == bindparam("node"))
    .values(status=bindparam("new_status"))
)
_CERTIFICATE = (
    sa.select(certificates)
    .where(certificates.c.spki_sha256 == bindparam("spki"))
    .order_by(certificates.c.not_after.desc(), certificates.c.serial)
    .limit(1)
)
_STANDING = (
    sa.select(certificates.c.serial, nodes.c.status)
    .select_from(certificates.outerjoin(nodes, nodes.c.node_id == bindparam("node")))
    .where(certificates.c.spki_sha256 == bindparam("spki"))
    .limit(1)
)
_CERTIFICATES = sa.select(certificates).order_by(certificates.c.not_after, certificates.c.serial)


class People(Statements):
    """Who may speak to the coordinator."""

    # -- invitations -------------------------------------------------------------------------

    def add_token(self, token_hash: bytes, institution: NodeId, expires_at: datetime) -> None:
        """Remember an invitation by its hash.

        Raises:
            ExistsError: the hash is known.
        """
        written = self._insert_once(
            tokens,
            token_hash=token_hash,
            institution=institution,
            expires_at=to_ms(expires_at),
        )
        if not written:
            raise ExistsError("this invitation exists already")
        self.note(f"{institution} was invited until {expires_at:%F %H:%M}Z")

    def use_token(self, token_hash: bytes, now: datetime, request_hash: bytes = b"") -> NodeId:
        """Use up an invitation: one atomic update, so of two uses only one succeeds.

        Args:
            token_hash: 32 bytes.
            now: UTC.
            request_hash: of the request that uses it, so that the same request may be repeated.

        Returns:
            The institution that was invited.

        Raises:
            TokenRefusedError: unknown, used or expired; the sentence says which.
        """
        row = self._one(_USE_TOKEN, hash_=token_hash, at=to_ms(now), request=request_hash)
        if row is not None:
            return NodeId(row.institution)
        known = self._one(_TOKEN, hash_=token_hash)
        if known is None:
            raise TokenRefusedError("this invitation is unknown")
        if known.used_at is not None:
            raise TokenRefusedError("this invitation was used before")
        raise TokenRefusedError(f"this invitation expired at {from_ms(known.expires_at):%F %H:%M}Z")

    def token_use(self, token_hash: bytes) -> bytes | None:
        """Hash of the request that used an invitation; None: unknown or not used."""
        row = self._one(_TOKEN, hash_=token_hash)
        return None if row is None or row.request_hash is None else bytes(row.request_hash)

    def token_institution(self, token_hash: bytes) -> NodeId | None:
        """Whom an invitation invites, used or not; None: unknown."""
        row = self._one(_TOKEN, hash_=token_hash)
        return None if row is None else NodeId(row.institution)

    # -- nodes -------------------------------------------------------------------------------

    def add_node(
        self, node: NodeId, signing_key: bytes, now: datetime, approval: bytes | None = None
    ) -> None:
        """Enrol a node, or replace the signing key of one that enrols again.

        Args:
            node: its institution's id.
            signing_key: 32 raw bytes.
            now: UTC.
            approval: by which its institution names these keys; None: without governance.
        """
        parse_node_id(node)
        self._write(
            self._insert(nodes)
            .values(
                node_id=node,
                signing_key=signing_key,
                status="active",
                enrolled_at=to_ms(now),
                state="",
                agent_version="",
                approval=approval,
            )
            .on_conflict_do_update(
                index_elements=["node_id"],
                set_={"signing_key": signing_key, "approval": approval},
            )
        )
        self.note(f"{node} enrolled", now=now, node=node)

    def node(self, node: NodeId) -> NodeRow | None:
        """One enrolled node."""
        row = self._one(_NODE, node=node)
        return None if row is None else _node(row)

    def nodes(self) -> list[NodeRow]:
        """All enrolled nodes, by name."""
        return [_node(row) for row in self._all(_NODES)]

    def set_node_status(self, node: NodeId, status: NodeStatus, why: str) -> None:
        """Suspend a node, or let it back in.

        Raises:
            NotFoundError: it is not enrolled.
        """
        if not self._write(_STATUS, node=node, new_status=status):
            raise NotFoundError(f"no node {node} is enrolled here")
        self.note(f"{node} is {status}: {why}")

    def seen(self, node: NodeId, now: datetime, state: str = "", version: str = "") -> None:
        """Remember that a node called, and what it said of itself. Not part of history."""
        self._write(_SEEN, node=node, at=to_ms(now), said=state, version=version)

    def set_progress(self, node: NodeId, reports: bytes, now: datetime) -> None:
        """Replace what a node says it is doing. Not part of history."""
        values = {"reports": reports, "received_at": to_ms(now)}
        self._write(
            self._insert(progress)
            .values(node_id=node, **values)
            .on_conflict_do_update(index_elements=["node_id"], set_=values)
        )

    def progress(self) -> list[ProgressRow]:
        """What the nodes said last, by name."""
        return [
            ProgressRow(
                node=NodeId(row.node_id),
                reports=bytes(row.reports),
                received_at=from_ms(row.received_at),
            )
            for row in self._all(sa.select(progress).order_by(progress.c.node_id))
        ]

    # -- certificates ------------------------------------------------------------------------

    def add_certificate(
        self,
        *,
        serial: int,
        spki_sha256: Digest,
        subject_role: str,
        subject_name: str,
        not_after: datetime,
        der: bytes,
    ) -> None:
        """Remember a certificate that is about to be handed out.

        Raises:
            ExistsError: the serial number is known.
        """
        written = self._insert_once(
            certificates,
            serial=f"{serial:x}",
            spki_sha256=spki_sha256,
            subject_role=subject_role,
            subject_name=subject_name,
            not_after=to_ms(not_after),
            der=der,
        )
        if not written:
            raise ExistsError(f"a certificate with serial number {serial:x} exists")
        self.note(f"{subject_role} {subject_name} certified until {not_after:%F %H:%M}Z")

    def certificate(self, spki_sha256: Digest) -> CertificateRow | None:
        """The certificate of a key that is in force longest."""
        row = self._one(_CERTIFICATE, spki=spki_sha256)
        return None if row is None else _certificate(row)

    def standing(self, spki_sha256: Digest, name: str) -> tuple[bool, NodeStatus | None]:
        """Whether a key was certified here, and the status of a node, in one statement: every call
        asks. None: no such node is enrolled, or the key is unknown."""
        row = self._one(_STANDING, spki=spki_sha256, node=name)
        return (False, None) if row is None else (True, row.status)

    def certificates(self) -> list[CertificateRow]:
        """Every certificate, the one that ends first before the others."""
        return [_certificate(row) for row in self._all(_CERTIFICATES)]


def _node(row: Any) -> NodeRow:
    return NodeRow(
        node=NodeId(row.node_id),
        signing_key=bytes(row.signing_key),
        status=row.status,
        enrolled_at=from_ms(row.enrolled_at),
        seen_at=None if row.seen_at is None else from_ms(row.seen_at),
        state=row.state,
        agent_version=row.agent_version,
        approval=None if row.approval is None else bytes(row.approval),
    )


def _certificate(row: Any) -> CertificateRow:
    return CertificateRow(
        serial=int(row.serial, 16),
        spki_sha256=Digest(row.spki_sha256),
        subject_role=row.subject_role,
        subject_name=row.subject_name,
        not_after=from_ms(row.not_after),
        der=bytes(row.der),
    )
