"""A whole trust repository, verified from a root that the reader already trusts.

    1.root -> 2.root -> ... -> root in force     each signed under the old and the new threshold
    timestamp -> snapshot                        the coordinator's online key: freshness only
    targets -> policy, membership, plans, ...    the admins, by distinct institutions

A node runs tuf's own client first, which keeps what it has seen (rollback, freeze); this is what it
checks on top, and all that an admin offline, the coordinator and an auditor check. Pure: files come
from a reader, the time is an argument. Everything fails closed: what cannot be read, is missing or
is past its time is refused; only ``emergency``, ``release`` and an institution's own role lapse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Protocol, TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from protocols.errors import DigestMismatchError, MalformedMessageError
from protocols.governance import roles
from protocols.governance.documents import ADMINS, MEMBERS, Admins, Emergency, Members
from protocols.governance.errors import ForgedError, TrustRefusedError
from protocols.governance.signers import (
    Charter,
    Quorum,
    check_delegations,
    online_signed,
    quorum,
    read_charter,
)
from protocols.identifiers import Digest, FederationId, RunId

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)
MAX_ROOTS: Final = 256
MAX_METADATA: Final = 5_000_000  # bytes
MAX_TARGET: Final = 8 * 2**20  # bytes
_READ: Final = (roles.POLICY, roles.MEMBERSHIP, roles.EMERGENCY)  # whose documents are read


class Files(Protocol):
    """Where the files come from."""

    def metadata(self, name: str) -> bytes | None:
        """``3.root.json``, ``timestamp.json``, ``7.policy.json``; None: there is none."""

    def target(self, path: str, sha256: str) -> bytes | None:
        """A document; None: there is none."""


@dataclass(frozen=True, slots=True)
class MemoryFiles:
    """Files in memory, by their name under the repository's folder."""

    files: Mapping[str, bytes] = field(repr=False)

    def metadata(self, name: str) -> bytes | None:
        """See ``Files``."""
        return self.files.get(f"metadata/{name}")

    def target(self, path: str, sha256: str) -> bytes | None:
        """See ``Files``."""
        return self.files.get(target_name(path, sha256))


def target_name(path: str, sha256: str) -> str:
    """Where a target lies under the repository's folder: ``targets/policy/<sha256>.name``."""
    folder, _, name = path.rpartition("/")
    return f"targets/{folder}/{sha256}.{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One published document."""

    path: str
    role: str
    sha256: Digest
    length: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustState:
    """What is in force, and the very files that say so."""

    federation: FederationId
    charter: Charter
    root_version: int
    versions: Mapping[str, int]  # of every role
    published: Mapping[tuple[str, int], Digest]  # SHA-256 of every metadata file that was read
    expires: Mapping[str, datetime]  # of every role, UTC
    lapsed: frozenset[str]  # past their time, or an institution's that its keys did not sign
    targets: Mapping[str, Target]  # by path
    documents: Mapping[str, bytes] = field(repr=False)  # of policy, membership and emergency
    members: Members = field(repr=False)
    admins: Admins = field(repr=False)
    emergencies: Mapping[str, Emergency] = field(repr=False)
    quorums: Mapping[str, Quorum] = field(repr=False)
    metadata: Mapping[str, bytes] = field(repr=False)  # files by role

    def plan_signed(self, run: RunId, sha256: Digest) -> TrustRefusedError | None:
        """Why a plan is not among the signed terms; None: it is.

        Args:
            run: of the plan.
            sha256: of its canonical bytes (``sha256sum`` of the target).
        """
        found = self.targets.get(plan_path(run))
        if found is None:
            return TrustRefusedError(
                f"no plan of run {run} is signed by the admins", rule="trust.plan"
            )
        if found.sha256 != sha256:
            return TrustRefusedError(
                f"the plan of run {run} is another one than the admins signed", rule="trust.plan"
            )
        return None


def plan_path(run: RunId) -> str:
    """The target of a run's plan."""
    return f"plans/{run}.json"


def sha256_of(data: bytes) -> Digest:
    """As `sha256sum` prints it."""
    return Digest(hashlib.sha256(data).hexdigest())


