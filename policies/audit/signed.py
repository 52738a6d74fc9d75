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

from policies.audit.records import Fault
from policies.audit.replay import Replay, Taken
from policies.audit.speakers import speakers_of
from policies.consortium import ConsortiumPolicy
from policies.overrides import OVERRIDE_PREFIX, Override
from policies.trust import check_successor, policy_of
from protocols.errors import FederationError
from protocols.governance import roles
from protocols.governance.repository import TrustState, verify_repository
from protocols.identifiers import Digest
from protocols.tlog.fields import Role
from protocols.tlog.kinds import TufPublished

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
    policy: ConsortiumPolicy
    published_at: datetime  # UTC: a witnessed time, or the leaf's claim where there is none


@dataclass(slots=True)
class SignedHistory:
    """The publications of a log, in order.

    Args:
        root: the first root, from a place that the auditor trusts.
        documents: what lies beside the log, by SHA-256; hashed by whoever gives them.
        time_of: when a leaf came into the log, Unix seconds.
    """

    root: bytes
    documents: Documents = field(repr=False)
    time_of: Callable[[Taken], int] = field(repr=False)
    history: list[Publication] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)  # names whose bytes are not at hand
    _names: dict[str, Digest] = field(default_factory=dict)
    _pending: Taken | None = None  # the last leaf of a publication that is not verified yet

    def take(self, taken: Taken, replay: Replay) -> Iterator[Fault]:
        """Take the next leaf of the log; verify a publication once its last leaf has passed."""
        said = taken.said
        if not isinstance(said, TufPublished):
            yield from self.settle(replay)
            return
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
        self._pending = taken

    def settle(self, replay: Replay) -> Iterator[Fault]:
        """Verify what was published last; again is nothing."""
        taken, self._pending = self._pending, None
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
            check_successor(before, state)
            policy = policy_of(state)
        except FederationError as error:
            reason = f"what was published does not hold: {error} [{error.code}]"
            yield Fault.at("policy", taken.index, reason)
            return
        self.history.append(
            Publication(index=taken.index, state=state, policy=policy, published_at=now)
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

    # -- questions -------------------------------------------------------------------------------

    def at(self, index: int) -> Publication | None:
        """What was in force when the leaf ``index`` came."""
        return next((p for p in reversed(self.history) if p.index < index), None)

    def policy_at(self, index: int) -> ConsortiumPolicy | None:
        """The policy of that time."""
        found = self.at(index)
        return found.policy if found else None

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
