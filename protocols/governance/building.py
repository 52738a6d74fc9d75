"""New versions of metadata, without signatures: what a proposal consists of.

Pure: the time is an argument. Signing is elsewhere (``requests.sign_request`` for admins,
``coordinator/trust_repository.py`` for the online key).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from protocols.governance import roles
from protocols.governance.repository import TrustState, parse_metadata, sha256_of, target_name
from protocols.governance.signers import FEDERATION_FIELD
from protocols.identifiers import FederationId, NodeId


def serialize(metadata: Metadata[Any]) -> bytes:
    """The bytes of a metadata file, without spaces."""
    return metadata.to_bytes(JSONSerializer(compact=True))


def expiry(role: str, now: datetime) -> datetime:
    """As late as the role's signature may be good for."""
    return now.replace(microsecond=0) + timedelta(days=roles.days_of(role))


def new_root(
    *,
    federation: FederationId,
    admins: Sequence[Key],
    threshold: int,
    min_countries: int,
    online: Key,
    version: int,
    now: datetime,
) -> Metadata[Root]:
    """A root: who decides.

    Args:
        federation: whose.
        admins: keys with their holders.
        threshold: of them, for root and targets.
        min_countries: among the signers.
        online: the coordinator's key, for snapshot and timestamp.
        version: from 1.
        now: UTC.
    """
    ids = sorted(key.keyid for key in admins)
    decide, publish = Role(ids, threshold), Role(list(ids), threshold)
    root = Root(
        version=version,
        expires=expiry(roles.ROOT, now),
        keys={key.keyid: key for key in (*admins, online)},
        roles={
            roles.ROOT: decide,
            roles.TARGETS: publish,
            roles.SNAPSHOT: Role([online.keyid], 1),
            roles.TIMESTAMP: Role([online.keyid], 1),
        },
        consistent_snapshot=True,
        unrecognized_fields={
            FEDERATION_FIELD: {"federation": federation, "min_countries": min_countries}
        },
    )
    return Metadata(root)


def new_targets(
    *,
    admins: Sequence[Key],
    threshold: int,
    board: Sequence[Key],
    institutions: Mapping[NodeId, Sequence[Key]],
    version: int,
    now: datetime,
) -> Metadata[Targets]:
    """The targets: who may publish what.

    Args:
        admins: keys with their holders.
        threshold: of them.
        board: keys of the release board, three or more; empty: the admins.
        institutions: keys of each institution's own role.
        version: from 1.
        now: UTC.
    """
    ids = sorted(key.keyid for key in admins)
    board_ids = sorted(key.keyid for key in (board or admins))
    keys = {key.keyid: key for key in (*admins, *board)}
    delegated: dict[str, DelegatedRole] = {}
    for name in roles.CENTRAL:
        keyids, need = ids, threshold
        if name == roles.EMERGENCY:
            need = roles.EMERGENCY_THRESHOLD
        elif name == roles.RELEASE:
            keyids, need = board_ids, roles.least_threshold(len(board_ids))
        delegated[name] = DelegatedRole(
            name, list(keyids), need, terminating=True, paths=list(roles.paths_of(name))
        )
    for institution in sorted(institutions):
        own = list(institutions[institution])
        name = roles.institution_role(institution)
        keys.update({key.keyid: key for key in own})
        delegated[name] = DelegatedRole(
            name,
            sorted(key.keyid for key in own),
            1,
            terminating=True,
            paths=list(roles.paths_of(name)),
        )
    targets = Targets(version=version, expires=expiry(roles.TARGETS, now))
    targets.delegations = Delegations(keys=keys, roles=delegated)
    return Metadata(targets)


def new_role(
    role: str, documents: Mapping[str, bytes], *, version: int, now: datetime
) -> tuple[Metadata[Targets], dict[str, bytes]]:
    """A delegated role with exactly these documents, and their files by name."""
    made = Targets(version=version, expires=expiry(role, now))
    files = {}
    for path, data in sorted(documents.items()):
        made.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        files[target_name(path, sha256_of(data))] = data
    return Metadata(made), files


def changed_role(
    state: TrustState,
    role: str,
    *,
    put: Mapping[str, bytes] | None = None,
    drop: Iterable[str] = (),
    now: datetime,
) -> tuple[Metadata[Targets], dict[str, bytes]]:
    """The next version of a role: what it has, with some documents replaced or dropped.

    Returns:
        The metadata, and the files of the new documents by name.
    """
    version, signed = 1, Targets(version=1, expires=expiry(role, now))
    if role in state.metadata:
        signed = parse_metadata(state.metadata[role], Targets).signed
        version = signed.version + 1
    kept = {path: target for path, target in signed.targets.items() if path not in set(drop)}
    made = Targets(version=version, expires=expiry(role, now), targets=kept)
    if role == roles.TARGETS:
        made.delegations = signed.delegations
    files = {}
    for path, data in sorted((put or {}).items()):
        made.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        files[target_name(path, sha256_of(data))] = data
    return Metadata(made), files


def next_online(
    latest: Mapping[str, bytes], *, snapshot: int, timestamp: int, now: datetime
) -> tuple[Metadata[Snapshot], Metadata[Timestamp]]:
    """Snapshot and timestamp over the latest file of every role.

    The timestamp names length and digest of the snapshot, so it is made with the snapshot's bytes
    as they will be signed: ``sign`` it first, then make the timestamp with ``timestamp_over``.

    Args:
        latest: metadata files by role; root is not in a snapshot.
        snapshot: its version.
        timestamp: its version.
        now: UTC.
    """
    meta = {
        f"{role}.json": MetaFile.from_data(
            parse_metadata(data, Targets).signed.version, data, ["sha256"]
        )
        for role, data in sorted(latest.items())
        if role not in (roles.ROOT, *roles.ONLINE)
    }
    made = Metadata(Snapshot(version=snapshot, expires=expiry(roles.SNAPSHOT, now), meta=meta))
    return made, timestamp_over(serialize(made), snapshot=snapshot, timestamp=timestamp, now=now)


def timestamp_over(
    data: bytes, *, snapshot: int, timestamp: int, now: datetime
) -> Metadata[Timestamp]:
    """A timestamp that names a snapshot's very bytes."""
    return Metadata(
        Timestamp(
            version=timestamp,
            expires=expiry(roles.TIMESTAMP, now),
            snapshot_meta=MetaFile.from_data(snapshot, data, ["sha256"]),
        )
    )


def latest_files(files: Mapping[str, bytes], before: TrustState | None) -> dict[str, bytes]:
    """The newest metadata file of every role: what is in force, and candidates over it."""
    found = dict(before.metadata) if before else {}
    for name, data in files.items():
        folder, _, rest = name.partition("/")
        if folder == "metadata":
            role = rest.removesuffix(".json").partition(".")[2]
            found[role] = data
    return found


def apply_candidates(
    base: Mapping[str, bytes],
    files: Mapping[str, bytes],
    *,
    now: datetime,
    before: TrustState | None,
) -> dict[str, bytes]:
    """The repository as it would be, with a snapshot and a timestamp that nobody has signed."""
    versions = before.versions if before else {}
    snapshot, timestamp = next_online(
        latest_files(files, before),
        snapshot=versions.get(roles.SNAPSHOT, 0) + 1,
        timestamp=versions.get(roles.TIMESTAMP, 0) + 1,
        now=now,
    )
    return {
        **base,
        **files,
        f"metadata/{snapshot.signed.version}.snapshot.json": serialize(snapshot),
        "metadata/timestamp.json": serialize(timestamp),
    }
