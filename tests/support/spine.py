"""The whole coordinator but its sockets, on one manual clock, with nodes that lose messages.

Services, ledger, spool, release and driver are the real ones. A node contributes 4**i in every
model coordinate (i is its place on the roster), so the base-4 digits of a released sum name who was
counted. Requests are lost before the handler ran, answers after it ran; nodes forget everything;
the coordinator is taken down and started again, losing what it held in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.aggregation.release import release
from coordinator.blobs import Blobs
from coordinator.ca import CertificateAuthority
from coordinator.clock import ManualClock
from coordinator.drivers.rounds import RoundDriver
from coordinator.layouts import Layouts
from coordinator.ledger import Ledger, RoundRow
from coordinator.services.admin import AdminService
from coordinator.services.bulk import BulkService
from coordinator.services.caller import Callers
from coordinator.services.rounds import RoundsService
from coordinator.spool import Spool
from protocols.crypto.identity import Identity
from protocols.errors import FederationError, NotEnrolledError, NotPermittedError
from protocols.gen import admin_pb2, bulk_pb2, rounds_pb2
from protocols.identifiers import FederationId, NodeId, RoundId, RunId
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.metrics import encode_metrics
from protocols.tensors.planar import pack, unpack
from protocols.tensors.scales import initial_scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import UnitHasher
from protocols.upload import UploadHeader, sign_header
from tests.support.ledgers import START, make_plan

COORDINATES = 300
MANIFEST = Manifest((TensorSpec("vector", (COORDINATES,)),))
OPERATOR = Identity("operator", "cenia")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A temporary folder in memory where there is one: simulations sync thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@dataclass(frozen=True, slots=True)
class FakeContext:
    """What a handler sees of a call."""

    identity: Identity
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.metadata

    def peer(self) -> str:
        return f"ipv4:{self.identity.name}"


def as_context(identity: Identity, **metadata: str | bytes) -> grpc.aio.ServicerContext:
    """A context with lower-case metadata names, underscores for hyphens."""
    pairs = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
    return cast("grpc.aio.ServicerContext", FakeContext(identity, pairs))


class FakeCallers:
    """Believes the context; the real one reads certificates (tests/contract/test_door.py)."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def member(self, node: NodeId) -> None:
        """Nobody has signed a membership here."""

    async def node(self, context: FakeContext) -> NodeId:
        if context.identity.role != "node":
            raise NotPermittedError("for nodes")
        node = NodeId(context.identity.name)
        if await self._ledger.read("membership", lambda tx: tx.node(node)) is None:
            raise NotEnrolledError(f"{node} is not enrolled")
        return node

    async def operator(self, context: FakeContext) -> Identity:
        if context.identity.role != "operator":
            raise NotPermittedError("for operators")
        return context.identity

    async def watcher(self, context: FakeContext) -> Identity:
        return await self.operator(context)

    async def any(self, context: FakeContext) -> Identity:
        return context.identity


def vector_of(plan: Plan, node: NodeId, index: int) -> bytes:
    """What a node sends: 4**i everywhere, and metrics that name it too."""
    layout, ring = round_layout(plan, index, MANIFEST), round_ring(plan)
    digit = 4 ** plan.roster_ids.index(node)
    values = dict.fromkeys(layout.metrics, 0) | {"weight": 65536, "nodes": 1, "tokens": digit}
    lanes = np.concatenate(
        [
            np.full(layout.model_coordinates, digit, np.int32),
            encode_metrics(values, layout.metrics),
        ]
    )
    return pack(lanes, ring)


def counted(total: int, roster: tuple[NodeId, ...]) -> dict[NodeId, int]:
    """Base-4 digits of a sum: how often each node was counted."""
    digits = {node: (total >> (2 * place)) & 3 for place, node in enumerate(roster)}
    return {node: digit for node, digit in digits.items() if digit}


def initial_model(blobs: Blobs, draft: Plan) -> Snapshot:
    """Blobs of a zero model."""
    ring = round_ring(draft)
    scales = initial_scales(MANIFEST, draft.vector.scale, ring, len(draft.roster))
    theta = blobs.put_bytes(np.zeros(COORDINATES, "<f4").tobytes())
    blobs.put_bytes(MANIFEST.to_bytes())
    blobs.put_bytes(scales.to_bytes())
    return Snapshot.initial(MANIFEST, theta, scales)


