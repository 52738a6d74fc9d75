"""What the admins had signed at each index of the log, rebuilt from the log's own leaves.

Every metadata file that was published is a ``tuf.published`` leaf; its bytes are a document beside
the log. So an auditor needs no trust repository as it is today: after each publication the files
so far are verified again from the first root, with thresholds, distinct institutions, versions that
only rise and the majority that each change needs (``policies.trust.check_successor``).

Members' keys come into force for later leaves as the membership says, and go when it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tuf.api.metadata import Targets

from policies.audit.records import Fault
from policies.audit.replay import Replay, Taken
from policies.audit.speakers import speakers_of
from policies.bodies import check_hearings
from policies.consortium import ConsortiumPolicy
from policies.deciding import check_successor, policy_of
from policies.effect import PolicyHistory, beginning
from policies.overrides import OVERRIDE_PREFIX, Override
from policies.releases import check_released, release_path
from protocols.errors import FederationError
from protocols.governance import roles
from protocols.governance.repository import (
    TrustState,
    parse_metadata,
    sha256_of,
    verify_repository,
)
from protocols.identifiers import Digest
from protocols.tlog.fields import Role
from protocols.tlog.kinds import Ballot, TufPublished
from protocols.tlog.text import decode_base64

Documents = Callable[[Digest], bytes | None]


@dataclass(frozen=True, slots=True)
class _LoggedFiles:
    """The files that the leaves so far name: newest timestamp, every other by version."""

    published: Mapping[str, Digest]  # by name under metadata/
    documents: Documents

    def metadata(self, name: str) -> bytes | None:
        """See ``protocols.governance.repository.Files``."""
        digest = self.published.get(name)
        return None if digest is None else self.documents(digest)

    def target(self, path: str, sha256: str) -> bytes | None:
        """See ``protocols.governance.repository.Files``."""
        return self.documents(Digest(sha256))


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What is in force from one index on."""

    index: int  # of the publication's last leaf
    state: TrustState
    policy: ConsortiumPolicy  # that it publishes
    policies: PolicyHistory  # with this one: a new policy waits for its delay
    published_at: datetime  # UTC: a witnessed time, or the leaf's claim where there is none


