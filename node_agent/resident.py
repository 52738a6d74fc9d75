"""The life of a worker: take jobs from the spool, answer each, leave when told.

    start -> lock the spool -> ready (worker.json) -> job, job, ... -> leave (exit 0)
                                                       |
       done | failed | cancelled  : go on with the next job
       interrupted                : SIGTERM, drain, or the agent is gone; the job stays

No torch here: the training worker and the Flower host live the same life and differ in what they
do with a job. A job that cannot be read or done is answered with a code and one sentence, and the
worker goes on; only what leaves the process in doubt (see ``fatal``) ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from node_agent.spool import (
    FINAL_EVENTS,
    Job,
    Result,
    Spool,
    StatusWriter,
    WorkerInfo,
    atomic_write,
    last_status,
    read_job,
)
from protocols.errors import FederationError, MalformedMessageError, WorkerError

POLL_S: Final = 0.2  # between two looks into the jobs folder
PULSE_S: Final = 1.0  # between two touches of ``alive``
GRACE_S: Final = 20.0  # from losing the parent to leaving without asking


class JobFailedError(Exception):
    """The job cannot be done; the code and the sentence go into status.jsonl."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class JobCancelledError(Exception):
    """The agent withdrew the job."""


class JobInterruptedError(Exception):
    """The process is told to leave; the job stays in the spool and is resumed later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Time, as an argument: tests hand in their own."""

    now: Callable[[], float] = time.time  # unix seconds
    monotonic: Callable[[], float] = time.monotonic  # seconds
    sleep: Callable[[float], None] = time.sleep


# -- why to leave --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """Another process, told apart from a later one with the same number by its start time."""

    pid: int
    started: str  # field 22 of /proc/<pid>/stat; empty where there is no /proc

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, _stat(pid)[1])

    def lives(self) -> bool:
        """Whether it still runs; a zombie does not."""
        if not Path("/proc/self/stat").exists():
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                return True
            return True
        state, started, _parent = _stat(self.pid)
        return state not in ("", "Z", "X") and started == self.started


def _stat(pid: int) -> tuple[str, str, int]:
    """State, start time and parent of a process; ("", "", 0) when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "", "", 0
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and parentheses
    return fields[0], fields[19], int(fields[1])


def launching_parent(*, through_launcher: bool) -> int:
    """The process that started us: our parent, or its parent when that is only torchrun."""
    parent = os.getppid()
    return (_stat(parent)[2] or parent) if through_launcher else parent


class Stop:
    """Whether this process should end, and why. Asked between jobs and before each step."""

    def __init__(self, spool: Spool, *, watched: tuple[Process, ...] = ()) -> None:
        self._drain = spool.drain
        self._watched = watched
        self._told = ""  # set by a signal handler or by the pulse

    def install(self) -> None:
        """Leave politely on SIGTERM and SIGINT. A plain assignment is all a handler does."""

        def told(number: int, _frame: Any) -> None:
            self._told = signal.Signals(number).name

        signal.signal(signal.SIGTERM, told)
        signal.signal(signal.SIGINT, told)

    def orphaned(self) -> bool:
        """Whether a process we were told to live with is gone."""
        return not all(process.lives() for process in self._watched)

    def tell(self, why: str) -> None:
        """Ask for the end from inside the process."""
        self._told = self._told or why

    def reason(self) -> str:
        """Empty, or why to leave."""
        if self._told:
            return self._told
        return "drain" if self._drain.exists() else ""


class Pulse:
    """A daemon thread: touches ``alive`` and looks whether the agent still lives.

    It runs while the main thread trains or waits in a collective, and is the last resort against
    an orphan: ``grace_s`` after the agent is gone the process ends, whatever it is doing.
    """

    def __init__(self, stop: Stop, *, touch: Path | None, grace_s: float = GRACE_S) -> None:
        self._stop = stop
        self._touch = touch  # None on all ranks but 0
        self._grace_s = grace_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """The first touch happens before this returns."""
        self._beat()
        self._thread.start()

    def close(self) -> None:
        """Stop beating."""
        self._over.set()
        self._thread.join(timeout=2 * PULSE_S)

    def _beat(self) -> None:
        if self._touch is not None:
            # A full disk must not look like a dead worker's last beat: try again next second.
            with contextlib.suppress(OSError):
                self._touch.touch()

    def _run(self) -> None:
        lost_at: float | None = None
        while not self._over.wait(PULSE_S):
            self._beat()
            if not self._stop.orphaned():
                continue
            self._stop.tell("the agent is gone")
            lost_at = time.monotonic() if lost_at is None else lost_at
            if time.monotonic() - lost_at >= self._grace_s:
                print("worker: the agent is gone; leaving without an answer", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)


@contextlib.contextmanager
def locked(spool: Spool, *, wait_s: float, clock: Clock) -> Iterator[None]:
    """Hold the spool: two workers would answer one job twice.

    A predecessor may need a moment to leave, so the lock is waited for.

    Raises:
        WorkerError: another process still holds it after ``wait_s``.
    """
    descriptor = os.open(spool.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        until = clock.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock.monotonic() >= until:
                    raise WorkerError(f"another worker serves the spool {spool.root}") from None
                clock.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)  # releases the lock


# -- one job -------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class JobContext:
    """What the work on one job may ask and say."""

    spool: Spool
    job: Job
    stop: Stop
    clock: Clock
    status: StatusWriter

    def say(self, event: str, **fields: Any) -> None:
        """Append an event to the job's status.jsonl; nobody listens if the job was removed."""
        with contextlib.suppress(FileNotFoundError):
            self.status.event(event, **fields)  # type: ignore[arg-type]

    def withdrawn(self) -> bool:
        """Whether the agent cancelled the job, or removed it."""
        name = self.job.id
        return self.spool.cancel(name).exists() or not self.spool.job(name).exists()

    def to_finish(self) -> bool:
        """Whether no further step is wanted, only the update of those that were done."""
        return self.spool.finish(self.job.id).exists()

    def check(self) -> None:
        """Leave the job if there is a reason.

        Raises:
            JobCancelledError, JobInterruptedError.
        """
        if self.withdrawn():
            raise JobCancelledError
        if why := self.stop.reason():
            raise JobInterruptedError(why)


