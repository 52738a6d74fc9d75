"""What is in force, as this node verified it itself: tuf's own client, then everything beyond it.

trust/metadata/  tuf's cache: what this node has seen, so that nothing older is taken again
trust/targets/   documents, each under its digest
trust/old/       metadata files that tuf's client does not keep

The coordinator only carries the files. A refresh

1. runs ``tuf.ngclient.Updater`` from the root of the invitation (rollback, freeze, expiry),
2. verifies the whole repository (distinct keys, institutions, countries; people; shape),
3. reads every policy since the founding, and when each came into the log: a new one waits,
4. counts the signatures that each change since the last accepted state needed,
5. and, where there is a round log, finds each file in it, and no other digest for its version.

Only then is the new state taken; until then the old one stays, and expires in its time. Rights are
asked for with ``refusal_for``: no state means no.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from node_agent.client import Connection
from node_agent.rules import Refusal
from node_agent.spool import atomic_write
from policies.bodies import Heard, check_hearings
from policies.consortium import ConsortiumPolicy
from policies.deciding import (
    check_known_approvers,
    check_old_policy,
    check_steps,
    policy_of,
)
from policies.effect import At, PolicyHistory, read_history, read_times, times_to_text
from policies.trust import Change
from protocols.errors import (
    FederationError,
    IntegrityError,
    MalformedMessageError,
    NotFoundError,
    NotReadyError,
    UnreachableError,
)
from protocols.gen import trust_pb2
from protocols.governance import roles
from protocols.governance.approval import check_approval
from protocols.governance.documents import member_refusal, run_refusal
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import (
    TrustState,
    in_force,
    sha256_of,
    target_name,
    verify_repository,
)
from protocols.identifiers import Digest, FederationId, NodeId
from protocols.plan import Plan

logger = logging.getLogger(__name__)
_BASE: Final = "minga-trust:/"
_CALL_S: Final = 30.0
REFRESH_S: Final = 30.0  # between two refreshes that nobody asked for
_PROBES: Final = {role: f"{roles.PATHS[role][0].removesuffix('*')}-" for role in roles.NEEDED}
# All digests that the witnessed log has for a role and version of the repository.
Logged = Callable[[str, int], frozenset[Digest]]
# When a role and version came into the log, as its leaf says, UTC; None: it is not there.
LoggedAt = Callable[[str, int], datetime | None]
TIMES: Final = "policy-times"
_LAG: Final = timedelta(minutes=10)  # by which this node's view of the log may be behind
_AGES_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)


class GrpcFetcher(FetcherInterface):
    """Gives tuf's client its files over the node's one connection. Used from a thread."""

    def __init__(self, ask: Callable[[str], bytes]) -> None:
        self._ask = ask

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield self._ask(url.removeprefix(_BASE))
        except NotFoundError:
            raise DownloadHTTPError("not found", 404) from None


@dataclass(slots=True)
class _Cached:
    """The node's files as ``verify_repository`` asks for them; the rest is fetched."""

    folder: Path
    ask: Callable[[str], bytes] | None  # None: only what is here

    def metadata(self, name: str) -> bytes | None:
        stem = name.removesuffix(".json")
        version, dot, role = stem.partition(".")
        if role == roles.ROOT:
            return _read(self.folder / "metadata" / "root_history" / name)
        if not dot:
            return _read(self.folder / "metadata" / name)
        kept = _read(self.folder / "metadata" / f"{quote(role, '')}.json")
        if str(_version(kept)) == version:
            return kept
        return self._get(f"metadata/{name}", self.folder / "old" / name)

    def target(self, path: str, sha256: str) -> bytes | None:
        name = target_name(path, sha256)
        return self._get(name, self.folder / "targets" / sha256)

    def _get(self, name: str, place: Path) -> bytes | None:
        kept = _read(place)
        if kept is not None or self.ask is None:
            return kept
        try:
            data = self.ask(name)
        except NotFoundError:
            return None
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, data)
        return data


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@dataclass(slots=True, kw_only=True)
class Trust:
    """What this node holds to be in force."""

    folder: Path
    bootstrap: bytes = field(repr=False)  # the first root, from the invitation
    federation: FederationId
    node: NodeId
    connection: Connection
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    logged: Logged | None = None  # None: this node keeps no round log
    logged_at: LoggedAt | None = None
    heard: Heard | None = None  # what the log shows of hearings
    on_change: Callable[[list[Change]], None] = lambda _: None
    _state: TrustState | None = None
    _signed: frozenset[str] | None = None  # active members, as signed; of the log or not
    _history: PolicyHistory | None = None
    _approvals: Mapping[str, bytes] = field(default_factory=dict)
    _trouble: TrustRefusedError | FederationError | None = None
    _tried: float | None = None  # monotonic seconds when the last answered refresh began
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def remember(self) -> None:
        """After a start: whose witnesses count, by what was accepted before. Reads files."""
        before = self._before()
        if before is not None:
            self._signed = frozenset(before.members.active())

    # -- refreshing --------------------------------------------------------------------------

    async def refresh(self) -> TrustState:
        """Ask for what is newest and take it, once it is verified.

        Raises:
            NotReadyError: nobody answers; what was in force stays.
            TrustRefusedError, IntegrityError: what was answered is not taken.
        """
        loop, began = asyncio.get_running_loop(), self.monotonic()

        def ask(name: str) -> bytes:
            request = trust_pb2.TrustFileRequest(name=name)
            call = self.connection.ask(lambda c: c.trust.File, request, attempts=2)
            try:
                data: bytes = asyncio.run_coroutine_threadsafe(call, loop).result(_CALL_S).data
            except TimeoutError:
                raise UnreachableError("the trust repository does not answer") from None
            return data

        try:
            state, history, changes = await asyncio.to_thread(self._update, ask)
            answer = await self.connection.ask(
                lambda c: c.trust.Approvals, trust_pb2.ApprovalsRequest(), attempts=2
            )
        except FederationError as error:
            if not isinstance(error, NotReadyError):
                self._trouble, self._tried = error, began
            raise
        self._state, self._history = state, history
        self._approvals = dict(answer.approvals)
        self._trouble, self._tried = None, began
        if changes:
            for change in changes:
                logger.info("in force: %s", change.words)
            self.on_change(changes)
        return state

    def _update(
        self, ask: Callable[[str], bytes]
    ) -> tuple[TrustState, PolicyHistory, list[Change]]:
        """Blocking: steps 1 to 5."""
        with self._busy:
            before = self._before()
            self._run_client(ask)
            files = _Cached(self.folder, ask)
            state = verify_repository(
                files, trusted_root=self.bootstrap, now=self.now(), previous=before
            )
            if state.federation != self.federation:
                raise TrustRefusedError(
                    f"the repository is of federation {state.federation}", rule="trust.shape"
                )
            history = self._read_policies(files, before, state)
            changes: list[Change] = []
            if before is None:
                check_known_approvers(policy_of(state), state, files)
            elif before.versions != state.versions:
                at = self._at(before, {})
                changes = check_steps(before, state, files, history=history, at=at, now=self.now())
            self._signed = frozenset(state.members.active())
            self._check_log(state)
            if before is not None and self.heard is not None:
                published = self._at(before, {})(roles.MEMBERSHIP, state.versions[roles.MEMBERSHIP])
                check_hearings(before.members, state.members, self.heard, published)
            self._keep(state)
            return state, history, changes

    def _read_policies(
        self, files: _Cached, before: TrustState | None, state: TrustState
    ) -> PolicyHistory:
        """Every policy since the founding, and when each came into the log.

        An older file counts if the log has it, or, without a log, if a threshold signed it.
        """
        if self._history is not None and self._history.read_until == state.versions[roles.POLICY]:
            return self._history

        def check(version: int, data: bytes) -> None:
            known = self.logged(roles.POLICY, version) if self.logged is not None else frozenset()
            if known and known != {sha256_of(data)}:
                raise TrustRefusedError(
                    f"the log has another file for policy {version}: keep both", rule="trust.log"
                )
            check_old_policy(version, data, state, files)

        place = self.folder / TIMES
        times = read_times(_read(place) or b"")
        at = self._at(before, times)
        history = read_history(files, state, at, known=self._history, check=check)
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, times_to_text(times))
        return history

    def _at(self, before: TrustState | None, times: dict[int, datetime]) -> At:
        """When files came into the log, as this node has it.

        A leaf says so itself. This node adds what it knows: a version that was not there when it
        last looked cannot be older than that, whatever the leaf says. Without a log it is the time
        at which this node first saw it; what it found at its first contact counts as old.
        """
        looked = _seen_at(self.folder)

        def at(role: str, version: int) -> datetime:
            if role == roles.POLICY and version in times:
                return times[version]
            new = before is not None and version > before.versions.get(role, 0)
            said = self.logged_at(role, version) if self.logged_at is not None else None
            if said is None:
                found = self.now().replace(microsecond=0) if new else _AGES_AGO
            else:
                found = max(said, looked - _LAG) if new and looked is not None else said
            if role == roles.POLICY and (said is not None or self.logged_at is None):
                times[version] = found  # else the log that this node has seen is only behind
            return found

        return at

    def _run_client(self, ask: Callable[[str], bytes]) -> None:
        (self.folder / "metadata").mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            updater = Updater(
                str(self.folder / "metadata"),
                f"{_BASE}metadata/",
                fetcher=GrpcFetcher(ask),
                config=UpdaterConfig(),
                bootstrap=self.bootstrap,
            )
            updater.refresh()
            for probe in _PROBES.values():
                updater.get_targetinfo(probe)
        except ExpiredMetadataError as error:
            raise TrustRefusedError(f"{error}", rule="trust.expired") from None
        except DownloadError as error:
            cause = error.__cause__
            if isinstance(cause, FederationError):
                raise cause from None
            raise UnreachableError(f"the trust repository cannot be read: {error}") from None
        except RepositoryError as error:
            rule = "trust.rollback" if "Version" in type(error).__name__ else "trust.quorum"
            raise TrustRefusedError(f"{error!s:.300}", rule=rule) from None
        except (ValueError, OSError) as error:
            raise MalformedMessageError(f"the trust repository: {error!s:.200}") from None

    def _before(self) -> TrustState | None:
        """What was accepted last: in memory, or from the files kept then."""
        if self._state is not None:
            return self._state
        try:
            return read_accepted(self.folder, self.bootstrap, self.now())
        except FederationError as error:
            logger.warning("the files of what was in force are gone or expired: %s", error)
            return None

    def _keep(self, state: TrustState) -> None:
        """Keep the very files of the accepted state: the next one is compared with them."""
        folder = self.folder / "last"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for role, data in state.metadata.items():
            atomic_write(folder / f"{quote(role, '')}.json", data)
        for path, data in state.documents.items():
            place = self.folder / "targets" / state.targets[path].sha256
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                atomic_write(place, data)
        atomic_write(
            self.folder / "accepted",
            f"{state.versions['timestamp']}\n{int(self.now().timestamp())}\n".encode(),
        )

    def _check_log(self, state: TrustState) -> None:
        """Every file is in the witnessed log, and no other one of its version.

        Raises:
            NotReadyError: the log that this node has seen does not reach so far yet.
            TrustRefusedError: trust.log: the log has another file.
        """
        if self.logged is None:
            return
        for (role, version), digest in sorted(state.published.items()):
            known = self.logged(role, version)
            if known - {digest}:
                raise TrustRefusedError(
                    f"the log has another file for {role} {version}: keep both", rule="trust.log"
                )
            if not known:
                raise NotReadyError(f"{role} {version} is not in the witnessed log yet")

    # -- asking ------------------------------------------------------------------------------

    def active_members(self) -> frozenset[str] | None:
        """Active members by the newest list that the admins signed; None: none was verified yet.

        Also before the log has it: whose witnesses count must be known to read the log on. Such a
        list is signed, in time and not rolled back, so it cannot be the coordinator's invention.
        """
        return self._signed

    @property
    def state(self) -> TrustState | None:
        """What is in force; None: nothing that this node could verify."""
        if self._state is None:
            return None
        try:
            return in_force(self._state, self.now())
        except TrustRefusedError:
            return None

    def policy(self, now: datetime) -> ConsortiumPolicy | None:
        """The policy that counts at this time; None: nothing that this node could verify."""
        return self._history.in_force(now) if self._history is not None else None

    @property
    def trouble(self) -> FederationError | None:
        """Why the last refresh was not taken; None: it was."""
        return self._trouble

    def refusal_for(self, plan: Plan) -> Refusal | None:
        """Why this node takes no part in a plan, as far as the signed terms go; None: it may.

        1. Something is in force, and the newest answer was not refused.
        2. The plan's very bytes are signed by the admins, and no emergency stops it.
        3. Every member of its roster is a member now.
        4. In a secure sum, each signing key is the one its institution approved.
        """
        if self._trouble is not None:
            return _refusal(self._trouble)
        try:
            state = in_force(self._state, self.now()) if self._state is not None else None
        except TrustRefusedError as error:
            return _refusal(error)
        if state is None:
            return Refusal("trust.bootstrap", "nothing is in force that this node could verify")
        now, run = self.now(), plan.run_id
        refusal = state.plan_signed(run, sha256_of(plan.to_bytes())) or run_refusal(
            state.emergencies, run, plan.digest, now
        )
        for member in plan.roster_ids:
            refusal = refusal or member_refusal(state.members, state.emergencies, member, now)
        if refusal is not None:
            return _refusal(refusal)
        return self._keys_refusal(plan, state)

    def _keys_refusal(self, plan: Plan, state: TrustState) -> Refusal | None:
        if plan.secagg is None:
            return None
        for member in plan.roster_ids:
            approval = self._approvals.get(member)
            if approval is None:
                return Refusal("trust.key", f"nobody shows an approval of {member}'s keys")
            try:
                said = check_approval(
                    approval,
                    federation=self.federation,
                    institution=member,
                    keys=state.members.keys_of(member),
                )
            except FederationError as error:
                return Refusal("trust.key", str(error))
            if said.signing_key != plan.secagg.keys[member]:
                return Refusal(
                    "trust.key",
                    f"the plan names another signing key for {member} than its institution "
                    "approved",
                )
        return None

    def waits_for(self, since: float) -> str | None:
        """What has to be known before a question that came up at ``since`` can be answered.

        A plan may have been signed, or an emergency declared, a moment ago: a round is answered
        only by a refresh that began after this node first saw it.

        Args:
            since: monotonic seconds.

        Returns:
            What it waits for; None: it need not wait. Waiting asks for a refresh.
        """
        if self._tried is not None and self._tried >= since:
            return None
        self._wanted.set()
        return "asking what the admins have signed"

    async def run(self, wake: Callable[[], None]) -> None:
        """Keep up with what is in force until cancelled.

        Args:
            wake: called after every attempt: there may be something new to decide on.
        """
        failures = 0
        while True:
            self._wanted.clear()
            pause = REFRESH_S
            try:
                await self.refresh()
                failures = 0
            except NotReadyError as error:
                pause = min(5.0, max(0.5, error.retry_after_s))
            except FederationError as error:
                if failures == 0:
                    logger.warning("what is in force was not taken: %s", error.diagnostics())
                failures, pause = failures + 1, 5.0
                wake()
            else:
                wake()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wanted.wait()
            if self._wanted.is_set():
                await asyncio.sleep(0.1 if failures == 0 else 1.0)