class Spine:
    """One coordinator; ``restart`` loses everything that is not on disk."""

    def __init__(self, folder: Path, *, url: str = "", clock: ManualClock | None = None) -> None:
        self.folder = folder
        self.url = url or f"sqlite:///{folder}/ledger.sqlite"
        self.clock = clock or ManualClock(START)
        self.authority = CertificateAuthority.create(FederationId("demo"), now=START)
        self.ledger: Ledger
        self.add_up: Callable[..., Any] = release

    async def start(self) -> None:
        """Make everything anew from what is on disk."""
        self.ledger = await Ledger(self.url, clock=self.clock).open()
        self.blobs = Blobs(self.folder / "blobs")
        self.blobs.tmp.mkdir(parents=True, exist_ok=True)
        self.spool = Spool(self.folder / "spool", min_free_bytes=0)
        self.spool.prepare()
        layouts = Layouts(self.blobs)
        common: dict[str, Any] = {
            "callers": cast("Callers", FakeCallers(self.ledger)),
            "ledger": self.ledger,
            "clock": self.clock,
        }
        self.rounds = RoundsService(**common)
        self.admin = AdminService(**common, blobs=self.blobs, authority=self.authority)
        self.bulk = BulkService(**common, spool=self.spool, blobs=self.blobs, layouts=layouts)
        self.driver = RoundDriver(
            ledger=self.ledger,
            clock=self.clock,
            blobs=self.blobs,
            layouts=layouts,
            spool=self.spool.root,
            add_up=self.add_up,
        )

    async def stop(self) -> None:
        """A crash, as far as the ledger can tell: nothing is said or released."""
        await self.driver.settle()
        await self.ledger.close()

    async def restart(self) -> None:
        """Another process on the same disk."""
        await self.stop()
        await self.start()

    async def drive(self) -> None:
        """Pass after pass until there is nothing left to do at this moment."""
        for _ in range(20):
            work = await self.driver.pass_once()
            await self.driver.settle()
            if not (work.due or work.to_open or work.runs):
                return

    async def submit(self, **fields: Any) -> Plan:
        """Enrol the roster, put the initial model, submit a plan."""
        draft = make_plan(**fields)
        snapshot = initial_model(self.blobs, draft)
        plan = Plan.from_value(
            draft.model_dump(mode="json", by_alias=True)
            | {
                "model": {
                    "family": "vector",
                    "manifest": MANIFEST.digest,
                    "initial": snapshot.model_root,
                }
            }
        )
        for node in plan.roster_ids:
            public = signing_key(node).public_key().public_bytes_raw()
            await self.ledger.run("enrol", lambda tx, n=node, k=public: tx.add_node(n, k, START))
        request = admin_pb2.SubmitRunRequest(plan=plan.to_bytes(), snapshot=snapshot.to_bytes())
        await self.admin.SubmitRun(request, as_context(OPERATOR))
        return plan

    async def all_rounds(self, run: RunId) -> list[RoundRow]:
        """Every round of a run."""
        return await self.ledger.read("look", lambda tx: tx.rounds(run))


def signing_key(node: str) -> Ed25519PrivateKey:
    """The same for the same name."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(node.encode()).digest())


class LostError(Exception):
    """The caller does not know whether its request arrived."""


@dataclass(slots=True)
class Network:
    """Loses requests before the handler ran, and answers after it ran."""

    rng: random.Random
    loss: float = 0.1
    fired: Counter[str] = field(default_factory=Counter)

    async def call(self, handler: Callable[[], Awaitable[Any]]) -> Any:
        """One call."""
        if self.rng.random() < self.loss:
            self.fired["request lost"] += 1
            raise LostError
        answer = await handler()
        if self.rng.random() < self.loss:
            self.fired["answer lost"] += 1
            raise LostError
        return answer


@dataclass(slots=True)
class SimulatedNode:
    """Level-based, like the real agent: looks, does the next thing that is asked, forgets."""

    node: NodeId
    confirmed: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)

    async def act(self, spine: Spine, network: Network) -> None:
        """One look and at most one thing done for each run."""
        try:
            context = as_context(Identity("node", self.node))
            view = await network.call(
                lambda: spine.rounds.Sync(rounds_pb2.SyncRequest(state="running"), context)
            )
            for run in view.runs:
                await self._act_on(spine, network, run, context)
        except LostError:
            pass
        except FederationError as error:
            self.refused[error.code] += 1

    async def _act_on(self, spine: Spine, network: Network, run: Any, context: Any) -> None:
        released = run.last_released
        name = f"{released.round.run}/{released.round.number}"
        if released.phase.model_root and name not in self.confirmed:
            confirm = rounds_pb2.ConfirmRequest(
                round=released.round, model_root=released.phase.model_root
            )
            await network.call(lambda: spine.rounds.Confirm(confirm, context))
            self.confirmed.add(name)
        current, phase = run.current, run.current.phase
        match phase.name:
            case "Open" if self.node not in phase.joined:
                start = Snapshot.from_bytes(current.start_snapshot)
                join = rounds_pb2.JoinRequest(
                    round=current.round, plan_digest=run.plan_digest, model_root=start.model_root
                )
                await network.call(lambda: spine.rounds.Join(join, context))
            case "Training" if self.node in phase.cohort and self.node not in phase.ready:
                start = Snapshot.from_bytes(current.start_snapshot)
                ready = rounds_pb2.ReadyRequest(round=current.round, model_root=start.model_root)
                await network.call(lambda: spine.rounds.Ready(ready, context))
            case "Uploading" if self.node in phase.ready and self.node not in phase.received:
                await self._upload(spine, network, run.run, current, context)

    async def _upload(
        self, spine: Spine, network: Network, run: str, current: Any, context: Any
    ) -> None:
        plan = await spine.ledger.read("plan", lambda tx: tx.run(RunId(run)).plan)
        data = vector_of(plan, self.node, current.index)
        header, hashes = make_header(plan, self.node, current, data)
        begin = bulk_pb2.BeginUploadRequest(
            header=header.to_bytes(),
            signature=sign_header(signing_key(self.node), header),
            unit_hashes=hashes,
        )
        state = await network.call(lambda: spine.bulk.BeginUpload(begin, context))
        if state.durable < state.total:
            identity = Identity("node", self.node)
            raw = as_context(
                identity, minga_upload_bin=state.upload_id, minga_offset=str(state.durable)
            )
            await network.call(lambda: spine.bulk.append(_messages(data[state.durable :]), raw))
        finish = bulk_pb2.FinishUploadRequest(upload_id=state.upload_id)
        await network.call(lambda: spine.bulk.FinishUpload(finish, context))


def make_header(
    plan: Plan, node: NodeId, current: Any, data: bytes
) -> tuple[UploadHeader, tuple[bytes, ...]]:
    """The header of a node's vector for the round in a view, and the unit hashes."""
    hasher = UnitHasher()
    hasher.update(data)
    layout = round_layout(plan, current.index, MANIFEST)
    header = UploadHeader(
        federation=plan.federation_id,
        run=plan.run_id,
        round=current.round.number,
        attempt=current.phase.attempt,
        node=node,
        plan=plan.digest,
        model=Snapshot.from_bytes(current.start_snapshot).model_root,
        coordinates=layout.coordinates,
        ring=plan.vector.ring_bits,
        size=len(data),
        root=hasher.digest(),
    )
    return header, hasher.hashes()


