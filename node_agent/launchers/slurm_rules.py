"""What to do about an allocation: pure functions of what Slurm says and what was asked for.

    none --wanted--> handed in --job id--> queued --starts--> running --ends--> none
             |                                |                  |
             '- crash before the id: the      |                  '-- idle: drained; silent: its step
                queue is asked by the name    |                      is killed
                                              '-- too late: kept or cancelled, by config.toml

``decide`` answers with one action and one line on why or on what is waited for. ``read_queue`` and
``read_accounts`` take what ``squeue --json`` and ``sacct --json`` print, of Slurm 22.05 and newer:
since 23.02 a state is a list and a time may be an object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from protocols.errors import MalformedMessageError

QUEUED: Final = frozenset(
    (
        "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
    )
)  # fmt: skip
RUNNING: Final = frozenset(
    ("RUNNING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "COMPLETING")
)
LOST_BY_SITE: Final = frozenset(("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REVOKED"))
SETTLE_S: Final = 30.0  # until the queue certainly shows a job that was handed in
WAITS_KEPT: Final = 20  # queue waits that are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSeen:
    """A job as Slurm shows it."""

    job: int
    name: str
    comment: str
    state: str  # the base state: "PENDING", "RUNNING", "CANCELLED", …
    reason: str  # why it waits, in Slurm's words; empty: not said
    submitted: float | None  # unix seconds
    starts: float | None  # unix seconds: when it started, or is expected to; None: not known
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What the node remembers of the allocation that it asked for; durable before sbatch runs."""

    nonce: str
    name: str
    intended_at: float  # unix seconds
    job: int | None = None  # None: handed in, or about to be; the id is not known yet
    queued_at: float | None = None  # unix seconds; of the last time it waited in the queue
    started_at: float | None = None  # unix seconds; None: it has not run yet
    served: bool = False  # a worker in it was ready once
    asked_to_end: str = ""  # why this node cancelled or drained it; empty: it did not
    missed: int = 0  # rounds that were over before it started


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that one decision rests on."""

    now: float  # unix seconds
    allocation: Allocation | None
    seen: JobSeen | None  # None: the queue does not show it
    asked: bool  # whether the queue has answered since the allocation was noted
    wanted: bool  # a job waits for a worker or is being done, and its time is not over
    expected: bool  # a job will follow soon
    held: str = ""  # why nothing is handed in until a person says so
    resting_s: float = 0.0  # until the next submission, after a failure
    worker_ready: bool = False
    silent_s: float = 0.0  # since the worker's last sign of life, or since it was started
    idle_s: float = 0.0  # since a job was last wanted
    killed_step: bool = False  # the current step was told to end before
    idle_release_s: float
    start_within_s: float
    hangs_after_s: float
    keep_late: bool


ActionName = Literal["wait", "submit", "adopt", "cancel", "drain", "kill_step", "settle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to do, and why or what is waited for."""

    action: ActionName
    why: str


def _answer(action: ActionName, why: str) -> Answer:
    return Answer(action=action, why=why)


def decide(f: Facts) -> Answer:
    """The next action about the allocation."""
    a = f.allocation
    if a is None:
        return _without_one(f)
    if not f.asked:
        return _answer("wait", f"asking Slurm about {_called(a)}")
    if f.seen is None:
        return _while_unseen(f, a)
    if a.job is None:
        return _answer("adopt", f"Slurm job {f.seen.job} is this node's")
    if f.seen.state in QUEUED:
        if not (f.wanted or f.expected or a.asked_to_end or f.keep_late):
            return _answer("cancel", "nothing is left to do for it")
        return _answer("wait", waiting_line(a, f.seen, f.now))
    if f.seen.state not in RUNNING:
        return _answer("settle", f"{_called(a)} ended: {f.seen.state}")
    return _while_running(f, a)


def _without_one(f: Facts) -> Answer:
    if f.held:
        return _answer("wait", f.held)
    if not (f.wanted or f.expected):
        return _answer("wait", "asleep")
    if f.resting_s > 0:
        return _answer("wait", f"another allocation is asked for in {f.resting_s:.0f} s")
    return _answer("submit", "asking Slurm for an allocation")


