"""The worker in an allocation of Slurm; the agent on a login node, the spool on a shared disk.

    agent (login node)                                  allocation (compute nodes)
      tick: squeue -> slurm_rules.decide -> sbatch, scancel
      spool/jobs/…            ---- shared disk ---->    worker: takes jobs, answers
      spool/slurm/agent       ---- still here ----->    batch script: ends when nobody is
      spool/slurm/ends, out/… <--- answers ---------

One allocation serves many rounds. What is needed to find it again is durable before sbatch runs
(``spool/slurm/allocation.json``): an agent that is killed at any instant, and started again, adopts
its job or finds that there is none. Only one allocation at a time may serve the spool, whatever
happens: see ``slurm_script``. All connections are the agent's; compute nodes need no way out.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Final

from node_agent.client import Backoff
from node_agent.decide import Work
from node_agent.launchers.jobs import Launcher
from node_agent.launchers.last_words import last_words_in, start_line
from node_agent.launchers.slurm_commands import Slurm, SlurmBusyError, SlurmError
from node_agent.launchers.slurm_config import LauncherConfig
from node_agent.launchers.slurm_rules import (
    QUEUED,
    RUNNING,
    WAITS_KEPT,
    Allocation,
    Answer,
    Facts,
    JobSeen,
    WorkerEnd,
    decide,
    find,
    how_it_ended,
    queued_for,
    read_ends,
    span,
    waiting_line,
    waits_line,
    why_not_join,
)
from node_agent.launchers.slurm_script import Marks, job_name, write_script
from node_agent.rules import Refusal
from node_agent.spool import atomic_write, request_drain
from protocols.canonical import parse_json
from protocols.errors import ConfigurationError, MalformedMessageError
from protocols.plan import Plan

logger = logging.getLogger(__name__)
_BEAT_S: Final = 5.0  # between two touches of the agent's mark
_LOGS_KEPT: Final = 10
_TICK_S: Final = 0.5  # the longest that a tick waits for Slurm


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What outlives an agent."""

    allocation: Allocation | None = None
    waits: tuple[float, ...] = ()  # seconds that allocations waited in the queue, oldest first