def parse_metadata(data: bytes, kind: type[S]) -> Metadata[S]:
    """Read one metadata file; its signatures are not verified.

    Raises:
        MalformedMessageError: it is none of this kind, or a field is wrong.
    """
    if len(data) > MAX_METADATA:
        raise MalformedMessageError(f"a metadata file of {len(data)} bytes")
    try:
        made: Metadata[Any] = Metadata.from_bytes(data)
    except (RepositoryError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedMessageError(f"not trust metadata: {error!s:.200}") from None
    if not isinstance(made.signed, kind):
        raise MalformedMessageError(f"metadata of {made.signed.type} where {kind.type} must be")
    return made


@dataclass(slots=True)
class _Reader:
    files: Files
    now: datetime
    offline: bool  # freshness is not asked for: snapshot and timestamp may be past their time
    signed: bool
    published: dict[tuple[str, int], Digest] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    expires: dict[str, datetime] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    quorums: dict[str, Quorum] = field(default_factory=dict)

    def read(self, name: str, kind: type[S], role: str, version: int | None) -> Metadata[S]:
        data = self.files.metadata(name)
        if data is None:
            raise TrustRefusedError(f"{name} is missing", rule="trust.shape")
        return self.take(data, kind, role, version)

    def take(self, data: bytes, kind: type[S], role: str, version: int | None) -> Metadata[S]:
        made = parse_metadata(data, kind)
        if version is not None and made.signed.version != version:
            raise TrustRefusedError(
                f"{role} {version} says it is version {made.signed.version}", rule="trust.rollback"
            )
        self.published[(role, made.signed.version)] = sha256_of(data)
        self.versions[role] = made.signed.version
        self.expires[role] = made.signed.expires
        self.raw[role] = data
        return made

    def in_time(self, role: str) -> bool:
        return (self.offline and role in roles.ONLINE) or self.now < self.expires[role]

    def count(
        self, delegator: Root | Targets, role: str, made: Metadata[Any], charter: Charter
    ) -> None:
        """Count who signed, by distinct institutions."""
        self.quorums[role] = quorum(delegator, role, made, charter)
        if self.signed:
            self.quorums[role].require()

    def fresh(self, root: Root, role: str, made: Metadata[Any]) -> None:
        if self.signed:
            online_signed(root, role, made)

    def require_time(self, role: str) -> None:
        if not self.in_time(role):
            raise TrustRefusedError(
                f"{role} {self.versions[role]} expired at {self.expires[role]:%FT%TZ}",
                rule="trust.expired",
            )


def verify_repository(
    files: Files,
    *,
    trusted_root: bytes,
    now: datetime,
    previous: TrustState | None = None,
    offline: bool = False,
    signed: bool = True,
) -> TrustState:
    """Read what is in force.

    1. Roots follow from the trusted one, each signed under the old and the new threshold, every
       one shaped as the specification says (``read_charter``); the last is in time.
    2. Timestamp and snapshot are signed by the online key and in time; no version falls.
    3. Targets delegate as they must; each role is signed by distinct keys of distinct institutions.
    4. The documents are what their digests say, and agree with the root on who decides.

    Args:
        files: the repository.
        trusted_root: a root file that the reader holds; of any version.
        now: UTC.
        previous: what the reader accepted before: nothing may be older.
        offline: freshness is not asked for (an admin's or an auditor's copy).
        signed: False only for the preview of a candidate that nobody has signed yet: signatures are
            not asked for, everything else is.

    Raises:
        TrustRefusedError: a rule ``trust.…`` does not hold.
        ForgedError: a signature is not by whom it must be.
        MalformedMessageError, DigestMismatchError: a file is not what it should be.
    """
    reader = _Reader(files=files, now=now, offline=offline, signed=signed)
    root, charter = _roots(reader, trusted_root)
    timestamp = reader.read("timestamp.json", Timestamp, roles.TIMESTAMP, None)
    reader.fresh(root, roles.TIMESTAMP, timestamp)
    reader.require_time(roles.TIMESTAMP)
    at = timestamp.signed.snapshot_meta
    snapshot = reader.read(f"{at.version}.snapshot.json", Snapshot, roles.SNAPSHOT, at.version)
    reader.fresh(root, roles.SNAPSHOT, snapshot)
    _fits(at, reader.raw[roles.SNAPSHOT], roles.SNAPSHOT)
    reader.require_time(roles.SNAPSHOT)
    _no_rollback(previous, snapshot.signed, timestamp.signed.version, root.version)
    targets = _targets_role(reader, snapshot.signed, roles.TARGETS)
    reader.count(root, roles.TARGETS, targets, charter)
    reader.require_time(roles.TARGETS)
    check_delegations(targets.signed, charter)
    lapsed, found = _delegated(reader, snapshot.signed, targets.signed, charter)
    return _state(reader, charter, root.version, targets.signed, lapsed, found)


def _roots(reader: _Reader, trusted: bytes) -> tuple[Root, Charter]:
    current = reader.take(trusted, Root, roles.ROOT, None)
    charter = read_charter(current.signed)
    reader.count(current.signed, roles.ROOT, current, charter)
    for _ in range(MAX_ROOTS):
        version = current.signed.version + 1
        data = reader.files.metadata(f"{version}.root.json")
        if data is None:
            break
        candidate = reader.take(data, Root, roles.ROOT, version)
        following = read_charter(candidate.signed)
        if following.federation != charter.federation:
            raise TrustRefusedError("the root changed its federation", rule="trust.shape")
        for signer, by in ((current.signed, charter), (candidate.signed, following)):
            reader.count(signer, roles.ROOT, candidate, by)
        current, charter = candidate, following
    else:
        raise TrustRefusedError(f"more than {MAX_ROOTS} roots at once", rule="trust.shape")
    reader.require_time(roles.ROOT)
    return current.signed, charter


def _fits(meta: Any, data: bytes, role: str) -> None:
    try:
        meta.verify_length_and_hashes(data)
    except RepositoryError:
        raise DigestMismatchError(f"{role} is not the file that its parent names") from None


def _no_rollback(
    previous: TrustState | None, snapshot: Snapshot, timestamp: int, root: int
) -> None:
    if previous is None:
        return
    now: dict[str, int] = {roles.TIMESTAMP: timestamp, roles.SNAPSHOT: snapshot.version}
    now[roles.ROOT] = root
    for name, meta in snapshot.meta.items():
        now[name.removesuffix(".json")] = meta.version
    for role, version in previous.versions.items():
        gone = role not in now and roles.institution_of(role) is None
        if gone or now.get(role, version) < version:
            raise TrustRefusedError(
                f"{role} {now.get(role, 0)} is older than {role} {version}, accepted before",
                rule="trust.rollback",
            )


def _targets_role(reader: _Reader, snapshot: Snapshot, role: str) -> Metadata[Targets]:
    meta = snapshot.meta.get(f"{role}.json")
    if meta is None:
        raise TrustRefusedError(f"the snapshot does not name {role}", rule="trust.shape")
    made = reader.read(f"{meta.version}.{role}.json", Targets, role, meta.version)
    _fits(meta, reader.raw[role], role)
    return made


def _delegated(
    reader: _Reader, snapshot: Snapshot, targets: Targets, charter: Charter
) -> tuple[frozenset[str], dict[str, Target]]:
    lapsed: set[str] = set()
    found: dict[str, Target] = {}
    delegations = targets.delegations
    names = list(delegations.roles or ()) if delegations is not None else []
    stray = set(snapshot.meta) - {f"{name}.json" for name in (*names, roles.TARGETS)}
    for name in sorted(stray):
        role = name.removesuffix(".json")
        if roles.institution_of(role) is None:
            raise TrustRefusedError(f"{name} belongs to no role", rule="trust.shape")
        # Who is no member any more leaves its own role behind: a snapshot forgets nothing, so the
        # file is carried on, and nothing of it counts.
        _targets_role(reader, snapshot, role)
        lapsed.add(role)
    for role in names:
        if f"{role}.json" not in snapshot.meta and role not in roles.NEEDED:
            continue
        made = _targets_role(reader, snapshot, role)
        if made.signed.delegations is not None:
            raise TrustRefusedError(f"role {role} delegates further", rule="trust.shape")
        if roles.institution_of(role) is not None:
            # Its keys may have changed since it signed: what it said then lapses, nothing else.
            reader.quorums[role] = quorum(targets, role, made, charter)
            if reader.signed and not reader.quorums[role].complete:
                lapsed.add(role)
                continue
        else:
            reader.count(targets, role, made, charter)
        if not reader.in_time(role):
            if role in roles.NEEDED:
                reader.require_time(role)
            lapsed.add(role)
            continue
        prefixes = tuple(path.removesuffix("*") for path in roles.paths_of(role))
        for path, target in made.signed.targets.items():
            name = path.rpartition("/")[2]
            if (
                not path.startswith(prefixes)
                or path.count("/") != prefixes[0].count("/")
                or not name
            ):
                raise TrustRefusedError(
                    f"role {role} publishes {path!r:.100}, which is not its own", rule="trust.shape"
                )
            if "sha256" not in target.hashes:
                raise TrustRefusedError(f"{path} has no SHA-256", rule="trust.shape")
            found[path] = Target(
                path=path,
                role=role,
                sha256=Digest(target.hashes["sha256"]),
                length=target.length,
            )
    return frozenset(lapsed), found


def read_target(files: Files, target: Target) -> bytes:
    """The bytes of a document, verified. Raises: TrustRefusedError, DigestMismatchError."""
    data = files.target(target.path, target.sha256)
    if data is None:
        raise TrustRefusedError(f"{target.path} is missing", rule="trust.shape")
    if len(data) != target.length or sha256_of(data) != target.sha256:
        raise DigestMismatchError(f"{target.path} is not the document that was signed")
    return data


def _state(
    reader: _Reader,
    charter: Charter,
    root_version: int,
    delegations: Targets,
    lapsed: frozenset[str],
    found: dict[str, Target],
) -> TrustState:
    documents = {
        path: read_target(reader.files, target)
        for path, target in found.items()
        if target.role in _READ
    }
    for needed in (MEMBERS, ADMINS):
        if needed not in documents:
            raise TrustRefusedError(f"{needed} is not published", rule="trust.shape")
    members = Members.from_bytes(documents[MEMBERS])
    admins = Admins.from_bytes(documents[ADMINS])
    check_people(charter, members, admins)
    check_institutions(delegations, members)
    emergencies = {
        path: Emergency.from_bytes(documents[path])
        for path in sorted(documents)
        if found[path].role == roles.EMERGENCY
    }
    if any(notice.federation != charter.federation for notice in emergencies.values()):
        raise TrustRefusedError("an emergency notice is of another federation", rule="trust.shape")
    return TrustState(
        federation=charter.federation,
        charter=charter,
        root_version=root_version,
        versions=reader.versions,
        published=reader.published,
        expires=reader.expires,
        lapsed=lapsed,
        targets=found,
        documents=documents,
        members=members,
        admins=admins,
        emergencies=emergencies,
        quorums=reader.quorums,
        metadata=reader.raw,
    )


def in_force(state: TrustState, now: datetime) -> TrustState:
    """The state, if it still is in force: files that were in time when they were read expire.

    Returns:
        The state, without the notices of an emergency role that lapsed since.

    Raises:
        TrustRefusedError: trust.expired: root, targets or a needed role is past its time.
    """
    for role in (roles.ROOT, roles.TARGETS, *roles.NEEDED):
        if now >= state.expires[role]:
            raise TrustRefusedError(
                f"{role} {state.versions[role]} expired at {state.expires[role]:%FT%TZ}",
                rule="trust.expired",
            )
    if state.emergencies and now >= state.expires[roles.EMERGENCY]:
        return replace(state, emergencies={}, lapsed=state.lapsed | {roles.EMERGENCY})
    return state


def check_people(charter: Charter, members: Members, admins: Admins) -> None:
    """The documents and the root agree on the federation and on who decides.

    Raises:
        TrustRefusedError: trust.shape, trust.duties, trust.alias or trust.institution.
    """
    if {members.federation, admins.federation} != {charter.federation}:
        raise TrustRefusedError("the documents are of another federation", rule="trust.shape")
    admins.check_duties()
    terms = charter.terms
    if (admins.threshold, admins.min_countries) != (terms.threshold, terms.min_countries):
        raise TrustRefusedError(
            "the thresholds in admins.json are not those of the root", rule="trust.shape"
        )
    listed = {
        person.keyid: (person.id, person.institution, person.country) for person in admins.admins()
    }
    rooted = {
        keyid: (holder.person, holder.institution, holder.country)
        for keyid, holder in charter.holders.items()
    }
    if listed != rooted:
        raise TrustRefusedError(
            "the admins in admins.json are not the holders of the root's keys", rule="trust.shape"
        )
    if any(person.keyid == charter.online for person in admins.people):
        raise TrustRefusedError("the coordinator's online key is a person's", rule="trust.alias")


def check_institutions(targets: Targets, members: Members) -> None:
    """Each member publishes with the keys that the membership names, and nobody else does.

    Raises:
        TrustRefusedError: trust.shape.
    """
    delegated = targets.delegations.roles if targets.delegations is not None else None
    found: dict[str, set[str]] = {}
    for name, role in (delegated or {}).items():
        institution = roles.institution_of(name)
        if institution is not None:
            found[institution] = {targets.get_key(k).keyval["public"] for k in role.keyids}
    wanted = {
        item.id: set(item.keys)
        for item in members.institutions
        if item.status in ("active", "suspended")
    }
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise TrustRefusedError(
                f"role inst-{name} is not signed by the keys that members.json names",
                rule="trust.shape",
            )


__all__ = ["Files", "ForgedError", "MemoryFiles", "Target", "TrustState", "verify_repository"]