def _while_unseen(f: Facts, a: Allocation) -> Answer:
    """The queue answered and does not show the job: it is very new, or it is over."""
    fresh = f.now - (a.queued_at or a.intended_at) < SETTLE_S and a.started_at is None
    if fresh:
        return _answer("wait", f"looking for {_called(a)} in the queue")
    if a.job is None:
        return _answer("settle", f"{a.name} was never handed in")
    return _answer("settle", f"Slurm does not know {_called(a)} any more")


def _while_running(f: Facts, a: Allocation) -> Answer:
    if a.asked_to_end:
        return _answer("wait", f"{_called(a)} is ending: {a.asked_to_end}")
    if f.idle_s >= f.idle_release_s and not (f.wanted or f.expected):
        return _answer("drain", f"it had nothing to do for {f.idle_s:.0f} s")
    limit = f.hangs_after_s if f.worker_ready else f.start_within_s
    if f.silent_s >= limit and not f.killed_step:
        what = "gave no sign of life for" if f.worker_ready else "was not ready after"
        return _answer("kill_step", f"the worker {what} {f.silent_s:.0f} s")
    ready = "serving" if f.worker_ready else "starting its worker"
    return _answer("wait", f"{_called(a)} is running, {ready}")


def _called(a: Allocation) -> str:
    return f"Slurm job {a.job}" if a.job is not None else f"the Slurm job {a.name}"


# -- how long ------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3 h 05 min``."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def queued_for(a: Allocation, now: float) -> float:
    """Seconds in the queue so far."""
    return max(0.0, now - (a.queued_at or a.intended_at))


def waiting_line(a: Allocation, seen: JobSeen | None, now: float) -> str:
    """What a queued job waits for; its first 64 characters are what a heartbeat carries."""
    reason = seen.reason if seen is not None and seen.reason not in ("", "None") else ""
    line = f"queued in Slurm for {span(queued_for(a, now))}"
    line += f" ({reason})" if reason else ""
    line += f", job {a.job}" if a.job is not None else ""
    if seen is not None and seen.starts is not None and seen.starts > now:
        line += f", expected to start at {datetime.fromtimestamp(seen.starts, UTC):%d.%m. %H:%M}Z"
    return line


def waits_line(waits: Sequence[float]) -> str:
    """What earlier allocations waited: what a plan's deadline has to allow for."""
    if not waits:
        return "no allocation has been through the queue yet"
    ordered = sorted(waits)
    median = ordered[math.ceil(len(ordered) / 2) - 1]
    return (
        f"the last {len(ordered)} allocations waited {span(median)} (median),"
        f" at most {span(ordered[-1])}, in the queue"
    )


def why_not_join(
    a: Allocation | None, seen: JobSeen | None, *, now: float, round_s: float
) -> str | None:
    """Why a round should not be joined while the job is queued; None: it may be joined.

    A node that joins and never trains makes the others wait for the deadline. With an estimate of
    the start, half of the round must be left for training; without one the node tries once.

    Args:
        a: the allocation.
        seen: what the queue shows of it.
        now: unix seconds.
        round_s: from joining to the end of training, in seconds.
    """
    if a is None or seen is None or seen.state not in QUEUED:
        return None
    if seen.starts is not None and seen.starts > now:  # Slurm's estimate
        if seen.starts - now > round_s / 2:
            return f"{waiting_line(a, seen, now)}: too late for a round of {span(round_s)}"
        return None
    if a.missed:
        rounds = "a round was" if a.missed == 1 else f"{a.missed} rounds were"
        return f"{waiting_line(a, seen, now)}: {rounds} over before it started"
    return None


# -- how it ended ----------------------------------------------------------------------------------

