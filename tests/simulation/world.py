"""A whole federation in one process: ``coordinator.app.serve`` and agents, as they are deployed.

Everything is the real thing but what ``engine``, ``wire`` and ``trainer`` stand in for: certificates,
ledger, spool, blobs, round log with the nodes as witnesses, journals, secure states and privacy
ledgers lie in a folder in memory, laid out as in a deployment. Making one (keys, enrolment,
submission) is done once for each setting; every simulation starts from a copy.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import logging
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import grpc
import numpy as np

from coordinator import app, setup
from coordinator.blobs import Blobs
from coordinator.clock import ManualClock
from coordinator.config import CoordinatorConfig, load_config
from coordinator.ledger import ledger as ledger_module
from infra.runs.operator import find_operator
from node_agent import config as node_config
from node_agent import log as node_log
from node_agent.agent import Agent
from node_agent.capability import Capability
from node_agent.client import Connection
from node_agent.config import BudgetConfig, DataConfig, NodeFolder, PrivacyConfig, WorkerConfig
from node_agent.enrol import join, renew
from node_agent.journal import Journal
from node_agent.keys import KeyStore
from node_agent.lock import FolderLock
from node_agent.log import LogPaths, open_node_log
from node_agent.models import Models
from node_agent.privacy import PrivacyGuard
from node_agent.privacy_ledger import PrivacyLedger
from node_agent.site import Site
from node_agent.spool import Spool
from protocols.enrolment import Invitation
from protocols.errors import FederationError, IntegrityError
from protocols.gen import admin_pb2, admin_pb2_grpc
from protocols.identifiers import FederationId, NodeId, RunId
from protocols.plan import Plan
from protocols.round_vector import round_ring
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.scales import initial_scales
from protocols.tensors.snapshot import Snapshot
from tests.simulation.engine import EPOCH, PROCESS, Loop, Process, watched_disk
from tests.simulation.quick import quick
from tests.simulation.trainer import EXPONENT, Trainer
from tests.simulation.wire import Network, patched_grpc

NAMES = ("a", "b", "c", "d")
COORDINATOR = "coordinator"
ADDRESS, ENROLMENT = "127.0.0.1:8443", "127.0.0.1:8444"
COORDINATES = 6
MANIFEST = Manifest((TensorSpec("vector", (COORDINATES,)),))
RUN = RunId("sim-1")
JOIN, TRAIN, SHORT, UPLOAD = 8, 12, 8, 10  # seconds: deadlines of the plan


@dataclass(frozen=True, slots=True)
class Setting:
    """What kind of federation is simulated."""

    mode: str = "open"  # "open" | "masked" | "private"
    log: bool = False
    nodes: int = 4
    rounds: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Of the nodes."""
        return NAMES[: self.nodes]

    @property
    def masked(self) -> bool:
        """Whether sums are secure ones."""
        return self.mode != "open"


OPEN = Setting("open", nodes=3, rounds=2)
LOGGED = Setting("open", log=True, nodes=3)
MASKED = Setting("masked")
MASKED_LOGGED = Setting("masked", log=True)
PRIVATE = Setting("private")
PRIVATE_LOGGED = Setting("private", log=True)
SETTINGS = (OPEN, LOGGED, MASKED, MASKED_LOGGED, PRIVATE, PRIVATE_LOGGED)


def plan_value(setting: Setting, keys: dict[str, str], initial: str) -> dict[str, Any]:
    """The plan of a setting as a JSON value."""
    masked = setting.masked
    value: dict[str, Any] = {
        "federation": "sim",
        "run": RUN,
        "mode": {"open": "open", "masked": "aggregate-only", "private": "record-local"}[setting.mode],
        "roster": list(setting.names),
        "min_participants": 3 if masked else 2,
        "rounds": setting.rounds,
        "model": {"family": "vector", "manifest": MANIFEST.digest, "initial": initial},
        "local_step": {"kind": "builtin", "max_steps": 2},
        "vector": {"ring_bits": 20, "scale": {"mode": "fixed", "exponent": EXPONENT}},
        "deadlines": {
            "join": JOIN, "train": TRAIN, "deal": SHORT, "upload": UPLOAD,
            "commit": SHORT, "reveal": SHORT,
        },
    }  # fmt: skip
    if masked:
        value["secagg"] = {"threshold": 3, "colluders": 1, "min_surviving": 3, "keys": keys}
    if setting.mode == "private":
        value["local_step"] |= {"keep_optimizer": False}
        value["privacy"] = {
            "unit": "document",
            "max_sequences": 4,
            "clip_norm": 1.0,
            "noise_multiplier": 1.0,
            "sampling_rate": 0.05,
            "expected_batch": 16.0,
            "steps": 2,
            "delta": "1e-5",
        }
    return value


