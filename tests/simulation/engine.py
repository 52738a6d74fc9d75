"""One thread, one clock, one seed: an event loop in which processes live and die.

Time stands still while code runs and jumps to the next timer when nothing is left to do, so hours
cost milliseconds. What the code hands to threads runs at once, in this thread. A *process* is a
name that tasks inherit through a context variable: killing it cancels its tasks and makes whatever
they still try to write raise ``KilledError``, which nothing catches. It may be killed between any
two writes that reach the disk (``durable``), and its disk may be full.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import sqlalchemy as sa

EPOCH = datetime(2026, 3, 1, 12, tzinfo=UTC)
PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class KilledError(BaseException):
    """The process died at this instruction. Not an ``Exception``: nobody handles it."""


class StuckError(Exception):
    """Nothing will ever happen again."""


@dataclass(eq=False, slots=True)
class Process:
    """A process of the simulation."""

    name: str
    loop: Loop
    on_death: Callable[[Process], None]
    skew: timedelta = timedelta()  # its wall clock minus the true one
    dead: bool = False
    fuse: int | None = None  # writes until it is killed
    full: bool = False  # its disk
    writes: int = 0
    refused: int = 0  # writes that a full disk refused
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    def now(self) -> datetime:
        """Its wall clock, UTC."""
        return EPOCH + timedelta(seconds=self.loop.time()) + self.skew

    def context(self) -> contextvars.Context:
        """In which its tasks run."""
        made = contextvars.copy_context()
        made.run(PROCESS.set, self)
        return made

    def spawn(self, coroutine: Any, name: str = "") -> asyncio.Task[Any]:
        """Start a task of this process."""
        return self.loop.create_task(coroutine, name=name or self.name, context=self.context())

    def kill(self) -> None:
        """SIGKILL: nothing of it happens any more."""
        if self.dead:
            return
        self.dead = True
        for task in self.tasks:
            task.cancel()
        self.tasks.clear()
        self.on_death(self)


class _Future(asyncio.Future):  # type: ignore[type-arg]
    """Its hash is its number: sets of futures are walked in the same order in every play."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class _Task(asyncio.Task):  # type: ignore[type-arg]
    """Likewise."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class Loop(asyncio.BaseEventLoop):
    """Virtual time, no threads, no sockets."""

    def __init__(self, rng: Random, *, jitter: float = 0.0) -> None:
        super().__init__()
        self._virtual = 0.0
        self._made = 0  # futures and tasks
        self._selector = self
        self._clock_resolution = 1e-6
        self._rng = rng
        self._jitter = jitter  # chance that a thread takes its time
        self.set_task_factory(self._make_task)
        self.failures: list[str] = []
        self.set_exception_handler(self._failed)

    # -- time --------------------------------------------------------------------------------

    def time(self) -> float:
        return self._virtual

    def select(self, timeout: float | None) -> list[Any]:
        """In place of a selector: nobody calls from outside, so time jumps."""
        if timeout is None:
            raise StuckError("nothing is scheduled")
        self._virtual += timeout
        return []

    def _process_events(self, _events: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...

    def add_signal_handler(self, _sig: int, _callback: Any, *_args: Any) -> None:
        """Nobody sends signals here."""

    # -- tasks -------------------------------------------------------------------------------

    def create_future(self) -> Any:
        made: Any = _Future(loop=self)
        self._made += 1
        made.number = self._made
        return made

    def _make_task(self, loop: Any, coro: Any, context: Any = None) -> asyncio.Task[Any]:
        process = PROCESS.get() if context is None else context.get(PROCESS)
        # Its first step is scheduled and run later; its hash is asked for at once.
        self._made += 1
        _Task.number = self._made
        task: Any = _Task(coro, loop=loop, context=context)
        task.number = self._made
        if process is not None:
            if process.dead:
                task.cancel()
            elif len(process.tasks) > 400:
                process.tasks[:] = [each for each in process.tasks if not each.done()]
            process.tasks.append(task)
        return task

    def _failed(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, KilledError | asyncio.CancelledError | None):
            self.failures.append(f"{context['message']}: {error!r}")

    def run_in_executor(self, _executor: Any, func: Any, *args: Any) -> Any:
        """At once, or a little later; in this thread either way."""
        future = self.create_future()
        process = PROCESS.get()

        def work() -> None:
            if process is not None and process.dead:
                return  # whoever waits is being cancelled
            try:
                result = func(*args)
            except KilledError:
                return
            except BaseException as error:  # noqa: BLE001 - whatever it is, a thread hands it on
                if not future.cancelled():
                    future.set_exception(error)
                    future.exception()  # retrieved: its task may have been cancelled
            else:
                if not future.cancelled():
                    future.set_result(result)

        if self._jitter and self._rng.random() < self._jitter:
            self.call_later(self._rng.random() * 0.03, work)
        else:
            work()
        return future


# -- what reaches the disk -------------------------------------------------------------------------


def durable(*, grows: bool = True) -> OSError | None:
    """A write of this process is about to reach the disk; an error: the disk is full.

    Raises:
        KilledError: it does not, because the process is killed first.
    """
    process = PROCESS.get()
    if process is None:
        return None
    if process.dead:
        raise KilledError
    process.writes += 1
    if process.fuse is not None:
        process.fuse -= 1
        if process.fuse <= 0:
            process.kill()
            raise KilledError
    if process.full and grows:
        process.refused += 1
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def _sync(_descriptor: int) -> None:
    error = durable()
    if error is not None:
        raise error


_replace = Path.replace
_changes: dict[int, int] = {}


def _renamed(self: Path, target: Any) -> Path:
    durable(grows=False)
    return _replace(self, target)


def _before_commit(connection: sa.Connection) -> None:
    if PROCESS.get() is None:
        return
    raw = connection.connection.dbapi_connection
    info = connection.info
    changes = raw.total_changes  # type: ignore[union-attr]
    if changes == info.get("changes", 0):
        return  # it only read
    error = durable()
    if error is not None:
        full = sqlite3.OperationalError("database or disk is full")
        full.sqlite_errorname = "SQLITE_FULL"
        info["changes"] = changes  # what is rolled back has been counted
        raise sa.exc.OperationalError("COMMIT", {}, full)
    info["changes"] = changes


class _Watched(sqlite3.Connection):
    """A connection of the standard library whose commits are counted too."""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and self.in_transaction and durable() is not None:
            super().execute("ROLLBACK")
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *arguments)


_connect = sqlite3.connect


def _connected(*arguments: Any, **named: Any) -> sqlite3.Connection:
    return _connect(*arguments, **named, factory=_Watched)


@contextmanager
def watched_disk() -> Iterator[None]:
    """Count writes, and let them fail where they should."""
    sa.event.listen(sa.Engine, "commit", _before_commit)
    try:
        with (
            mock.patch.object(os, "fsync", _sync),
            mock.patch.object(os, "fdatasync", _sync),
            mock.patch.object(Path, "replace", _renamed),
            mock.patch.object(sqlite3, "connect", _connected),
        ):
            yield
    finally:
        with suppress(sa.exc.InvalidRequestError):
            sa.event.remove(sa.Engine, "commit", _before_commit)
