"""A whole federation in one process: ``coordinator.app.serve`` and agents, as they are deployed.

Everything is the real thing but what ``engine``, ``wire`` and ``trainer`` stand in for:
certificates, ledger, spool, blobs, round log with the nodes as witnesses, journals, secure states
and privacy ledgers lie in a folder in memory, laid out as in a deployment. Making one (keys,
enrolment, submission) is done once for each setting (``making``): simulations start from copies.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

from coordinator import app
from coordinator.config import CoordinatorConfig, load_config
from coordinator.ledger import Ledger
from coordinator.ledger import ledger as ledger_module
from node_agent import config as node_config
from node_agent import log as node_log
from node_agent.agent import Agent
from node_agent.capability import Capability
from node_agent.client import Connection
from node_agent.config import NodeFolder
from node_agent.enrol import renew
from node_agent.journal import Journal
from node_agent.keys import KeyStore
from node_agent.lock import FolderLock
from node_agent.log import open_node_log
from node_agent.models import Models
from node_agent.privacy import PrivacyGuard
from node_agent.privacy_ledger import PrivacyLedger
from node_agent.site import Site
from node_agent.spool import Spool
from protocols.errors import FederationError, IntegrityError
from protocols.identifiers import RunId
from protocols.tensors.manifest import Manifest, TensorSpec
from tests.simulation.engine import EPOCH, PROCESS, Loop, Process, watched_disk
from tests.simulation.quick import quick
from tests.simulation.trainer import BETWEEN, Trainer
from tests.simulation.wire import Network, patched_grpc

NAMES = ("a", "b", "c", "d")
COORDINATOR = "coordinator"
ADDRESS, ENROLMENT = "127.0.0.1:8443", "127.0.0.1:8444"
COORDINATES = 4 + BETWEEN
MANIFEST = Manifest((TensorSpec("vector", (COORDINATES,)),))
RUN = RunId("sim-1")


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


OPEN = Setting("open", nodes=3)
OPEN_TWICE = Setting("open", nodes=3, rounds=2)
LOGGED = Setting("open", log=True, nodes=3)
MASKED = Setting("masked")
MASKED_LOGGED = Setting("masked", log=True)
PRIVATE = Setting("private")
PRIVATE_LOGGED = Setting("private", log=True)
SETTINGS = (OPEN, OPEN_TWICE, LOGGED, MASKED, MASKED_LOGGED, PRIVATE, PRIVATE_LOGGED)


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
        self.world.processes.append(self.process)
        self.process.skew, self.process.full = self.skew, self.full
        self.process.spawn(self._live(self.process), self.name)

    async def _live(self, process: Process) -> None:
        try:
            await self.work(process)
        except Exception as error:  # noqa: BLE001 - it would end with an exit status and a sentence
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
            takes=lambda: 0.05 + 0.6 * rng.random(),
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
    ledger: Ledger | None = None

    async def work(self, process: Process) -> None:
        await app.serve(self.config, _Clock(process))

    def release(self) -> None:
        ledger, self.ledger, self.parts = self.ledger, None, None
        if ledger is not None:
            ledger._close()  # lets go of the file, and of nothing else


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
        self.processes: list[Process] = []
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

    class Opened(Ledger):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            Ledger.__init__(self, *arguments, **named)
            world.coordinator.ledger = self

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
        stack.enter_context(mock.patch.object(app, "Ledger", Opened))
        stack.enter_context(mock.patch.object(app, "keep_heap_small"))
        stack.enter_context(mock.patch.object(app, "use_all_files"))
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