# -- who may die -----------------------------------------------------------------------------------

RESTART = 2.0  # seconds until a supervisor starts again what ended by itself


@dataclass(slots=True, kw_only=True)
class Victim:
    """A program that is started on what is on disk, as often as it dies."""

    name: str
    world: World
    process: Process | None = None
    again: float | None = None  # seconds from its death to its next start; None: not by itself
    stopped: str = ""  # why it ended by itself
    skew: timedelta = timedelta()
    full: bool = False

    @property
    def up(self) -> bool:
        """Whether it runs."""
        return self.process is not None and not self.process.dead

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.up:
            return
        self.stopped = ""
        self.process = Process(self.name, self.world.loop, self.world.died)
        self.process.skew, self.process.full = self.skew, self.full
        self.process.spawn(self._live(self.process), self.name)

    async def _live(self, process: Process) -> None:
        try:
            await self.work(process)
        except Exception as error:  # it would end with an exit status and a sentence
            if not process.dead:
                self.stopped = f"{type(error).__name__}: {error}"
                if not isinstance(error, FederationError | OSError):
                    self.world.bugs.append(f"{self.name}: {traceback.format_exc()}")
                if not isinstance(error, IntegrityError):
                    self.again = RESTART
                process.kill()

    async def work(self, process: Process) -> None:
        """What it does."""
        raise NotImplementedError

    def release(self) -> None:
        """What the kernel does for a process that died."""
        raise NotImplementedError

    def set_clock(self, skew: timedelta) -> None:
        """Its wall clock minus the true time."""
        self.skew = skew
        if self.process is not None:
            self.process.skew = skew

    def set_full(self, full: bool) -> None:
        """Its disk."""
        self.full = full
        if self.process is not None:
            self.process.full = full


# -- one node --------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Node(Victim):
    """One institution: its folder, and the agent that works there now, if one does."""

    folder: NodeFolder
    site: Site | None = None
    agent: Agent | None = None
    seeds: Random = field(default_factory=Random)

    async def work(self, process: Process) -> None:
        with FolderLock(self.folder, pid=1):
            self.site = self._open(process)
            self.agent = Agent(self.site)
            await self.agent.run()

    def _open(self, process: Process) -> Site:
        folder, loop = self.folder, self.world.loop
        config = node_config.load_config(folder.make())
        rng = Random(self.seeds.random())
        keys = KeyStore(folder.keys)
        identity, signing_key = keys.tls(), keys.signing_key()
        journal = Journal(folder.journal, now=process.now)
        ledger = PrivacyLedger(folder.privacy, now=process.now)
        connection = Connection(config.coordinator, identity, rng=rng)
        log = open_node_log(
            folder.root,
            node=config.institution,
            federation=config.federation,
            key=signing_key,
            connection=connection,
            rng=rng,
            require=config.log.require,
        )
        trainer = Trainer(
            spool=Spool(folder.spool.resolve()).make(),
            node=self.name,
            monotonic=loop.time,
            takes=lambda: 0.1 + 2.0 * rng.random(),
        )
        return Site(
            folder=folder,
            config=config,
            keys=keys,
            signing_key=signing_key,
            journal=journal,
            privacy=PrivacyGuard(ledger=ledger, journal=journal, config=config),
            models=Models(folder.models.resolve()),
            connection=connection,
            launchers={"builtin": trainer},
            capability=Capability(gpus=0, gpu_memory_gb=0.0, memory_gb=8.0),
            rng=rng,
            now=process.now,
            monotonic=loop.time,
            random_bytes=self.seeds.randbytes,
            log=log,
        )

    def release(self) -> None:
        """What the kernel does for a process that died."""
        site, self.site, self.agent = self.site, None, None
        if site is not None:
            site.journal.close()
            site.privacy.ledger.close()
            if site.log is not None:
                site.log.store.close()
                if site.log.witness is not None:
                    site.log.witness.store.close()

    async def rotate(self) -> None:
        """A new TLS key and certificate, now."""
        site = self.site
        if site is not None:
            with suppress(Exception):
                await renew(
                    site.keys,
                    site.connection,
                    node=site.node,
                    federation=site.config.federation,
                    log=site.log,
                )