Work = Callable[[Job, JobContext], Result]


@dataclass(slots=True)
class _Seen:
    """Jobs that need no second look, by name; a rewritten file is another one."""

    answered: dict[str, tuple[int, int]] = field(default_factory=dict)  # mtime_ns, inode

    def waiting(self, spool: Spool) -> Path | None:
        """The oldest job without an answer."""
        found = []
        try:
            entries = list(os.scandir(spool.jobs))
        except FileNotFoundError:
            return None
        for entry in entries:
            if not entry.name.endswith(".json") or entry.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):  # withdrawn while we look
                stat = entry.stat()
                mark = (stat.st_mtime_ns, stat.st_ino)
                if self.answered.get(entry.name) != mark:
                    found.append((stat.st_mtime_ns, entry.name, mark))
        for _, name, mark in sorted(found):
            if _answered(spool, name.removesuffix(".json")):
                self.answered[name] = mark
            else:
                return spool.jobs / name
        return None


def _answered(spool: Spool, name: str) -> bool:
    """Whether a job has its result, or its last word was ``failed`` or ``cancelled``."""
    if spool.result(name).exists():
        return True
    try:
        last = last_status(spool, name)
    except MalformedMessageError:
        return False  # our own file, torn by a crash: the job runs again
    return last is not None and last.event in FINAL_EVENTS


def _answer(path: Path, *, spool: Spool, stop: Stop, clock: Clock, duty: Duty) -> None:
    """Do one job and write its answer. Raises only what must end the process: see Duty."""
    name = path.name.removesuffix(".json")
    status = StatusWriter(spool.status(name), now=clock.now)
    try:
        job = read_job(path)
    except FileNotFoundError:
        return  # withdrawn before we took it
    except MalformedMessageError as error:
        status.event("failed", code="job.malformed", message=str(error))
        return
    context = JobContext(spool=spool, job=job, stop=stop, clock=clock, status=status)
    try:
        context.check()
        context.say("started")
        result = duty.work(job, context)
        context.say("done", **_summary(result))
        atomic_write(spool.result(name), result.to_bytes())
    except JobCancelledError:
        context.say("cancelled")
    except JobInterruptedError as error:
        context.say("interrupted", message=str(error) or None)
    except JobFailedError as error:
        context.say("failed", code=error.code, message=str(error))
    except FederationError as error:
        context.say("failed", code=error.code, message=str(error))
    except Exception as error:
        traceback.print_exc()
        if duty.lost(error):
            last = last_status(spool, name)
            if last is None or last.event not in FINAL_EVENTS:  # else another rank said why
                context.say("interrupted", message=f"another rank is gone: {error}"[:200])
            raise
        text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # a full disk may be the very reason
            context.say("failed", code="worker.crashed", message=text)
        if duty.fatal(error):
            raise


