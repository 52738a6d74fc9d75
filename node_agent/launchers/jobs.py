"""What every launcher knows about jobs: those that were asked for, and how far each one is.

A launcher keeps a worker alive that serves a spool. Where that worker runs (a child process here,
an allocation of Slurm elsewhere) is what subclasses differ in; the jobs and their answers are files
and look the same from the agent's side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from pydantic import ValidationError

from node_agent.decide import Work
from node_agent.rules import Refusal
from node_agent.spool import (
    Job,
    Result,
    Spool,
    forget_job,
    forget_run,
    last_status,
    parse_job_id,
    read_job,
    request_cancel,
    request_finish,
    write_job,
)
from protocols.canonical import parse_json
from protocols.errors import MalformedMessageError, WorkerError
from protocols.identifiers import RoundId, RunId
from protocols.plan import Plan

GIVE_UP: Final = 3  # losses of the worker under one job


@dataclass(slots=True, kw_only=True)
class Launcher:
    """One spool, the jobs in it, and whoever serves it."""

    spool: Spool
    finish_within_s: float = 300.0  # patience with a worker that was asked to finish a job
    monotonic: Callable[[], float] = time.monotonic
    _wanted: dict[str, Job] = field(default_factory=dict)
    _lost_under: dict[str, int] = field(default_factory=dict)
    _last_reason: str = ""
    _to_finish: dict[str, float] = field(default_factory=dict)  # since when, monotonic seconds

    # -- jobs ------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Ask for a job; asking again for the same work keeps what is done. Blocking, short."""
        write_job(self.spool, job)
        self._wanted[job.id] = job
        self._to_finish.pop(job.id, None)

    def cancel(self, name: str) -> None:
        """Withdraw a job: nothing of it is wanted."""
        self._wanted.pop(name, None)
        self._to_finish.pop(name, None)
        if self.spool.job(name).exists():
            request_cancel(self.spool, name)

    def finish(self, name: str) -> None:
        """Ask for what a job has done so far; withdraw it if nothing can be done yet. Blocking.

        Also a job of an earlier agent: the worker takes it up where it was put away.
        """
        try:
            job = read_job(self.spool.job(name))
            begun = last_status(self.spool, name) is not None
        except (OSError, MalformedMessageError):
            begun = False
        if not begun or job.select == "none":
            self.cancel(name)
            return
        request_finish(self.spool, name)
        self._wanted[name] = job
        self._to_finish.setdefault(name, self.monotonic())

    def unfinished(self, run: RunId, before: int) -> tuple[tuple[RoundId, Work], ...]:
        """Jobs of earlier rounds of a run that a worker is on, or may take up; oldest first."""
        found = []
        for entry in self._jobs():
            round_ = _round_of(entry)
            if round_ is None or round_.run != run or round_.number >= before:
                continue
            work = self.work(entry.removesuffix(".json"))
            if work.state == "running" or work.left_over:
                found.append((round_, work))
        return tuple(sorted(found, key=lambda each: each[0].number))

    def _jobs(self) -> list[str]:
        try:
            with os.scandir(self.spool.jobs) as entries:
                return [entry.name for entry in entries if entry.name.endswith(".json")]
        except FileNotFoundError:
            return []

    def forget(self, name: str) -> None:
        """Remove a job and what it produced. Blocking."""
        self._wanted.pop(name, None)
        self._to_finish.pop(name, None)
        self._lost_under.pop(name, None)
        forget_job(self.spool, name)

    def forget_run(self, run: RunId) -> None:
        """Remove all that the worker keeps of a run. Blocking."""
        for name, job in list(self._wanted.items()):
            if job.run == run:
                self.forget(name)
        forget_run(self.spool, run)

    def work(self, name: str) -> Work:
        """How far a job is. Whatever the worker wrote, the answer is one clear state."""
        work = self._how_far(name)
        since = self._to_finish.get(name)
        if work.state != "running" or since is None:
            return work
        overdue = self.monotonic() - since >= self.finish_within_s
        return replace(work, finishing="overdue" if overdue else "asked")

    def _how_far(self, name: str) -> Work:
        if self.spool.result(name).exists():
            return Work(state="finished")
        if name not in self._wanted:  # also after a restart of the agent: it is asked for again
            return Work(state="none", left_over=self._is_left_over(name))
        lost = self._lost_under.get(name, 0)
        if lost >= GIVE_UP:
            sentence = f"the worker was lost {lost} times under this job: {self._last_reason}"
            return Work(state="failed", refusal=Refusal("worker.lost", sentence))
        try:
            last = last_status(self.spool, name)
        except MalformedMessageError as error:
            broken = Refusal("worker.garbage", f"the worker's status cannot be read: {error}")
            return Work(state="failed", refusal=broken)
        if last is None:
            return Work(state="running")
        if last.event == "failed":
            code = last.code or "worker.failed"
            return Work(state="failed", refusal=Refusal(code, last.message or "no reason given"))
        if last.event == "cancelled":
            return Work(state="failed", refusal=Refusal("worker.cancelled", "it was withdrawn"))
        return Work(
            state="running",
            step=last.step or 0,
            max_steps=last.max_steps or 0,
            tokens=last.tokens or 0,
        )

    def _is_left_over(self, name: str) -> bool:
        """Whether an earlier agent handed in this job and a worker may still take it up."""
        if not self.spool.job(name).exists() or self.spool.cancel(name).exists():
            return False
        try:
            last = last_status(self.spool, name)
        except MalformedMessageError:
            return True
        return last is None or last.event not in ("failed", "cancelled")

    def under_way(self) -> list[tuple[RoundId, Work]]:
        """The jobs that are being worked on or wait for the worker."""
        found = [(job.round_id, self.work(name)) for name, job in list(self._wanted.items())]
        return [(round_, work) for round_, work in found if work.state == "running"]

    def result(self, name: str) -> Result:
        """The result of a job that was checked before; its bytes are not hashed again.

        Raises:
            WorkerError: it is gone or cannot be read.
        """
        try:
            return Result.model_validate(parse_json(self.spool.result(name).read_bytes()))
        except (OSError, MalformedMessageError, ValidationError):
            raise WorkerError(f"the result of {name} is gone or cannot be read") from None

    def note_loss(self) -> None:
        """The worker is gone: every job that it may have been on counts one loss."""
        for name in list(self._wanted):
            if self.work(name).state == "running":
                self._lost_under[name] = self._lost_under.get(name, 0) + 1

    # -- what subclasses do ----------------------------------------------------------------------

    @property
    def state(self) -> str:
        """One line for `minga node status`."""
        raise NotImplementedError

    def expect(self) -> None:
        """A job will follow soon: a round was joined."""

    def refusal(self, plan: Plan) -> Refusal | None:
        """Why the node should not join a round of this plan now; None: it may."""
        return None

    def clear_leftovers(self) -> str | None:
        """Look for what an earlier agent left behind. Blocking.

        Returns:
            One sentence if there was something.
        """
        raise NotImplementedError

    async def tick(self) -> None:
        """Look at the worker and take one step."""
        raise NotImplementedError

    async def close(self) -> None:
        """The agent ends. Jobs stay in the spool and go on with the next one."""
        raise NotImplementedError


def _round_of(entry: str) -> RoundId | None:
    """Whose job a file is; None: nobody's, as a file on its way to its name."""
    try:
        return parse_job_id(entry.removesuffix(".json"))
    except MalformedMessageError:
        return None