# -- the coordinator -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Coordinator(Victim):
    """``minga coordinator serve``."""

    config: CoordinatorConfig
    parts: app.Parts | None = None

    async def work(self, process: Process) -> None:
        await app.serve(self.config, _Clock(process))

    def release(self) -> None:
        parts, self.parts = self.parts, None
        if parts is not None:
            parts.ledger._close()  # noqa: SLF001 - lets go of the file, and of nothing else


@dataclass(frozen=True, slots=True)
class _Clock:
    process: Process

    def now(self) -> datetime:
        return self.process.now()


# -- all of it -------------------------------------------------------------------------------------


class World:
    """A federation on a copy of its setting's folder."""

    def __init__(self, folder: Path, setting: Setting, seed: int, *, jitter: float) -> None:
        self.folder, self.setting = folder, setting
        self.rng = Random(f"world {seed}")
        self.loop = Loop(Random(f"loop {seed}"), jitter=jitter)
        self.network = Network(self.loop, Random(f"network {seed}"))
        self.coordinator = Coordinator(
            name=COORDINATOR,
            world=self,
            config=load_config(folder / "coordinator" / "config.toml"),
        )
        self.nodes = {
            name: Node(
                name=name,
                world=self,
                folder=NodeFolder(folder / "nodes" / name),
                seeds=Random(f"{name} {seed}"),
            )
            for name in setting.names
        }
        self.deaths = 0
        self.refused_writes = 0
        self.bugs: list[str] = []  # tracebacks that somebody logged

    @property
    def victims(self) -> tuple[Victim, ...]:
        """Everybody."""
        return (self.coordinator, *self.nodes.values())

    def victim(self, name: str) -> Victim:
        """Who has that name."""
        return self.coordinator if name == COORDINATOR else self.nodes[name]

    def died(self, process: Process) -> None:
        """Clear up after a process, once nothing of it is on the stack any more."""
        self.deaths += 1
        self.refused_writes += process.refused
        self.network.drop(process)
        victim = self.victim(process.name)
        self.loop.call_soon(victim.release, context=_NOBODY)
        if victim.again is not None:
            self.loop.call_later(victim.again, victim.start, context=_NOBODY)
            victim.again = None

    def start(self) -> None:
        """Everybody."""
        for victim in self.victims:
            victim.start()

    def stop(self) -> None:
        """Kill everybody and let go of everything."""
        for victim in self.victims:
            victim.again = None
            if victim.up and victim.process is not None:
                victim.process.kill()
        self.loop.run_until_complete(asyncio.sleep(0.001))
        self.loop.run_until_complete(asyncio.sleep(0.001))


_NOBODY = contextvars.Context()  # of what no process does


class _Listener(logging.Handler):
    """Whoever logs an error with a traceback has met a bug."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] is not None:
            text = logging.Formatter().formatException(record.exc_info)
            self._world.bugs.append(f"{record.getMessage()}\n{text}")


@contextmanager
def alive(world: World) -> Iterator[World]:
    """Within it, the world's clock, disk and network are those of the code under test."""
    build = app.build

    async def built(config: CoordinatorConfig, clock: Any) -> app.Parts:
        parts = await build(config, clock)
        world.coordinator.parts = parts
        return parts

    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            process = PROCESS.get()
            at = process.now() if process is not None else EPOCH
            return at.astimezone(tz)

    root, listener = logging.getLogger(), _Listener(world)
    level = root.level
    with ExitStack() as stack:
        stack.enter_context(quick())
        stack.enter_context(watched_disk())
        stack.enter_context(patched_grpc(world.network))
        stack.enter_context(mock.patch.object(app, "build", built))
        stack.enter_context(mock.patch.object(app, "keep_heap_small", lambda: None))
        stack.enter_context(mock.patch.object(node_log, "datetime", Now))
        clock = SimpleNamespace(monotonic=world.loop.time, sleep=lambda _seconds: None)
        stack.enter_context(mock.patch.object(ledger_module, "time", clock))
        root.addHandler(listener)
        root.setLevel(logging.ERROR)
        previous = asyncio.events._get_running_loop()
        assert previous is None
        asyncio.set_event_loop(world.loop)
        try:
            yield world
        finally:
            world.stop()
            root.removeHandler(listener)
            root.setLevel(level)
            asyncio.set_event_loop(None)
            world.loop.close()


# -- making the folders ----------------------------------------------------------------------------