@dataclass(slots=True)
class _Accepted:
    """The files of the state that was accepted last."""

    cached: _Cached
    folder: Path

    def metadata(self, name: str) -> bytes | None:
        role = name.removesuffix(".json").rpartition(".")[2]
        if role == roles.ROOT:
            kept = _read(self.folder / "last" / "root.json")
            wanted = self.cached.metadata(name)
            version = int(name.partition(".")[0])
            limit = _version(kept)
            return wanted if limit and version <= limit else None
        return _read(self.folder / "last" / f"{quote(role, '')}.json")

    def target(self, path: str, sha256: str) -> bytes | None:
        return self.cached.target(path, sha256)


def read_accepted(folder: Path, bootstrap: bytes, now: datetime) -> TrustState | None:
    """What a node's folder says was accepted last; None: nothing yet. Reads files.

    Raises:
        TrustRefusedError: it is past its time, or the files are not what they were.
    """
    if not (folder / "accepted").exists():
        return None
    return verify_repository(
        _Accepted(_Cached(folder, None), folder), trusted_root=bootstrap, now=now, offline=True
    )


def _seen_at(folder: Path) -> datetime | None:
    """When this node last accepted what was in force, UTC."""
    lines = (_read(folder / "accepted") or b"").decode("ascii", "replace").split()
    try:
        return datetime.fromtimestamp(int(lines[1]), UTC)
    except (IndexError, ValueError, OverflowError, OSError):
        return None


def _version(data: bytes | None) -> int:
    try:
        return int(json.loads(data or b"{}")["signed"]["version"])
    except (ValueError, KeyError, TypeError):
        return 0


def _refusal(error: FederationError) -> Refusal:
    if isinstance(error, TrustRefusedError):
        return Refusal(error.rule, str(error))
    rule = "trust.forged" if isinstance(error, IntegrityError) else "trust.shape"
    return Refusal(rule, str(error))