def read_memory(path: Path) -> Memory:
    """The memory on disk; an empty one where there is none or it cannot be read.

    A lost memory loses an allocation, never two at work: the next one has another nonce.
    """
    try:
        value: Any = parse_json(path.read_bytes())
        held = value["allocation"]
        return Memory(
            allocation=Allocation(**held) if held is not None else None,
            waits=tuple(float(wait) for wait in value["waits"]),
        )
    except FileNotFoundError:
        return Memory()
    except (OSError, MalformedMessageError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return Memory()


@dataclass(slots=True, kw_only=True)
class SlurmLauncher(Launcher):
    """One allocation at a time, and its spool."""

    config: LauncherConfig
    institution: str
    worker: tuple[str, ...]  # module and arguments, after ``python -m``
    ranks: int  # processes on each node
    environment: Mapping[str, str] = field(repr=False)  # for the worker
    slurm: Slurm = field(default_factory=Slurm.here)
    start_within_s: float
    hangs_after_s: float
    rng: Random
    backoff: Backoff = field(default_factory=lambda: Backoff(first_s=5.0, cap_s=300.0))
    now: Callable[[], float] = time.time  # unix seconds
    nonce: Callable[[], str] = lambda: os.urandom(5).hex()
    beat_s: float = 15.0  # of the batch script
    _step_under_way: asyncio.Task[None] | None = None
    _memory: Memory | None = None  # None: not read yet
    _seen: JobSeen | None = None
    _asked: bool = False
    _final: str | None = None  # what accounting said of a job that left the queue
    _why: str = "asleep"
    _trouble: str = ""  # of Slurm's commands
    _poll_at: float = 0.0
    _beat_at: float = 0.0
    _life: tuple[Any, ...] = ()  # what changes while the worker lives
    _life_at: float = 0.0
    _wanted_at: float = 0.0
    _expected_until: float = 0.0
    _failures: int = 0
    _not_before: float = 0.0
    _killed: tuple[int, int] | None = None  # job and step
    _counted: int = 0  # bad ends of the worker that were counted
    _late: dict[str, str] = field(default_factory=dict)  # what a job waited for when time was over
    _late_counted: set[str] = field(default_factory=set)

    # -- what the agent asks ---------------------------------------------------------------------

    @property
    def marks(self) -> Marks:
        """Files between the agent and the batch script."""
        return Marks(self.spool.root / "slurm")

    @property
    def held(self) -> str:
        """Why nothing is handed in until a person says so; empty: nothing is held."""
        try:
            return self.marks.held.read_text("utf-8").strip()
        except OSError:
            return ""

    @property
    def waits(self) -> tuple[float, ...]:
        """Seconds that earlier allocations waited in the queue, oldest first."""
        return self._remembered().waits

    @property
    def state(self) -> str:
        """One line for `minga node status`."""
        memory = self._remembered()
        line = f"{self._why}; {self._trouble}" if self._trouble else self._why
        return f"{line}; {waits_line(memory.waits)}" if memory.waits else line

    def expect(self) -> None:
        """A round was joined: ask for the allocation now, so that the queue's wait overlaps."""
        self._wanted_at = self.monotonic()
        self._expected_until = self.monotonic() + self.config.idle_release_s

    def refusal(self, plan: Plan) -> Refusal | None:
        """Why a round should not be joined now."""
        if self.held:
            return Refusal("slurm.cancelled", self.held)
        round_s = plan.deadlines.join + plan.deadlines.train
        allocation = self._remembered().allocation
        why = why_not_join(allocation, self._seen, now=self.now(), round_s=round_s)
        return None if why is None else Refusal("slurm.queue", why)

    def work(self, name: str) -> Work:
        """How far a job is; while the allocation is not there yet, what it waits for."""
        work = super(SlurmLauncher, self).work(name)
        job = self._wanted.get(name)
        if work.state != "running" or job is None:
            return work
        seen = self._seen
        if seen is not None and seen.state in RUNNING:
            return work if work.step else replace(work, waiting="" if self._ready() else self._why)
        if self.held:
            return Work(state="failed", refusal=Refusal("slurm.cancelled", self.held))
        if job.deadline_unix is not None and self.now() >= job.deadline_unix:
            # It stays what it was then: this may end the allocation, and so change what is said.
            found = self._late.get(name) or self._late.setdefault(name, self._waiting())
            sentence = f"the round's time was over while {found}"
            return Work(state="failed", refusal=Refusal("slurm.queue", sentence))
        return replace(work, waiting=self._waiting())

    def clear_leftovers(self) -> str | None:
        """Remember the allocation of an earlier agent: it is adopted, not ended. Blocking."""
        allocation = self._remembered().allocation
        self._wanted_at = self.monotonic()
        if allocation is None:
            return None
        if allocation.job is None:
            return f"looking for the allocation {allocation.name}, which an earlier agent asked for"
        return f"adopted Slurm job {allocation.job} ({allocation.name})"

    async def tick(self) -> None:
        """Look at the allocation and take one step; soon back, even when Slurm does not answer.

        A step that takes long goes on in its thread, one at a time: the rounds of a node must not
        wait for a cluster's controller.
        """
        step = self._step_under_way
        if step is None:
            step = self._step_under_way = asyncio.create_task(asyncio.to_thread(self._tick))
        done, _ = await asyncio.wait({step}, timeout=_TICK_S)
        if done:
            if self._step_under_way is step:  # two may have waited for it
                self._step_under_way = None
            step.result()

    async def close(self) -> None:
        """The agent was told to stop: end the allocation, or leave it, as config.toml says."""
        if self._step_under_way is not None:
            await asyncio.wait({self._step_under_way})
            self._step_under_way = None
        if self.config.on_stop == "cancel":
            await asyncio.to_thread(self._stop)

    # -- one step --------------------------------------------------------------------------------

    def _tick(self) -> None:
        now, memory = self.monotonic(), self._remembered()
        if self.under_way():
            self._wanted_at = now
        if memory.allocation is not None:
            if now >= self._beat_at:
                self._beat_at = now + _BEAT_S
                self.marks.agent.touch()
            if now >= self._poll_at:
                self._poll_at = now + self.config.poll_s
                self._look()
            self._feel()
        facts = self._facts()
        self._count_late()
        answer = decide(facts)
        if answer.why != self._why:
            logger.info("Slurm: %s", answer.why)
        self._why = answer.why
        self._act(answer)

    def _facts(self) -> Facts:
        now, memory = self.monotonic(), self._remembered()
        step = self._step()
        return Facts(
            now=self.now(),
            allocation=memory.allocation,
            seen=self._seen,
            asked=self._asked,
            wanted=bool(self.under_way()),
            expected=now < self._expected_until,
            held=self.held,
            resting_s=max(0.0, self._not_before - now),
            worker_ready=self._ready(),
            silent_s=now - self._life_at,
            idle_s=now - self._wanted_at,
            killed_step=self._killed is not None and self._killed == step,
            idle_release_s=self.config.idle_release_s,
            start_within_s=self.start_within_s,
            hangs_after_s=self.hangs_after_s,
            keep_late=self.config.when_late == "keep",
        )

    def _act(self, answer: Answer) -> None:
        allocation = self._remembered().allocation
        try:
            match answer.action:
                case "wait":
                    pass
                case "submit":
                    self._submit()
                case "adopt" if allocation is not None and self._seen is not None:
                    self._keep(replace(allocation, job=self._seen.job))
                    self._poll_at = 0.0
                case "cancel" if allocation is not None and allocation.job is not None:
                    self._keep(replace(allocation, asked_to_end=answer.why))
                    self.slurm.cancel(allocation.job)
                case "drain" if allocation is not None:
                    self._keep(replace(allocation, asked_to_end=answer.why))
                    request_drain(self.spool)
                case "kill_step" if (step := self._step()) is not None:
                    self.slurm.kill_step(*step)
                    self._killed, self._last_reason = step, answer.why
                case "settle" if allocation is not None:
                    self._settle(allocation)
        except SlurmError as error:
            self._trouble = str(error)
            logger.warning("%s", error)

    # -- looking ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask Slurm about the allocation and note what changed."""
        allocation = self._remembered().allocation
        if allocation is None:
            return
        try:
            self._seen = find(self.slurm.queue(), allocation)
            if self._seen is None and allocation.job is not None:
                self._final = self.slurm.accounts(allocation.job)
        except SlurmError as error:
            self._trouble = str(error)
            return
        self._asked, self._trouble = True, ""
        seen = self._seen
        if seen is None or allocation.job is None:
            return
        if seen.state in RUNNING and allocation.started_at is None:
            waited = queued_for(allocation, seen.starts or self.now())
            memory = self._remembered()
            self._save(
                replace(
                    memory,
                    allocation=replace(allocation, started_at=self.now(), missed=0),
                    waits=(*memory.waits, round(waited, 1))[-WAITS_KEPT:],
                )
            )
            self._life_at = self._wanted_at = self.monotonic()
            logger.info("Slurm job %d started after %s", allocation.job, span(waited))
        elif seen.state in QUEUED and allocation.started_at is not None:
            self._keep(replace(allocation, started_at=None, queued_at=self.now()))

    def _feel(self) -> None:
        """Signs of life: anything that only a living worker changes, by our own clock."""
        allocation, spool = self._remembered().allocation, self.spool
        if allocation is None or allocation.job is None:
            return
        ends = self._ends()
        life = (_mark(spool.alive), _mark(spool.worker), len(ends))
        if life != self._life:
            self._life, self._life_at = life, self.monotonic()
        bad = [end for end in ends if end.status != 0 and end.why == "none"]
        for end in bad[self._counted :]:
            self._counted += 1
            self._last_reason = f"the worker ended with status {end.status}{self._tail(end)}"
            logger.warning("Slurm job %d: %s", allocation.job, self._last_reason)
            self.note_loss()
        if self._ready() and not allocation.served:
            self._keep(replace(allocation, served=True))

    def _ends(self) -> tuple[WorkerEnd, ...]:
        allocation = self._remembered().allocation
        if allocation is None or allocation.job is None:
            return ()
        try:
            text = self.marks.ends.read_text("utf-8", "replace")
        except OSError:
            return ()
        return read_ends(text, allocation.job)

    def _step(self) -> tuple[int, int] | None:
        """Job and number of the step that the worker runs in."""
        allocation, seen = self._remembered().allocation, self._seen
        if allocation is None or allocation.job is None or seen is None:
            return None
        return allocation.job, sum(end.restarts == seen.restarts for end in self._ends())

    def _ready(self) -> bool:
        return self.spool.worker.exists()

    def _count_late(self) -> None:
        """Rounds that were over before the allocation started."""
        allocation = self._remembered().allocation
        queued = allocation is not None and allocation.started_at is None
        for name in list(self._late):  # the agent may have left the round, and forgotten the job
            if name in self._late_counted:
                if name not in self._wanted:
                    self._late_counted.discard(name)
                    self._late.pop(name, None)
                continue
            self._late_counted.add(name)
            if allocation is not None and queued:
                allocation = replace(allocation, missed=allocation.missed + 1)
                self._keep(allocation)

    def _waiting(self) -> str:
        allocation = self._remembered().allocation
        if allocation is None or allocation.asked_to_end:
            return self._why
        return waiting_line(allocation, self._seen, self.now())

    def _tail(self, end: WorkerEnd | None) -> str:
        """What a worker said last, after a colon; None: the job has none that ended."""
        allocation = self._remembered().allocation
        if allocation is None or allocation.job is None:
            return ""
        start = start_line(end.restarts, end.attempt) if end is not None else ""
        last = last_words_in(self.marks.log_of(allocation.job), start=start)
        return f": {last}" if last else ""

    # -- acting ----------------------------------------------------------------------------------

    def script(self, name: str, nonce: str) -> str:
        """The batch script of one allocation.

        Raises:
            ConfigurationError: a path or a name cannot be handed to Slurm.
        """
        return write_script(
            self.config,
            name=name,
            nonce=nonce,
            spool=self.spool.root,
            worker=self.worker,
            ranks=self.ranks,
            environment=self.environment,
            beat_s=self.beat_s,
        )

    def _submit(self) -> None:
        """Write the intent, then hand the script in, then write the job's number."""
        nonce, spool, marks = self.nonce(), self.spool.make(), self.marks
        try:
            name = job_name(self.institution, nonce)
            text = self.script(name, nonce)
        except ConfigurationError as error:
            self._failed(str(error), loss=True)
            return
        marks.root.mkdir(mode=0o700, exist_ok=True)
        for stale in (spool.drain, spool.worker, spool.alive, marks.ends):
            stale.unlink(missing_ok=True)
        self._prune_logs()
        atomic_write(marks.nonce, nonce.encode())
        atomic_write(marks.script, text.encode())
        marks.agent.touch()
        self._seen, self._final, self._asked = None, None, False
        self._killed, self._counted, self._poll_at = None, 0, 0.0
        allocation = Allocation(nonce=nonce, name=name, intended_at=self.now())
        self._keep(allocation)
        try:
            job = self.slurm.submit(marks.script)
        except SlurmBusyError as error:  # it may be in the queue: it is looked for by its name
            self._trouble = str(error)
            return
        except SlurmError as error:
            self._save(replace(self._remembered(), allocation=None))
            self._failed(str(error), loss=True)
            return
        self._keep(replace(allocation, job=job))
        logger.info("handed in Slurm job %d (%s)", job, name)

    def _settle(self, allocation: Allocation) -> None:
        """The allocation is over: note how, and what follows."""
        ends, state = self._ends(), self._seen.state if self._seen else self._final
        ended = how_it_ended(allocation, state, ends)
        tail = self._tail(ends[-1] if ends else None) if ended.kind == "failed" else ""
        if ended.kind == "person":
            atomic_write(self.marks.held, ended.sentence.encode())
        self._save(replace(self._remembered(), allocation=None))
        if ended.kind in ("failed", "unknown", "never") or ended.loss:
            self._failed(ended.sentence + tail, loss=ended.loss and self._counted == 0)
        else:
            logger.warning("%s", ended.sentence)
            self._failures = 0
        self._seen, self._asked, self._final = None, False, None

    def _failed(self, sentence: str, *, loss: bool) -> None:
        self._last_reason = sentence
        if loss:
            self.note_loss()
        self._not_before = self.monotonic() + self.backoff.delay(self._failures, self.rng)
        self._failures += 1
        logger.warning("%s", sentence)

    def _stop(self) -> None:
        allocation = self._remembered().allocation
        if allocation is None:
            return
        self._keep(replace(allocation, asked_to_end="the agent was told to stop"))
        self.marks.nonce.unlink(missing_ok=True)  # whatever scancel can do, it ends by itself
        if allocation.job is None:
            return
        try:
            self.slurm.cancel(allocation.job)
        except SlurmError as error:
            logger.warning("Slurm job %d was not cancelled: %s", allocation.job, error)

    # -- memory ----------------------------------------------------------------------------------

    def _remembered(self) -> Memory:
        if self._memory is None:
            self._memory = read_memory(self.marks.record)
        return self._memory

    def _keep(self, allocation: Allocation) -> None:
        self._save(replace(self._remembered(), allocation=allocation))

    def _save(self, memory: Memory) -> None:
        self.marks.root.mkdir(parents=True, mode=0o700, exist_ok=True)
        text = json.dumps(asdict(memory), sort_keys=True, allow_nan=False)
        atomic_write(self.marks.record, text.encode())
        self._memory = memory

    def _prune_logs(self) -> None:
        logs = sorted(self.marks.root.glob("job-*.log"), key=lambda path: path.stat().st_mtime)
        for old in logs[:-_LOGS_KEPT]:
            with suppress(OSError):
                old.unlink()


def _mark(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
