"""Who is calling: from the client certificate, never from a field of the request.

A connection outlives the certificate it was opened with, so dates, role and membership are looked
at on every call, and by long streams again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import grpc
from cryptography import x509

from coordinator.ca import BACKDATED
from coordinator.clock import Clock
from coordinator.ledger import Ledger, Tx
from coordinator.services.errors import METHOD
from coordinator.trust_repository import TrustRepository
from policies.cedar import consortium_text, schema_text
from policies.cedar.engine import RuleSet
from policies.cedar.methods import decide_call
from policies.decision import Decision, Refused
from protocols.crypto.identity import (
    PERSON_ROLES,
    Identity,
    Role,
    certificate_in_force,
    identity_of_certificate,
    spki_digest,
)
from protocols.errors import NotEnrolledError, NotPermittedError
from protocols.governance.documents import member_refusal, parse_time
from protocols.governance.errors import TrustRefusedError
from protocols.governance.people import check_person, listed
from protocols.identifiers import Digest, FederationId, NodeId


@lru_cache(maxsize=4096)
def _read(pem: bytes, federation: FederationId) -> tuple[x509.Certificate, Identity, Digest]:
    certificate = x509.load_pem_x509_certificate(pem)
    return certificate, identity_of_certificate(certificate, federation), spki_digest(certificate)


@lru_cache(maxsize=1)
def _consortium() -> RuleSet:
    return RuleSet.load(schema=schema_text(), consortium=consortium_text())


@lru_cache(maxsize=4096)
def _may(method: str, role: str, name: str, further: tuple[str, ...], federation: str) -> Decision:
    """The rules' answer. Status was looked at before, on this very call: here it is active."""
    return decide_call(
        _consortium(), method, role=role, name=name, roles=further, federation=federation
    )


