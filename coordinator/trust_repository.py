"""The trust repository at the coordinator: it keeps, orders and hands out what admins signed.

tuf/metadata/   every version of every metadata file; timestamp.json is the newest N.timestamp.json
tuf/targets/    documents, each under its digest

The coordinator holds one key of it, for snapshot and timestamp: it can say what is newest, and
nothing else. What is brought to it is published only if it verifies from the first root, follows
what is in force and is signed by as many as its changes need. Order: files, then their leaves in
the log, then a witnessed checkpoint, then the files are served. A crash in between leaves files
that nobody is given; publishing the same again completes it with the same bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Snapshot, Timestamp

from coordinator.clock import Clock
from coordinator.trust_acts import Act, acts_of
from policies.audit.speakers import speakers_of
from policies.bodies import check_hearings, expelled_between
from policies.consortium import ConsortiumPolicy
from policies.deciding import check_successor, policy_of
from policies.effect import PolicyHistory, read_history, read_times, times_to_text
from policies.offices import count_in_office
from policies.releases import Reported, check_released
from policies.trust import Change
from protocols.crypto.signatures import public_bytes
from protocols.decimals import read_decimal
from protocols.errors import ConfigurationError, FederationError, NotFoundError
from protocols.governance import roles
from protocols.governance.building import (
    latest_files,
    next_online,
    serialize,
    timestamp_over,
)
from protocols.governance.errors import TrustRefusedError
from protocols.governance.keys import ed25519_key
from protocols.governance.repository import (
    MemoryFiles,
    TrustState,
    in_force,
    parse_metadata,
    sha256_of,
    target_name,
    verify_repository,
)
from protocols.governance.signers import read_charter
from protocols.identifiers import Digest, FederationId
from protocols.tlog.kinds import Speakers

logger = logging.getLogger(__name__)
ONLINE_KEY: Final = "trust-online.key"
TIMES: Final = "policy-times"  # when each version of role policy was logged, for a restart
_NAME: Final = re.compile(r"(metadata|targets(/[A-Za-z0-9_-]+){1,3})/[A-Za-z0-9][A-Za-z0-9._-]*")
_LOOK_S: Final = 60.0  # between two looks at what expires
MAX_PUBLISHED: Final = 5 * 2**20  # bytes brought at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One metadata file that becomes public: what its leaf says."""

    role: str
    version: int
    sha256: Digest
    data: bytes
    speakers: Speakers | None = None  # with the timestamp: whose keys sign leaves from then on


class Announce(Protocol):
    """Put files into the log, and return when a witnessed checkpoint holds them."""

    def __call__(
        self, files: tuple[PublishedFile, ...], acts: tuple[Act, ...] = ()
    ) -> Awaitable[None]:
        """Append what is said of them, then one ``tuf.published`` leaf each; again is harmless."""


async def _not_logged(files: tuple[PublishedFile, ...], acts: tuple[Act, ...] = ()) -> None:
    """Without a round log there is nothing to wait for."""


