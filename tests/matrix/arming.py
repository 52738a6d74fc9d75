"""Kills this process right before, or right after, it reaches one of some commit points.

``arm`` wraps the few calls through which everything durable goes (fsync, rename, COMMIT) and asks
at each of them who called: the names are those of ``points``. The points still to be visited are
read from a file when the process starts, less those that its ``marks`` say were visited; at the
first one it leaves a mark and sends itself SIGKILL. Before that it notes when it first did
something durable for a round: that is when it went on.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import sqlalchemy as sa

from tests.matrix.points import SQL, operations

_OURS: Final = ("coordinator.", "node_agent.")
# What a process does on its own account; anything else durable means that a round goes on.
HOUSEKEEPING: Final = frozenset(
    {"tx:open", "tx:take_lease", "tx:renew_lease", "tx:release_lease", "tx:log_state"}
    | {"tx:progress", "tx:heartbeat", "tx:traffic", "tx:close_rounds"}
    | {"file:node_agent.resident.serve#atomic_write"}  # that it is ready
    | {"sql:node_agent.journal.Journal.note", "sql:node_agent.log_store.LogStore.accept"}
)
_LOG_FILES: Final = "file:coordinator.log_files."  # the head is signed again after a start
Kill = Callable[[dict[str, Any]], None]


class Armed:
    """What one process still has to die at."""

    def __init__(self, points: Path, marks: Path) -> None:
        self._marks = marks
        seen = read_marks(marks)
        wanted = set(json.loads(points.read_text())) if points.exists() else set()
        self._left = wanted - {mark["point"] for mark in seen if "point" in mark}
        self._told = False
        self._lock = threading.Lock()
        self._started = time.time()
        write_mark(marks, {"started": self._started})

    def reached(self, point: str, when: str) -> None:
        """Called at each commit point."""
        if not self._told and when == "after" and point not in HOUSEKEEPING and _lasting(point):
            self._told = True
            write_mark(self._marks, {"went_on": time.time() - self._started, "by": point})
        instant = f"{point}@{when}"
        if instant not in self._left:
            return
        with self._lock:  # one mark; other threads stand still until the end
            write_mark(self._marks, {"point": instant, "at": time.time()})
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)


def _lasting(point: str) -> bool:
    return not point.endswith("#write_status") and not point.startswith(_LOG_FILES)


def write_mark(marks: Path, mark: dict[str, Any]) -> None:
    """Append one mark; whole or not at all."""
    handle = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, json.dumps(mark).encode() + b"\n")
    os.close(handle)


def read_marks(marks: Path) -> list[dict[str, Any]]:
    """What the processes said, in order."""
    try:
        lines = marks.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def arm(points: Path, marks: Path) -> None:
    """Wrap what makes things durable, in this process."""
    armed = Armed(points, marks)
    for name in ("fsync", "fdatasync", "rename", "replace", "link"):
        _wrap(armed, name)
    _wrap_commits(armed)


def _wrap(armed: Armed, name: str) -> None:
    original = getattr(os, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        point = file_point(sys._getframe(1), name)
        if point is None:
            return original(*arguments, **named)
        armed.reached(point, "before")
        result = original(*arguments, **named)
        armed.reached(point, "after")
        return result

    setattr(os, name, wrapped)


def _frames(frame: FrameType | None) -> Any:
    while frame is not None:
        yield frame, str(frame.f_globals.get("__name__", "")), _qualname(frame)
        frame = frame.f_back


def _qualname(frame: FrameType) -> str:
    return frame.f_code.co_qualname.partition(".<locals>")[0]


def file_point(frame: FrameType, operation: str) -> str | None:
    """Which point a file operation belongs to; None: not one of ours."""
    last: tuple[str, str] | None = None  # one of our own operations, with nobody of ours above it
    for _, module, name in _frames(frame):
        if not module.startswith(_OURS):
            continue
        short = name.rpartition(".")[2]
        if short in operations(module):
            operation, last = short, (module, name)
            continue
        return f"file:{module}.{name}#{operation}"
    return None if last is None else f"thread:{last[0]}.{last[1]}"


def _wrap_commits(armed: Armed) -> None:
    commit = sa.Connection._commit_impl

    def committed(self: sa.Connection) -> None:
        point = commit_point(sys._getframe(1))
        if point is not None:
            armed.reached(point, "before")
        commit(self)
        if point is not None:
            armed.reached(point, "after")

    sa.Connection._commit_impl = committed  # type: ignore[method-assign]

    class Counted(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            point = commit_point(sys._getframe(1)) if sql == "COMMIT" else None
            if point is not None:
                armed.reached(point, "before")
            done = super().execute(sql, *arguments)
            if point is not None:
                armed.reached(point, "after")
            return done

    connect = sqlite3.connect

    def counted(*arguments: Any, **named: Any) -> Any:
        named.setdefault("factory", Counted)
        return connect(*arguments, **named)

    sqlite3.connect = counted


def commit_point(frame: FrameType) -> str | None:
    """Which transaction commits; None: one that only reads."""
    for found, module, name in _frames(frame):
        if module == "coordinator.ledger.ledger":
            if name == "Ledger._write":
                return f"tx:{found.f_locals['name']}"
            return "tx:open" if name == "Ledger._open" else None
        if module.startswith("node_agent.") and name.rpartition(".")[2] not in SQL | {"_errors"}:
            return None if name.endswith("__init__") else f"sql:{module}.{name}"
    return None