def in_memory() -> Path | None:
    """A folder in memory, where there is one: simulations sync thousands of times."""
    memory = Path("/dev/shm")  # noqa: S108 - names in it are made by tempfile
    return memory if memory.is_dir() else None


@cache
def template(setting: Setting) -> Path:
    """A federation whose run has been submitted, and nothing else; made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="minga-sim-", dir=in_memory()))
    atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    with mock.patch.object(setup, "SystemClock", partial(ManualClock, EPOCH - timedelta(minutes=1))):
        setup.initialise(
            folder=folder,
            federation="sim",
            address=ADDRESS,
            enrolment=ENROLMENT,
            public=ADDRESS,
            hosts=(),
            ledger="sqlite:///ledger.sqlite",
            operator="cenia",
            log=setting.log,
            now=EPOCH - timedelta(minutes=1),
        )
    for name in setting.names:
        (folder / "nodes" / name).mkdir(parents=True)
    world = World(folder, setting, 0, jitter=0.0)
    with alive(world):
        world.coordinator.start()
        process = world.coordinator.process
        assert process is not None
        task = process.spawn(_enrol_and_submit(world))
        world.loop.run_until_complete(task)
    return folder


async def _enrol_and_submit(world: World) -> None:
    await asyncio.sleep(1.0)
    operator = find_operator(folder=world.folder, config=None, environment={})
    channel = grpc.aio.secure_channel(
        ADDRESS, grpc.ssl_channel_credentials(operator.ca, operator.key, operator.certificate)
    )
    admin: Any = admin_pb2_grpc.AdminStub(channel)
    keys = {}
    for name, node in world.nodes.items():
        invited = await admin.Invite(admin_pb2.InviteRequest(institution=name, valid_hours=1))
        store = KeyStore(node.folder.make().keys)
        await join(
            store,
            Invitation.parse(invited.token),
            enrolment=ENROLMENT,
            rng=Random(1),
            log=LogPaths(node.folder.root) if world.setting.log else None,
        )
        keys[name] = store.signing_key().public_key().public_bytes_raw().hex()
        _write_config(node)
        Journal(node.folder.journal, now=lambda: EPOCH).close()
        PrivacyLedger(node.folder.privacy, now=lambda: EPOCH).close()
    plan, snapshot = _initial(world, keys)
    request = operator.sign_request(plan, EPOCH)
    body, signature = request or (b"", b"")
    await admin.SubmitRun(
        admin_pb2.SubmitRunRequest(
            plan=plan.to_bytes(),
            snapshot=snapshot.to_bytes(),
            request=body,
            request_signature=signature,
        )
    )


def _write_config(node: Node) -> None:
    text = node.folder.root / "text.jsonl"
    text.write_text('{"text": "uno"}\n')
    node.folder.config.write_text(
        node_config.render_config(
            institution=NodeId(node.name),
            federation=FederationId("sim"),
            coordinator=ADDRESS,
            enrolment=ENROLMENT,
            data=DataConfig(train=("text.jsonl",)),
            worker=WorkerConfig(device="cpu"),
            privacy=PrivacyConfig(budget=(BudgetConfig(epsilon=50.0, delta=1e-3),)),
        )
    )


def _initial(world: World, keys: dict[str, str]) -> tuple[Plan, Snapshot]:
    draft = Plan.from_value(plan_value(world.setting, keys, "0" * 64))
    scales = initial_scales(MANIFEST, draft.vector.scale, round_ring(draft), len(world.setting.names))
    blobs = Blobs(world.coordinator.config.blobs)
    blobs.prepare()
    theta = blobs.put_bytes(np.zeros(COORDINATES, "<f4").tobytes())
    blobs.put_bytes(MANIFEST.to_bytes())
    blobs.put_bytes(scales.to_bytes())
    snapshot = Snapshot.initial(MANIFEST, theta, scales)
    return Plan.from_value(plan_value(world.setting, keys, snapshot.model_root)), snapshot


@contextmanager
def world_of(setting: Setting, seed: int, *, jitter: float = 0.0) -> Iterator[World]:
    """A living federation on a fresh copy of its setting's folder."""
    made = template(setting)
    with tempfile.TemporaryDirectory(prefix="minga-sim-", dir=in_memory()) as name:
        folder = Path(name) / "f"
        shutil.copytree(made, folder)
        with alive(World(folder, setting, seed, jitter=jitter)) as world:
            yield world


__all__ = ["COORDINATOR", "NAMES", "RUN", "SETTINGS", "Setting", "World", "template", "world_of"]