def load_online_key(path: Path) -> Ed25519PrivateKey:
    """Raises: ConfigurationError."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        raise ConfigurationError(f"{path} cannot be read as a private key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"{path} is not an Ed25519 key")
    return key


class TrustRepository:
    """What is in force, and the files that show it."""

    def __init__(
        self,
        folder: Path,
        *,
        federation: FederationId,
        key: Ed25519PrivateKey,
        clock: Clock,
        required: bool,
        announce: Announce = _not_logged,
    ) -> None:
        self._folder = folder
        self._federation = federation
        self._signer = CryptoSigner(key, ed25519_key(public_bytes(key)))
        self._clock = clock
        self.required = required
        self.announce = announce
        # What the log shows of hearings and evaluations; None: there is no log that could.
        self.heard: Callable[[str, datetime], Awaitable[bool]] | None = None
        self.evaluated: Callable[[], Awaitable[tuple[Reported, ...]]] | None = None
        self._files: dict[str, bytes] = {}  # as they are served
        self._state: TrustState | None = None
        self._history: PolicyHistory | None = None
        self._times: dict[int, datetime] = {}
        self._stamp: tuple[int, int] = (0, 0)  # of timestamp.json, as it was read
        self._publishing = asyncio.Lock()
        self._listeners: list[Callable[[TrustState], None]] = []

    # -- reading -----------------------------------------------------------------------------

    def load(self) -> None:
        """Read the folder. An empty one is a federation that was not founded yet.

        Raises:
            ConfigurationError: the folder contradicts itself.
        """
        path = self._folder / "metadata" / "timestamp.json"
        if not path.exists():
            return
        stat = path.stat()
        files: dict[str, bytes] = {}
        for found in sorted(self._folder.rglob("*")):
            if found.is_file() and not found.name.startswith("."):
                files[found.relative_to(self._folder).as_posix()] = found.read_bytes()
        # Only what the timestamp names is served: later roots and candidates are not public yet.
        first = files.get("metadata/1.root.json")
        if first is None:
            raise ConfigurationError(f"{self._folder} has no first root")
        served = self._without_later(files)
        state = verify_repository(
            MemoryFiles(served), trusted_root=first, now=self._clock.now(), offline=True
        )
        public = {
            name: data
            for name, data in served.items()
            if _version_of(name)[1] <= state.versions.get(_version_of(name)[0], 0)
        }
        self._times = read_times(files.get(TIMES, b"")) | self._times
        self._take(public, state, (stat.st_mtime_ns, stat.st_ino))

    def _logged_at(self, role: str, version: int) -> datetime:
        """When a version was logged; of one from before times were kept, when its file came."""
        known = self._times.get(version)
        if known is None:
            path = self._folder / "metadata" / f"{version}.{role}.json"
            known = datetime.fromtimestamp(int(path.stat().st_mtime), UTC)
            self._times[version] = known
        return known

    def _without_later(self, files: dict[str, bytes]) -> dict[str, bytes]:
        """Roots beyond the served one are left out: ``served-root`` says how far they count."""
        try:
            limit = int(files.get("served-root", b"").decode() or 0)
        except ValueError:
            limit = 0
        kept = {}
        for name, data in files.items():
            version = name.removeprefix("metadata/").removesuffix(".root.json")
            if name.endswith(".root.json") and limit and int(version) > limit:
                continue
            kept[name] = data
        return kept

    def _take(self, files: dict[str, bytes], state: TrustState, stamp: tuple[int, int]) -> None:
        self._files, self._state, self._stamp = files, state, stamp
        if self._history is None or self._history.read_until != state.versions[roles.POLICY]:
            self._history = read_history(MemoryFiles(files), state, self._logged_at)
        for listener in self._listeners:
            listener(state)

    def on_change(self, listener: Callable[[TrustState], None]) -> None:
        """Call back with every state that comes into force, the present one at once."""
        self._listeners.append(listener)
        if self._state is not None:
            listener(self._state)

    def refresh_from_disk(self) -> None:
        """Another coordinator of the same federation may have published."""
        try:
            stat = (self._folder / "metadata" / "timestamp.json").stat()
        except OSError:
            return
        if (stat.st_mtime_ns, stat.st_ino) != self._stamp:
            self.load()

    @property
    def founded(self) -> bool:
        """Whether a root was signed."""
        return self._state is not None

    def state(self) -> TrustState | None:
        """What is in force now; None: nothing is and nothing has to be.

        Raises:
            TrustRefusedError: trust.bootstrap: governance is required and there is none yet;
                trust.expired: it is past its time.
        """
        self.refresh_from_disk()
        if self._state is None:
            if self.required:
                raise TrustRefusedError(
                    f"federation {self._federation} has not been founded: its admins have signed "
                    "no root yet (`minga admin key found`)",
                    rule="trust.bootstrap",
                )
            return None
        return in_force(self._state, self._clock.now())

    def active_members(self) -> tuple[str, ...] | None:
        """Active members by the newest signed list, also past its time; None: there is none."""
        return self._state.members.active() if self._state is not None else None

    def policy(self) -> ConsortiumPolicy | None:
        """The policy that counts now: a newer one waits for its delay. None: not founded."""
        return self._history.in_force(self._clock.now()) if self._history is not None else None

    def first_root(self) -> bytes | None:
        """The root that invitations name; None: not founded."""
        return self._files.get("metadata/1.root.json")

    def file(self, name: str) -> bytes:
        """A file as it is served.

        Raises:
            NotFoundError: there is none of this name.
        """
        data = self._files.get(name) if _NAME.fullmatch(name) else None
        if data is None:
            raise NotFoundError(f"the trust repository has no file {name!r:.100}")
        return data

    # -- publishing --------------------------------------------------------------------------

    async def publish(self, files: Mapping[str, bytes]) -> list[Change]:
        """Put into force what the admins signed.

        Args:
            files: signed metadata and new documents by name; never snapshot or timestamp.

        Returns:
            What changed.

        Raises:
            TrustRefusedError, ForgedError, MalformedMessageError: it does not verify; nothing was
                written.
        """
        if sum(map(len, files.values())) > MAX_PUBLISHED:
            raise TrustRefusedError("too much at once: publish in parts", rule="trust.shape")
        for name in files:
            role = name.removesuffix(".json").rpartition(".")[2]
            if not _NAME.fullmatch(name) or role in roles.ONLINE:
                raise TrustRefusedError(f"{name!r:.100} is not for admins", rule="trust.shape")
        async with self._publishing:
            self.refresh_from_disk()
            if all(self._files.get(name) == data for name, data in files.items()):
                return []  # an answer was lost: it is in force already
            for name, data in files.items():
                if name in self._files and self._files[name] != data:
                    raise TrustRefusedError(
                        f"{name} exists with other bytes: a version is never replaced",
                        rule="trust.rollback",
                    )
            return await self._publish(dict(files))

    async def _publish(self, files: dict[str, bytes]) -> list[Change]:
        before, now = self._state, self._clock.now()
        self._check_online(files)
        online = self._make_online(latest_files(files, before), now, new_snapshot=True)
        merged = {**self._files, **files, **online}
        first = merged.get("metadata/1.root.json")
        if first is None:
            raise TrustRefusedError("the first thing to publish is a root", rule="trust.shape")
        after = verify_repository(MemoryFiles(merged), trusted_root=first, now=now, previous=before)
        if after.federation != self._federation:
            raise TrustRefusedError(
                f"the root is of federation {after.federation}, this is {self._federation}",
                rule="trust.shape",
            )
        after = count_in_office(before, after, now)
        changes = check_successor(before, after, in_force=self.policy())
        await self._check_hearings(before, after, now)
        reports = await self.evaluated() if self.evaluated is not None else ()
        counts = self.policy() or policy_of(after)
        check_released(before, after, reports, counts)
        self._check_named(files, after)
        acts = acts_of(before, after, changes, reports=reports, policy=counts)
        await self._bring_out(files, online, merged, after, acts)
        for change in changes:
            logger.info("in force: %s", change.words)
        return changes

    async def _check_hearings(
        self, before: TrustState | None, after: TrustState, now: datetime
    ) -> None:
        """Nobody is expelled unheard, where there is a log that shows it."""
        if self.heard is None or before is None:
            return
        names = expelled_between(before.members, after.members)
        known = {name: await self.heard(name, now) for name in names}
        check_hearings(before.members, after.members, lambda name, _: known[name], now)

    def _check_named(self, files: Mapping[str, bytes], after: TrustState) -> None:
        """Nothing is kept and served that no signed file names, or not with these bytes."""
        named = {target_name(path, it.sha256): it.sha256 for path, it in after.targets.items()}
        for name in sorted(files.keys() - self._files.keys()):
            role, version = _version_of(name)
            newest = after.versions.get(role, 0)
            used = version == newest or (role == roles.ROOT and version < newest)
            if named.get(name) != sha256_of(files[name]) and not (version and used):
                raise TrustRefusedError(
                    f"nothing that was signed names {name!r:.100} with these bytes",
                    rule="trust.shape",
                )

    def _check_online(self, files: Mapping[str, bytes]) -> None:
        """A root that would take the online roles away from this coordinator is not for it."""
        for name, data in files.items():
            if name.endswith(".root.json"):
                charter = read_charter(parse_metadata(data, Root).signed)
                if charter.online != self._signer.public_key.keyid:
                    raise TrustRefusedError(
                        "the root gives snapshot and timestamp to another key than this "
                        "coordinator's",
                        rule="trust.shape",
                    )

    async def refresh(self) -> bool:
        """Sign the timestamp again, and the snapshot, before they expire.

        Returns:
            Whether anything was signed.
        """
        async with self._publishing:
            self.refresh_from_disk()
            state, now = self._state, self._clock.now()
            if state is None:
                return False
            stale = {
                role for role in roles.ONLINE
                if state.expires[role] - now < timedelta(days=roles.days_of(role)) / 2
            }  # fmt: skip
            if not stale:
                return False
            online = self._make_online(
                latest_files({}, state), now, new_snapshot=roles.SNAPSHOT in stale
            )
            merged = {**self._files, **online}
            after = verify_repository(
                MemoryFiles(merged),
                trusted_root=merged["metadata/1.root.json"],
                now=now,
                previous=state,
            )
            await self._bring_out({}, online, merged, after)
            return True

    def _make_online(
        self, latest: dict[str, bytes], now: datetime, *, new_snapshot: bool
    ) -> dict[str, bytes]:
        """Snapshot and timestamp over the newest files, signed; reused where a crash left them."""
        versions = self._state.versions if self._state else {}
        number = versions.get(roles.SNAPSHOT, 0)
        if new_snapshot:
            number += 1
            made, _ = next_online(latest, snapshot=number, timestamp=1, now=now)
            snapshot, number = self._kept_snapshot(made, number)
        else:
            snapshot = self._files[f"metadata/{number}.snapshot.json"]
        stamp = versions.get(roles.TIMESTAMP, 0) + 1
        while True:
            path = self._folder / "metadata" / f"{stamp}.timestamp.json"
            left = path.read_bytes() if path.exists() else None
            if left is None:
                over = timestamp_over(snapshot, snapshot=number, timestamp=stamp, now=now)
                timestamp = self._sign(over)
                break
            named = parse_metadata(left, Timestamp).signed
            if (
                named.snapshot_meta.hashes == {"sha256": sha256_of(snapshot)}
                and named.expires - now > timedelta(days=roles.days_of(roles.TIMESTAMP)) / 2
            ):
                timestamp = left  # written before a crash, perhaps in the log already
                break
            stamp += 1  # of something that was never served: its number is used up
        return {
            f"metadata/{number}.snapshot.json": snapshot,
            f"metadata/{stamp}.timestamp.json": timestamp,
            "metadata/timestamp.json": timestamp,
        }

    def _kept_snapshot(self, made: Metadata[Snapshot], number: int) -> tuple[bytes, int]:
        while True:
            path = self._folder / "metadata" / f"{number}.snapshot.json"
            if not path.exists():
                made.signed.version = number
                return self._sign(made), number
            left = path.read_bytes()
            if parse_metadata(left, Snapshot).signed.meta == made.signed.meta:
                return left, number
            number += 1

    def _sign(self, metadata: Metadata[Any]) -> bytes:
        metadata.sign(self._signer)
        return serialize(metadata)

    async def _bring_out(
        self,
        files: dict[str, bytes],
        online: dict[str, bytes],
        merged: dict[str, bytes],
        after: TrustState,
        acts: tuple[Act, ...] = (),
    ) -> None:
        """Files, leaves, checkpoint, and only then the name under which nodes ask."""
        current = online["metadata/timestamp.json"]
        versioned = {n: d for n, d in online.items() if n != "metadata/timestamp.json"}
        await asyncio.to_thread(self._write, {**files, **versioned})
        await self.announce(_published({**files, **versioned}, speakers_of(after)), acts)
        root = str(after.root_version).encode()
        self._times.setdefault(after.versions[roles.POLICY], self._clock.now())
        kept = {"served-root": root, TIMES: times_to_text(self._times)}
        await asyncio.to_thread(self._write, {**kept, "metadata/timestamp.json": current})
        stat = (self._folder / "metadata" / "timestamp.json").stat()
        self._take(merged, after, (stat.st_mtime_ns, stat.st_ino))

    def _write(self, files: Mapping[str, bytes]) -> None:
        folders = set()
        for name, data in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.new")
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            folders.add(path.parent)
        for folder in folders:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    async def run(self) -> None:
        """Keep snapshot and timestamp fresh until cancelled."""
        while True:
            try:
                await self.refresh()
            except FederationError as error:
                logger.warning("the trust repository cannot be renewed: %s", error.diagnostics())
            await asyncio.sleep(_LOOK_S)


def _version_of(name: str) -> tuple[str, int]:
    """Role and version of a metadata file; version 0 for what has none."""
    version, dot, role = name.removeprefix("metadata/").removesuffix(".json").partition(".")
    number = read_decimal(version, most=2**53)
    if not name.startswith("metadata/") or not dot or number is None:
        return "", 0
    return role, number


def _published(files: Mapping[str, bytes], speakers: Speakers) -> tuple[PublishedFile, ...]:
    """What becomes public, for the log; roots first, the timestamp last."""
    found = []
    for name, data in files.items():
        folder, _, rest = name.partition("/")
        if folder != "metadata":
            continue
        version, _, role = rest.removesuffix(".json").partition(".")
        found.append(
            PublishedFile(
                role=role,
                version=int(version),
                sha256=sha256_of(data),
                data=data,
                speakers=speakers if role == roles.TIMESTAMP else None,
            )
        )
    order = {roles.ROOT: 0, roles.TARGETS: 1, roles.SNAPSHOT: 3, roles.TIMESTAMP: 4}
    return tuple(sorted(found, key=lambda item: (order.get(item.role, 2), item.role, item.version)))


__all__ = ["PublishedFile", "TrustRepository", "load_online_key"]