async def _messages(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 400):
        yield data[start : start + 400]
        await asyncio.sleep(0)


def sum_of(blobs: Blobs, plan: Plan, row: RoundRow) -> np.ndarray:
    """The model coordinates of a released sum."""
    if row.sum is None:
        raise AssertionError(f"round {row.round} has no sum")
    layout, ring = round_layout(plan, row.index, MANIFEST), round_ring(plan)
    lanes = unpack(blobs.read_all(row.sum), layout.coordinates, ring)
    return lanes[: layout.model_coordinates]


def expected_release(folder: Path, plan: Plan, row: RoundRow, start: Snapshot) -> Snapshot:
    """What a round with these survivors must lead to, computed apart from the coordinator."""
    blobs = Blobs(folder / "expected")
    blobs.prepare()
    initial_model(blobs, plan)
    uploads = []
    for node in sorted(row.phase.survivors):  # type: ignore[union-attr]
        path = folder / f"{node}.{row.round.number}"
        path.write_bytes(vector_of(plan, node, row.index))
        uploads.append(path)
    made = release(
        plan=plan,
        index=row.index,
        start=start,
        uploads=uploads,
        blobs=blobs,
        layouts=Layouts(blobs),
    )
    return made.snapshot


@dataclass(slots=True)
class Simulation:
    """One seed: a run played to its end under faults."""

    seed: int
    spine: Spine
    plan: Plan
    nodes: list[SimulatedNode]
    network: Network
    restarts: int = 0
    steps: int = 0

    async def play(self, limit: int = 3000) -> str:
        """Until the run ends; returns its status."""
        rng, spine = self.network.rng, self.spine
        for self.steps in range(1, limit + 1):
            draw = rng.random()
            if draw < 0.80:
                await rng.choice(self.nodes).act(spine, self.network)
            elif draw < 0.93:
                await spine.drive()
            elif draw < 0.96:
                spine.clock.advance(timedelta(seconds=rng.choice((1, 20, 70, 300))))
            elif draw < 0.98:
                who = rng.randrange(len(self.nodes))
                self.nodes[who] = SimulatedNode(self.nodes[who].node)  # it lost its memory
            else:
                self.restarts += 1
                await spine.restart()
            run = await spine.ledger.read("look", lambda tx: tx.run(self.plan.run_id))
            if run.status != "active":
                return run.status
        return "unfinished"

    async def check(self, folder: Path) -> Counter[str]:
        """Ask the oracle; returns how the rounds ended."""
        rows = await self.spine.all_rounds(self.plan.run_id)
        ends: Counter[str] = Counter(type(row.phase).__name__ for row in rows)
        start = Snapshot.from_bytes(rows[0].start_snapshot)
        index = 0
        for number, row in enumerate(rows):
            assert row.round == RoundId(self.plan.run_id, number)
            assert row.index == index
            assert Snapshot.from_bytes(row.start_snapshot) == start
            if not row.released:
                continue
            expected = dict.fromkeys(sorted(row.phase.survivors), 1)  # type: ignore[union-attr]
            (value,) = {int(lane) for lane in sum_of(self.spine.blobs, self.plan, row)}
            assert counted(value, self.plan.roster_ids) == expected
            assert counted((row.metrics or {})["tokens"], self.plan.roster_ids) == expected
            start = expected_release(folder, self.plan, row, start)
            assert row.next_snapshot == start.to_bytes()
            index += 1
        return ends
