"""What must hold after every step, whatever happened: the promises of the README as assertions.

    sums      each survivor is in a published sum exactly once, nobody else is, and for this round
    words     a node never says two things: one vector, one commit, one verdict for each attempt
    spends    what was released is spent, at the coordinator and at the node, and stays so
    log       only grows; everybody who holds a checkpoint holds one of the same tree
    models    what a node derives is what was published
    end       once nothing disturbs, the run ends, and undisturbed rounds are released

A violation is a sentence. Evidence is taken from the wire and from the ledgers, never from what the
code under test says about itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coordinator.ledger import RoundRow, Tx
from coordinator.secure_sum import read_message, sender_of
from policies.privacy.budget import SpendStatus
from protocols.errors import FederationError
from protocols.gen import bulk_pb2, rounds_pb2, secure_sum_pb2
from protocols.identifiers import RoundId
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.rounds import Released
from protocols.tensors.planar import unpack
from protocols.tensors.snapshot import Snapshot
from protocols.upload import UploadHeader
from tests.simulation.trainer import BETWEEN, steps_of
from tests.simulation.world import MANIFEST, RUN, World

SPENT = (SpendStatus.RELEASED, SpendStatus.BURNED)


class ViolationError(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Look:
    """What the coordinator's ledger says now."""

    status: str
    rows: list[RoundRow]
    version: int
    leaves: list[bytes]
    spends: dict[tuple[RoundId, str], SpendStatus]


