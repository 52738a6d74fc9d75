"""The worker as a resident child of the agent, on the same machine.

    asleep --wanted--> starting --worker.json--> serving --exit, or no sign of life--> resting
                          |                                                             |
                          '---- not ready in time ------------------------------------->'
    resting --backoff--> starting

``tick`` looks at the child and at its files and takes one step; it is called again and again. The
child runs in a session of its own, so that Ctrl-C reaches the agent alone; it leaves by itself
when the agent is gone (``--exit-with-parent``), and the next agent ends what is left of it.
A child that has died or hung is started again, later each time; a job that was on it each of
``GIVE_UP`` times is given up with one clear sentence.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from node_agent.client import Backoff
from node_agent.config import FlowerConfig, WorkerConfig
from node_agent.launchers.jobs import Launcher
from node_agent.launchers.last_words import last_words_in
from node_agent.launchers.processes import (
    end_family,
    family,
    remember,
    remembered,
)
from node_agent.resident import Process
from node_agent.spool import Spool, alive_age, read_worker
from protocols.errors import MalformedMessageError, WorkerError

logger = logging.getLogger(__name__)
_CENSUS_S: Final = 5.0  # between two counts of the child's family
_LOG_LIMIT: Final = 16 * 2**20  # bytes; then the log is put aside


def worker_arguments(config: WorkerConfig, spool: Spool) -> list[str]:
    """What the training worker is told, wherever it runs."""
    return [
        *("--spool", str(spool.root), "--device", config.device),
        *("--checkpoint-every-s", f"{config.checkpoint_every_s:g}"),
    ]


def worker_command(config: WorkerConfig, spool: Spool, *, parent: int) -> list[str]:
    """The command of the training worker: direct for one rank, torchrun for several."""
    worker = ["-m", "node_agent.worker", *worker_arguments(config, spool)]
    life = ["--exit-with-parent", "--parent-pid", str(parent)]
    if config.ranks == 1:
        return [sys.executable, *worker, *life]
    launch = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]
    return [sys.executable, *launch, "--nproc-per-node", str(config.ranks), *worker, *life]


def flower_command(config: FlowerConfig, spool: Spool, *, parent: int) -> list[str]:
    """The command of the host of Flower client apps."""
    life = ["--exit-with-parent", "--parent-pid", str(parent)]
    lent = [f"--python-path={folder}" for folder in config.python_path]
    if config.node_config:
        lent.append(f"--node-config={config.node_config}")
    return [sys.executable, "-m", "node_agent.flower", "--spool", str(spool.root), *life, *lent]


def worker_environment(config: WorkerConfig, outside: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment: nothing phones home, nothing is looked up on the network."""
    own = {
        **outside,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if config.threads is not None:
        own["OMP_NUM_THREADS"] = str(config.threads)
    if config.network_interface is not None:
        own["NCCL_SOCKET_IFNAME"] = own["GLOO_SOCKET_IFNAME"] = config.network_interface
    if config.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    return own


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a look at the child found."""

    running: bool
    exit_status: int | None  # of a child that ended
    ready: bool  # worker.json is there and can be read
    silent_s: float | None  # since its last sign of life
    age_s: float  # since it was started


def verdict(health: Health, *, start_within_s: float, hangs_after_s: float) -> str | None:
    """Why the child has to go or is gone; None while all is well. Pure."""
    if not health.running:
        return f"the worker ended with status {health.exit_status}"
    if not health.ready:
        if health.age_s >= start_within_s:
            return f"the worker was not ready after {start_within_s:g} s"
        return None
    silent = health.age_s if health.silent_s is None else health.silent_s
    if silent >= hangs_after_s:
        return f"the worker gave no sign of life for {silent:.0f} s"
    return None


@dataclass(slots=True, kw_only=True)
class LocalLauncher(Launcher):
    """One resident child and its spool."""

    command: Callable[[], list[str]]
    environment: Mapping[str, str] = field(repr=False)
    start_within_s: float
    hangs_after_s: float
    rng: Random
    backoff: Backoff = field(default_factory=lambda: Backoff(first_s=1.0, cap_s=60.0))
    now: Callable[[], float] = time.time  # unix seconds, to compare with the files
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _child: subprocess.Popen[bytes] | None = None
    _process: Process | None = None
    _members: tuple[Process, ...] = ()  # the child's family when it was last counted
    _census_at: float = 0.0
    _started: float = 0.0
    _said_from: int = 0  # where in the log the child's own words begin
    _failures: int = 0
    _not_before: float = 0.0

    @property
    def state(self) -> str:
        """One line for `minga node status`."""
        if self._child is None:
            if self._failures:
                wait = max(0.0, self._not_before - self.monotonic())
                return f"restarting in {wait:.0f} s: {self._last_reason}"
            return "asleep"
        pid = self._child.pid
        return f"serving, process {pid}" if self._ready() else f"starting, process {pid}"

    # -- life ------------------------------------------------------------------------------------

    def clear_leftovers(self) -> str | None:
        """End a worker that an earlier agent left behind. Blocking.

        Returns:
            One sentence if there was one.
        """
        left = remembered(self._record)
        if left is not None:
            end_family(left)
        self._record.unlink(missing_ok=True)
        return f"ended a worker that was left behind (process {left.pid})" if left else None

    async def tick(self) -> None:
        """Look at the child and take one step; one caller at a time, or two would be started."""
        async with self._turn:
            await self._tick()

    async def _tick(self) -> None:
        if self._child is None:
            if self._needed() and self.monotonic() >= self._not_before:
                await asyncio.to_thread(self._start)
            return
        health = self._health()
        why = verdict(health, start_within_s=self.start_within_s, hangs_after_s=self.hangs_after_s)
        if why is None:
            if health.ready and not self._needed():
                self._failures = 0
            if self.monotonic() >= self._census_at:
                self._census_at = self.monotonic() + _CENSUS_S
                self._members = await asyncio.to_thread(family, self._child.pid)
            return
        await asyncio.to_thread(self._end)
        self._gone(why)

    async def close(self) -> None:
        """End the child; its job stays in the spool and goes on with the next one."""
        if self._child is not None:
            await asyncio.to_thread(self._end)
            self._child = self._process = None
        self._record.unlink(missing_ok=True)

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _record(self) -> Path:
        return self.spool.root / "launched.json"

    @property
    def _log(self) -> Path:
        return self.spool.root / "worker.log"

    def _needed(self) -> bool:
        return bool(self.under_way())

    def _ready(self) -> bool:
        with suppress(MalformedMessageError):
            return read_worker(self.spool) is not None
        return False

    def _health(self) -> Health:
        child = self._child
        if child is None:
            raise ValueError("there is no child to look at")
        age = self.monotonic() - self._started
        silent = alive_age(self.spool, now=self.now())
        return Health(
            running=child.poll() is None,
            exit_status=child.returncode,
            ready=self._ready(),
            silent_s=None if silent is None else min(silent, age),  # not what a predecessor left
            age_s=age,
        )

    def _start(self) -> None:
        self.spool.make()
        for stale in (self.spool.drain, self.spool.worker, self.spool.alive):
            stale.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            if self._log.stat().st_size > _LOG_LIMIT:
                self._log.replace(self._log.with_suffix(".log.1"))
        with self._log.open("ab") as log:
            self._said_from = log.tell()
            try:
                child = subprocess.Popen(
                    self.command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(self.environment),
                    start_new_session=True,
                    close_fds=True,
                )
            except OSError as error:
                self._gone(f"the worker cannot be started: {error.strerror}")
                return
        self._child, self._process = child, Process.of(child.pid)
        self._members, self._census_at = (), 0.0
        self._started = self.monotonic()
        remember(self._record, self._process)
        logger.info("started the worker, process %d", child.pid)

    def _end(self) -> None:
        child, process = self._child, self._process
        if child is None or process is None:
            return
        end_family(process, known=self._members, reap=child.poll)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)

    def _gone(self, why: str) -> None:
        """The child is gone: note why, whom it hurt, and when to try again."""
        self._child = self._process = None
        self._record.unlink(missing_ok=True)
        tail = last_words_in(self._log, since=self._said_from)
        self._last_reason = f"{why}{': ' + tail if tail else ''}"
        self._failures += 1
        self.note_loss()
        self._not_before = self.monotonic() + self.backoff.delay(self._failures - 1, self.rng)
        logger.warning("%s", self._last_reason)


def check_started(launcher: LocalLauncher, *, within_s: float) -> float:
    """Start the worker once and wait until it is ready, for `minga node doctor`. Blocking.

    Returns:
        Seconds that it took.

    Raises:
        WorkerError: it ended, or was not ready in time.
    """

    async def run() -> float:
        began = launcher.monotonic()
        launcher._start()
        try:
            while True:
                health = launcher._health()
                why = verdict(health, start_within_s=within_s, hangs_after_s=within_s)
                if why is not None:
                    last = last_words_in(launcher._log, since=launcher._said_from)
                    raise WorkerError(f"{why}: {last}" if last else why)
                if health.ready:
                    return launcher.monotonic() - began
                await asyncio.sleep(0.1)
        finally:
            await launcher.close()

    return asyncio.run(run())