@dataclass(slots=True)
class SignedHistory:
    """The publications of a log, in order.

    Args:
        root: the first root, from a place that the auditor trusts.
        documents: what lies beside the log, by SHA-256; hashed by whoever gives them.
        time_of: when a leaf came into the log at the latest, Unix seconds.
        logged_at: what the leaf says of it, within the witnessed times around it; UTC.
    """

    root: bytes
    documents: Documents = field(repr=False)
    time_of: Callable[[Taken], int] = field(repr=False)
    logged_at: Callable[[Taken], datetime] = field(repr=False)
    history: list[Publication] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)  # names whose bytes are not at hand
    _names: dict[str, Digest] = field(default_factory=dict)
    _ballots: list[Taken] = field(default_factory=list)  # since the last publication
    _policy_leaf: Taken | None = None  # the last tuf.published of role policy
    _complete: bool = False  # whether its timestamp, which comes last, was taken
    _pending: Taken | None = None  # the last leaf of a publication that is not verified yet

    def take(self, taken: Taken, replay: Replay) -> Iterator[Fault]:
        """Take the next leaf of the log; verify a publication once its last leaf has passed."""
        said = taken.said
        if not isinstance(said, TufPublished):
            yield from self.settle(replay)
            if isinstance(said, Ballot) and said.approval is not None:
                self._ballots.append(taken)
            return
        if self._complete:  # another publication begins: each is judged by itself
            yield from self.settle(replay)
        timestamp = said.role == roles.TIMESTAMP
        name = f"{said.role}.json" if timestamp else f"{said.version}.{said.role}.json"
        digest = Digest(said.sha256)
        if not timestamp and self._names.get(name, digest) != digest:
            yield Fault.at("policy", taken.index, f"a second, different {name} was published")
            return
        data = self.documents(digest)
        if data is None:
            self.missing.add(name)
        elif len(data) != said.length:
            yield Fault.at("policy", taken.index, f"{name} has {len(data)} bytes, not as it says")
        self._names[name] = digest
        self._pending, self._complete = taken, timestamp
        if said.role == roles.POLICY:
            self._policy_leaf = taken

    def settle(self, replay: Replay) -> Iterator[Fault]:
        """Verify what was published last; again is nothing."""
        taken, self._pending, self._complete = self._pending, None, False
        if taken is None or self.missing or f"{roles.TIMESTAMP}.json" not in self._names:
            return
        now = datetime.fromtimestamp(self.time_of(taken), UTC)
        before = self.history[-1].state if self.history else None
        try:
            state = verify_repository(
                _LoggedFiles(dict(self._names), self.documents),
                trusted_root=self.root,
                now=now,
                previous=before,
                offline=True,
            )
            known = self.history[-1].policies if self.history else None
            check_successor(before, state, in_force=known.in_force(now) if known else None)
            policy = policy_of(state)
            if before is not None:
                check_hearings(before.members, state.members, replay.heard, now)
            counts = known.in_force(now) if known else policy
            check_released(before, state, replay.reports, counts)
        except FederationError as error:
            reason = f"what was published does not hold: {error} [{error.code}]"
            yield Fault.at("policy", taken.index, reason)
            return
        yield from self._count_ballots(state)
        version, at = state.versions[roles.POLICY], self.logged_at(self._policy_leaf or taken)
        policies = (
            known.followed_by(version, policy, at) if known else beginning(version, policy, at)
        )
        self.history.append(
            Publication(
                index=taken.index, state=state, policy=policy, policies=policies, published_at=now
            )
        )
        if replay.speakers is not None:
            if replay.speakers != speakers_of(state):
                reason = "the log names other keys of admins and institutions than were signed"
                yield Fault.at("policy", taken.index, reason)
            return
        for member in state.members.institutions:  # a log from before keys were named in it
            for key in member.keys:
                if member.status == "active":
                    replay.admit(Role.INSTITUTION, member.id, bytes.fromhex(key))
            if member.status in {"expelled", "left"}:
                replay.retire(Role.INSTITUTION, member.id)

    def _count_ballots(self, state: TrustState) -> Iterator[Fault]:
        """Each yes that the coordinator entered is a signature under what was published."""
        cast = {
            (sha256_of(made.signed_bytes), keyid, bytes.fromhex(made.signatures[keyid].signature))
            for role, quorum in state.quorums.items()
            if role != roles.ROOT
            for made in (parse_metadata(state.metadata[role], Targets),)
            for keyid in quorum.keys
        }
        ballots, self._ballots = self._ballots, []
        for taken in ballots:
            said = taken.said
            if not isinstance(said, Ballot) or said.approval is None:
                continue
            signature = decode_base64(said.approval.signature, "a signature")
            if (said.proposal_sha256, said.approval.key, signature) not in cast:
                reason = f"a ballot of {said.approval.key[:12]}… that nobody cast"
                yield Fault.at("policy", taken.index, reason)

    # -- questions -------------------------------------------------------------------------------

    def at(self, index: int) -> Publication | None:
        """What was in force when the leaf ``index`` came."""
        return next((p for p in reversed(self.history) if p.index < index), None)

    def policy_at(self, index: int, now: datetime) -> ConsortiumPolicy | None:
        """The policy that counted for the leaf ``index``, which came at this time (UTC)."""
        found = self.at(index)
        return found.policies.in_force(now) if found else None

    def overrides(self) -> list[tuple[int, Override, frozenset[str]]]:
        """Every override that was ever published: since which leaf, and whose admins signed it."""
        found: dict[str, tuple[int, Override, frozenset[str]]] = {}
        for publication in self.history:
            state = publication.state
            quorum = state.quorums.get(roles.POLICY)
            signers = frozenset(h.institution for h in quorum.signed) if quorum else frozenset()
            for path, data in state.documents.items():
                if path.startswith(OVERRIDE_PREFIX) and path not in found:
                    found[path] = (publication.index, Override.from_bytes(data), signers)
        return list(found.values())

    @property
    def policy(self) -> ConsortiumPolicy | None:
        """The newest."""
        return self.history[-1].policy if self.history else None

    def released(self, model: str) -> Publication | None:
        """The publication with which the board gave a model out; None: it never did."""
        path = release_path(model)
        return next((p for p in self.history if path in p.state.targets), None)

    def status_at(self, index: int, institution: str) -> str | None:
        """``active``, ``suspended``, ``expelled``, ``left``; None: not a member then."""
        found = self.at(index)
        member = found.state.members.get(institution) if found else None
        return member.status if member else None

    def country_of(self, institution: str) -> str | None:
        """As the newest membership says."""
        member = self.history[-1].state.members.get(institution) if self.history else None
        return member.country if member else None


__all__ = ["Publication", "SignedHistory"]