@dataclass(slots=True)
class Oracle:
    """Watches one world."""

    world: World
    tampered: set[str] = field(default_factory=set)  # whose disk was put back
    status: str = "active"
    rows: list[RoundRow] = field(default_factory=list)
    _plan: Plan | None = None
    _version: int = -1
    _said: dict[tuple[Any, ...], bytes] = field(default_factory=dict)
    _opened: dict[RoundId, tuple[Any, ...]] = field(default_factory=dict)
    _settled: dict[tuple[str, RoundId, str], SpendStatus] = field(default_factory=dict)
    _leaves: list[bytes] = field(default_factory=list)
    _roots: dict[int, bytes] = field(default_factory=dict)
    looks: int = 0
    _heard: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world.network.taps.append(self.hear)

    def fail(self, what: str) -> None:
        """Raises: ViolationError: with the time at which it was seen."""
        raise ViolationError(f"at {self.world.loop.time():.3f} s: {what}")

    # -- words on the wire -------------------------------------------------------------------

    def hear(self, caller: str, method: str, request: bytes) -> None:
        """A request left a node; what it says counts, whether it arrives or not."""
        key: tuple[Any, ...]
        match method.rpartition("/")[2]:
            case "Post":
                post = secure_sum_pb2.PostRequest.FromString(request)
                _, attempt = sender_of(read_message(post.kind, post.body))
                key = (post.kind, caller, post.round.number, attempt)
                self._once(key, post.body)
                other = {"commit": "abort", "abort": "commit"}.get(post.kind)
                if other and (other, *key[1:]) in self._said and caller not in self.tampered:
                    self._deferred(f"{caller} sent commit and abort in attempt {attempt}")
            case "BeginUpload":
                header = UploadHeader.from_bytes(
                    bulk_pb2.BeginUploadRequest.FromString(request).header
                )
                key = ("vector", caller, header.round, header.attempt)
                self._once(key, header.root.encode())
            case "Confirm":
                confirm = rounds_pb2.ConfirmRequest.FromString(request)
                said = f"{confirm.model_root} {confirm.objection}"
                key = ("verdict", caller, confirm.round.number)
                self._once(key, said.encode())
            case "Join" | "Decline" as verb:
                kind = rounds_pb2.JoinRequest if verb == "Join" else rounds_pb2.DeclineRequest
                key = ("answer", caller, kind.FromString(request).round.number)
                self._once(key, verb.encode())
            case _:
                return
        self._heard.append((round(self.world.loop.time(), 6), *key))

    def _once(self, key: tuple[Any, ...], said: bytes) -> None:
        before = self._said.setdefault(key, said)
        # A node whose whole disk was put back may have forgotten a join, and may start an attempt
        # over; two vectors, two commits or two verdicts are wrong even then. One that has forgotten
        # its own vector objects to a sum that names it (in a masked sum to the transcript that
        # does): it cannot know that it confirmed it before.
        forgives = key[0] in ("ready", "deal", "deal_ok", "answer", "abort") or (
            key[0] == "verdict"
            and said in (before + b"unknown_upload", before + b"secagg.transcript")
        )
        if before != said and not (forgives and key[1] in self.tampered):
            self._deferred(f"{key[1]} said two different things: {key[0]} of {key[2:]}")

    def _deferred(self, what: str) -> None:
        self.world.bugs.append(f"violation: {what}")

    # -- ledgers -----------------------------------------------------------------------------

    def look(self) -> None:
        """Look at everything that can be looked at now.

        Raises:
            ViolationError: a promise is broken.
        """
        self.looks += 1
        world = self.world
        for bug in (*world.bugs, *world.loop.failures, *world.network.internal):
            self.fail(bug)
        parts = world.coordinator.parts
        if parts is not None and parts.ledger.version() != self._version:
            found = self._read(parts)
            if found is not None:
                self._version, self.status, self.rows = found.version, found.status, found.rows
                if self._plan is None:
                    self._plan = parts.ledger._read("plan", lambda tx: tx.run(RUN).plan)
                self._sums(parts, found.rows)
                self._coordinator_spends(found)
                self._log(found.leaves)
        for name, node in world.nodes.items():
            if node.site is not None and node.up:
                self._node(name, node.site)

    def _read(self, parts: Any) -> Look | None:
        setting = self.world.setting

        def read(tx: Tx) -> Look:
            rows = tx.rounds(RUN)
            spends = {}
            if setting.mode == "private":
                for row in rows:
                    for spend in tx.spends_of_round(row.round):
                        spends[row.round, str(spend.node)] = spend.status
            return Look(
                status=tx.run(RUN).status,
                rows=rows,
                version=tx.version(),
                leaves=list(tx.leaf_hashes(0)) if setting.log else [],
                spends=spends,
            )

        found: Look = parts.ledger._read("oracle", read)
        if found.version < self._version and "coordinator" not in self.tampered:
            self.fail(f"history went back from {self._version} to {found.version}")
        return found

    def forget_ledger(self) -> None:
        """The coordinator's ledger was put back: what it says may be older from now on."""
        self.tampered.add("coordinator")
        self._version = -1
        self._opened.clear()
        self._settled = {k: v for k, v in self._settled.items() if k[0] != "coordinator"}
        self._leaves.clear()

    def _sums(self, parts: Any, rows: Iterable[RoundRow]) -> None:
        for row in rows:
            if not row.released:
                if row.round in self._opened:
                    self.fail(f"{row.round} was open and is not any more")
                continue
            assert isinstance(row.phase, Released)
            result = (row.sum, row.next_snapshot, row.phase.survivors)
            before = self._opened.get(row.round)
            if before is None:
                self._check_sum(parts.blobs, row)
                self._opened[row.round] = result
            elif before != result:
                self.fail(f"{row.round} was released twice with different results")
        indices = [row.index for row in rows if row.released]
        if indices != sorted(set(indices)):
            self.fail(f"the plan's rounds were released as {indices}")

    def _check_sum(self, blobs: Any, row: RoundRow) -> None:
        plan = self._plan
        assert plan is not None
        assert row.sum is not None
        layout, ring = round_layout(plan, row.index, MANIFEST), round_ring(plan)
        lanes = unpack(blobs.read_all(row.sum), layout.coordinates, ring)
        survivors = row.phase.survivors  # type: ignore[union-attr]
        places = [plan.roster.index(node) for node in survivors]
        expected = sum(steps_of(place, row.index) for place in places)
        found = {int(lane) for lane in np.asarray(lanes[: layout.model_coordinates - BETWEEN])}
        if found != {expected}:
            digits = [(value % 256 >> (2 * place)) & 3 for value in found for place in range(4)]
            self.fail(
                f"{row.round}: the sum is {found}, survivors {sorted(survivors)} make {expected};"
                f" counted {digits}"
            )
        least = 3 if self.world.setting.masked else 2
        metrics = row.metrics or {}
        if metrics.get("nodes") != len(survivors) or len(survivors) < least:
            self.fail(f"{row.round}: {metrics} with survivors {sorted(survivors)}")

    # -- spends ------------------------------------------------------------------------------

    def _coordinator_spends(self, found: Look) -> None:
        for (round_, node), status in found.spends.items():
            self._stays("coordinator", round_, node, status)
        if self.world.setting.mode == "private":
            for row in found.rows:
                if isinstance(row.phase, Released):
                    for node in row.phase.survivors:
                        if found.spends.get((row.round, str(node))) not in SPENT:
                            self.fail(f"coordinator: {row.round} is released, {node} spent nothing")

    def _stays(self, who: str, round_: RoundId, node: str, status: SpendStatus) -> None:
        key = (who, round_, node)
        before = self._settled.get(key)
        if before in SPENT and status not in SPENT:
            self.fail(f"{who}: the spend of {node} in {round_} went from {before} to {status}")
        self._settled[key] = status

    def _node(self, name: str, site: Any) -> None:
        if site.log is not None:
            seen = site.log.verifier.seen
            if seen.size:
                self._same_tree(seen.size, seen.root, name)
        if self.world.setting.mode != "private":
            return
        try:
            records = {record.round: record.status for record in site.privacy.ledger.records()}
        except FederationError:
            return
        for round_, status in records.items():
            if name not in self.tampered:
                self._stays(name, round_, name, status)
        for row in self.rows:
            mine = ("vector", name, row.round.number, getattr(row.phase, "attempt", 1))
            counted = isinstance(row.phase, Released) and name in row.phase.survivors
            if counted or mine in self._said:
                status = records.get(row.round)
                if status in (None, SpendStatus.VOID) and name not in self.tampered:
                    self.fail(f"{name}: {row.round} left the site, its own ledger says {status}")

    # -- the log -----------------------------------------------------------------------------

    def _log(self, leaves: list[bytes]) -> None:
        known = self._leaves
        if leaves[: len(known)] != known:
            self.fail(f"the log of {len(leaves)} leaves does not extend that of {len(known)}")
        self._leaves = leaves

    def _same_tree(self, size: int, root: bytes, who: str) -> None:
        if self._roots.setdefault(size, bytes(root)) != bytes(root):
            self.fail(f"{who} holds another tree of size {size}")

    # -- the end -----------------------------------------------------------------------------

    def check_models(self) -> None:
        """What the nodes derived, against what was published."""
        for row in self.rows:
            if not row.released or row.next_snapshot is None:
                continue
            root = Snapshot.from_bytes(row.next_snapshot).model_root
            for name, node in self.world.nodes.items():
                if node.site is None or name in self.tampered or "coordinator" in self.tampered:
                    continue
                record = node.site.journal.confirm(row.round)
                if record is None:
                    continue
                if record.computed != root or record.objection:
                    self.fail(f"{name} derived {record} from {row.round}, published is {root}")

    def trace(self) -> str:
        """A digest of who said what when, for comparing two plays; sealed boxes are never alike."""
        return hashlib.sha256(repr(self._heard).encode()).hexdigest()