EndKind = Literal["released", "walltime", "site", "person", "failed", "never", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How an allocation ended."""

    kind: EndKind
    sentence: str
    loss: bool  # counts against the jobs that were under way


def how_it_ended(a: Allocation, state: str | None, ends: Sequence[WorkerEnd]) -> Ended:
    """What became of an allocation.

    Args:
        a: as the node remembers it.
        state: Slurm's last word; None: Slurm does not know the job any more.
        ends: of the worker in that job, as the batch script wrote them down, oldest first.
    """
    if a.job is None:
        return Ended(kind="never", sentence=f"{a.name} was never handed in", loss=False)
    job, last = f"Slurm job {a.job}", ends[-1] if ends else None
    state = state or ("COMPLETED" if last is not None and last.status == 0 else None)
    why = last.why if last is not None else ""
    if a.asked_to_end:
        return Ended(kind="released", sentence=f"{job} ended: {a.asked_to_end}", loss=False)
    if state == "CANCELLED":
        sentence = (
            f"somebody cancelled {job} (scancel); what was trained is kept."
            " `minga node resume` lets the node ask for another one"
        )
        return Ended(kind="person", sentence=sentence, loss=False)
    if state == "TIMEOUT" or (state == "COMPLETED" and why == "walltime"):
        return Ended(kind="walltime", sentence=f"{job} reached its time limit", loss=not a.served)
    if state in LOST_BY_SITE:
        return Ended(kind="site", sentence=f"{job} was taken away: {state}", loss=False)
    if state == "COMPLETED":
        told = {"agent": "no agent was seen for long", "superseded": "another one serves"}.get(why)
        sentence = f"{job} ended: {told or 'the worker left'}"
        return Ended(kind="released", sentence=sentence, loss=not a.served)
    if state is None:
        return Ended(kind="unknown", sentence=f"{job} is gone; Slurm knows no more", loss=True)
    status = f", the worker's status {last.status}" if last is not None else ""
    return Ended(kind="failed", sentence=f"{job} ended as {state}{status}", loss=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnd:
    """One line of ``spool/slurm/ends``."""

    job: int
    restarts: int
    attempt: int
    status: int
    why: str  # "none", or what is in the drain file


def read_ends(text: str, job: int) -> tuple[WorkerEnd, ...]:
    """The ends of the worker in one job; lines that are torn or of others are left out."""
    found = []
    for line in text.split("\n")[:-1]:
        words = line.split()
        if len(words) != 5 or not all(word.isascii() and word.isdigit() for word in words[:4]):
            continue
        numbers = [int(word) for word in words[:4]]
        if numbers[0] == job:
            of, restarts, attempt, status = numbers
            found.append(
                WorkerEnd(job=of, restarts=restarts, attempt=attempt, status=status, why=words[4])
            )
    return tuple(found)


# -- what Slurm says -------------------------------------------------------------------------------


def find(jobs: Sequence[JobSeen], a: Allocation) -> JobSeen | None:
    """This allocation among the jobs of the queue: by its id, else by the name with its nonce."""
    if a.job is not None:
        return next((job for job in jobs if job.job == a.job), None)
    named = [job for job in jobs if a.name in (job.name, job.comment)]
    return max(named, key=lambda job: job.job, default=None)


def _state(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("current")
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str) or not value.strip():
        raise MalformedMessageError(f"Slurm shows a job without a state: {value!r:.80}")
    return value.split()[0].rstrip("+").upper()  # "CANCELLED by 1000" in some versions


def _time(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("number") if value.get("set") else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return None
    return float(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):  # sacct: {"administrator": …, "job": …, "system": …}
        value = value.get("job")
    return " ".join(value.split())[:200] if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _jobs(data: bytes, what: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"{what} did not answer with JSON: {error!s:.100}") from None
    jobs = value.get("jobs") if isinstance(value, dict) else None
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise MalformedMessageError(f"{what} did not answer with a list of jobs")
    return jobs


def read_queue(data: bytes) -> tuple[JobSeen, ...]:
    """What ``squeue --json`` printed.

    Raises:
        MalformedMessageError: not JSON, or a job in it has no id or no state.
    """
    found = []
    for job in _jobs(data, "squeue"):
        number = job.get("job_id")
        if not isinstance(number, int) or isinstance(number, bool):
            raise MalformedMessageError("Slurm shows a job without a number")
        found.append(
            JobSeen(
                job=number,
                name=_text(job.get("name")),
                comment=_text(job.get("comment")),
                state=_state(job.get("job_state")),
                reason=_text(job.get("state_reason")),
                submitted=_time(job.get("submit_time")),
                starts=_time(job.get("start_time")),
                restarts=_count(job.get("restart_cnt")),
            )
        )
    return tuple(found)


def read_accounts(data: bytes, job: int) -> str | None:
    """The state of one job in what ``sacct --json`` printed; None: it is not there.

    Raises:
        MalformedMessageError: not JSON, or the job has no state.
    """
    for entry in _jobs(data, "sacct"):
        if entry.get("job_id") == job:
            return _state(entry.get("state"))
    return None