@dataclass(frozen=True, slots=True)
class Callers:
    """Tells services who calls, and refuses who may not."""

    federation: FederationId
    ledger: Ledger
    clock: Clock
    trust: TrustRepository | None = None

    async def node(self, context: grpc.aio.ServicerContext) -> NodeId:
        """The calling node: enrolled, active, its certificate one that we issued.

        Raises:
            NotEnrolledError, NotPermittedError.
        """
        return NodeId((await self._require(context, "node")).name)

    async def operator(self, context: grpc.aio.ServicerContext) -> Identity:
        """The calling operator.

        Raises:
            NotEnrolledError, NotPermittedError.
        """
        return await self._require(context, "operator", duties=True)

    async def carrier(self, context: grpc.aio.ServicerContext) -> Identity:
        """Who brings what admins signed: an admin, or an operator, also one whom the next list has
        to correct.

        Raises:
            NotEnrolledError, NotPermittedError.
        """
        return await self._require(context, "operator", "admin", listed=False)

    def _duties(self, operator: Identity) -> None:
        """Who runs the machine does not also decide or audit.

        Raises:
            TrustRefusedError: trust.duties.
        """
        state = self.trust.state() if self.trust is not None and self.trust.founded else None
        for person in state.admins.people if state is not None else ():
            other = {"admin", "auditor"} & set(person.roles)
            if person.id == operator.name and other:
                raise TrustRefusedError(
                    f"{operator.name} is {min(other)} of this federation: an operator is neither "
                    "admin nor auditor",
                    rule="trust.duties",
                )

    async def any(self, context: grpc.aio.ServicerContext) -> Identity:
        """A node, an operator, or a person of the signed list; the rules say which method.

        Raises:
            NotEnrolledError, NotPermittedError.
        """
        return await self._require(context, "node", "operator", *PERSON_ROLES)

    async def watcher(self, context: grpc.aio.ServicerContext) -> Identity:
        """An operator, or a person whom the rules let watch: partner, admin, auditor.

        Raises:
            NotEnrolledError, NotPermittedError.
        """
        return await self._require(context, "operator", *PERSON_ROLES, duties=True)

    async def reader(self, context: grpc.aio.ServicerContext) -> Identity:
        """Whoever may read what is in force: also a member that is suspended learns that it is.

        Raises:
            NotEnrolledError, NotPermittedError.
        """
        return await self._require(context, "node", "operator", *PERSON_ROLES, member=False)

    async def cosigner(self, context: grpc.aio.ServicerContext) -> NodeId:
        """The calling node as a witness: also one that is suspended, expelled or left.

        The log counts its key for as long as the log names it, and whoever cosigns promises one
        history and takes part in nothing. A certificate that an emergency denies is refused.

        Raises:
            NotEnrolledError, NotPermittedError.
        """
        return NodeId((await self._require(context, "node", member=False)).name)

    def member(self, node: NodeId) -> None:
        """Whether the signed membership, and no emergency, lets an institution take part now.

        Raises:
            TrustRefusedError: it does not.
        """
        state = self.trust.state() if self.trust is not None else None
        if state is None:
            return
        now = self.clock.now()
        refusal = member_refusal(state.members, state.emergencies, node, now)
        if refusal is not None:
            raise refusal

    def _key_in_force(self, key: Digest) -> None:
        """No emergency notice denies this very certificate's key."""
        state = self.trust.state() if self.trust is not None and self.trust.founded else None
        now = self.clock.now()
        for name, notice in state.emergencies.items() if state else ():
            if key in notice.deny.certificates and notice.in_force(now):
                raise TrustRefusedError(
                    f"the key of this certificate is denied by {name}", rule="trust.emergency"
                )

    def _person(self, identity: Identity, certificate: x509.Certificate, *, member: bool) -> None:
        """The signed list still gives this person this role, and did when it was certified.

        Another key begins another term, so a certificate from before it has no force any more.

        Raises:
            TrustRefusedError: trust.duties, trust.expired, trust.member or trust.bootstrap.
        """
        state = self.trust.state() if self.trust is not None else None
        if state is None:
            raise TrustRefusedError(
                f"no list of people is signed that names {identity}", rule="trust.bootstrap"
            )
        person = listed(state.admins, identity.name, identity.role)
        since = certificate.not_valid_before_utc + BACKDATED
        if since < parse_time(person.term_from):
            raise TrustRefusedError(
                f"the certificate of {identity} is older than its term: ask for another",
                rule="trust.expired",
            )
        if member:
            check_person(person, state.members, self.clock.now())

    async def _require(
        self,
        context: grpc.aio.ServicerContext,
        *roles: Role,
        member: bool = True,
        duties: bool = False,
        listed: bool = True,
    ) -> Identity:
        pem = context.auth_context().get("x509_pem_cert")
        if not pem:
            raise NotEnrolledError("the call came without a client certificate")
        try:
            certificate, identity, key = _read(pem[0], self.federation)
        except ValueError:
            raise NotEnrolledError("the client certificate cannot be read") from None
        certificate_in_force(certificate, self.clock.now())
        if identity.role not in roles:
            raise NotPermittedError(f"{identity} may not do this; it is for a {' or '.join(roles)}")

        def check(tx: Tx) -> str | None:
            certified, status = tx.standing(key, identity.name)
            if not certified:
                return "was not issued by this federation"
            if identity.role == "node":
                if status is None:
                    return "names a node that is not enrolled"
                if status != "active":
                    return f"names a node that is {status}"
            return None

        problem = await self.ledger.read("membership", check)
        if problem is not None:
            raise NotEnrolledError(f"the certificate of {identity} {problem}")
        self._key_in_force(key)
        if member and identity.role == "node":
            self.member(NodeId(identity.name))
        if identity.role in PERSON_ROLES:
            self._person(identity, certificate, member=member)
        if duties and identity.role == "operator":
            self._duties(identity)
        self._rules(identity, listed=listed)
        return identity

    def _rules(self, identity: Identity, *, listed: bool) -> None:
        """The consortium's rules: may such a caller call this method at all?

        Args:
            listed: whether the roles that the signed list gives a person count too.

        Raises:
            NotPermittedError: with the ids of the rules that say no.
        """
        state = self.trust.state() if self.trust is not None and self.trust.founded else None
        people = state.admins.people if state is not None else ()
        held = next((person.roles for person in people if person.id == identity.name), ())
        further = tuple(held) if listed and identity.role != "node" else ()
        answer = _may(METHOD.get(), identity.role, identity.name, further, self.federation)
        if isinstance(answer, Refused):
            raise NotPermittedError(str(answer))