def _summary(result: Result) -> dict[str, Any]:
    """What a finished job says of itself in one line."""
    said: dict[str, Any] = {"step": result.steps, "tokens": result.tokens}
    if result.tokens:
        said["loss"] = result.loss_nats / result.tokens
    if result.seconds:
        said["tokens_per_s"] = result.tokens / result.seconds
    return said


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """What a kind of worker brings to the life they share."""

    info: WorkerInfo  # written to worker.json: it is ready
    work: Work  # does one job; raises the three errors above
    idle: Callable[[], None] = lambda: None  # called about five times a second without a job
    fatal: Callable[[BaseException], bool] = lambda _: False  # is the process in doubt after this?
    lost: Callable[[BaseException], bool] = lambda _: False  # was it another process that died?
    end: Callable[[], None] = lambda: None  # after the last job


def serve(spool: Spool, *, duty: Duty, stop: Stop, clock: Clock) -> str:
    """Answer jobs until told to leave; the spool is locked. Returns why it left."""
    seen = _Seen()
    atomic_write(spool.worker, duty.info.to_bytes())
    try:
        while not (why := stop.reason()):
            path = seen.waiting(spool)
            if path is None:
                duty.idle()
                clock.sleep(POLL_S)
            else:
                _answer(path, spool=spool, stop=stop, clock=clock, duty=duty)
        return why
    finally:
        spool.worker.unlink(missing_ok=True)
        spool.alive.unlink(missing_ok=True)


def live(
    spool: Spool, *, begin: Callable[[], Duty], stop: Stop, clock: Clock, lock_wait_s: float
) -> None:
    """The whole life of the process that answers for a spool.

    ``begin`` may take long (imports, joining the ranks): ``alive`` is touched meanwhile, and
    worker.json appears after it.

    Raises:
        WorkerError: another worker holds the spool.
        Exception: whatever ``begin`` raises, or what ``fatal`` says must end the process.
    """
    with locked(spool, wait_s=lock_wait_s, clock=clock):
        spool.worker.unlink(missing_ok=True)  # a predecessor's, if it was killed
        stop.install()
        pulse = Pulse(stop, touch=spool.alive)
        pulse.start()
        duty = begin()
        try:
            why = serve(spool, duty=duty, stop=stop, clock=clock)
        finally:
            pulse.close()
            spool.alive.unlink(missing_ok=True)  # the pulse may have touched it once more
        print(f"worker: leaving: {why}", file=sys.stderr)
        duty.end()


def end_at_once(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end the process with its status, without Python's own finalization.

    For the ranks of torch.distributed: threads of gloo outlive the process group, and one that
    lets go of a tensor while Python is being finalized aborts the process ("terminate called
    without an active exception"; torch 2.13, on busy machines). torchrun would call that a failed
    rank, though all was done.
    """
    try:
        status = main()
    except Exception:  # noqa: BLE001 - it is printed and ends the process
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(status)


# -- the command line ----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every kind of worker takes."""
    parser.add_argument("--spool", type=Path, required=True, help="directory of jobs and results")
    parser.add_argument(
        "--lock-wait-s", type=float, default=10.0, help="for an earlier worker to leave the spool"
    )
    parser.add_argument(
        "--exit-with-parent",
        action="store_true",
        help="leave when the process that started the worker is gone",
    )
    parser.add_argument(
        "--parent-pid", type=int, default=None, help="that process, where it is not our parent"
    )
    parser.add_argument(
        "--python-path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where a plan's Flower ClientApp may be imported from; may be given again",
    )
    parser.add_argument(
        "--node-config",
        default="",
        metavar="'KEY=VALUE ...'",
        help="node_config of the Flower Context, in Flower's own notation",
    )


def watched(options: argparse.Namespace, *, through_launcher: bool) -> tuple[Process, ...]:
    """The processes whose end is ours too.

    Under torchrun both torchrun and whoever started it count: without either nobody would collect
    the ranks.
    """
    if not options.exit_with_parent:
        return ()
    named = options.parent_pid or launching_parent(through_launcher=through_launcher)
    return tuple(Process.of(pid) for pid in dict.fromkeys((os.getppid(), named)))
