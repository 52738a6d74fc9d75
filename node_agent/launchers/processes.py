"""Processes told apart from later ones with the same number; whole families ended for good.

A worker may start helpers in sessions of their own (torchrun does), so ending its process group is
not enough: the family is found through parents, which /proc knows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node_agent.resident import Process
from node_agent.spool import atomic_write
from protocols.canonical import canonical_bytes, parse_json
from protocols.errors import MalformedMessageError

_TERM_S = 10.0  # from SIGTERM to SIGKILL
_POLL_S = 0.05


def _parents() -> dict[int, list[int]]:
    """Children of every process, by parent."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    return children


def family(pid: int) -> tuple[Process, ...]:
    """A process and its descendants."""
    children, found, waiting = _parents(), [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(Process.of(current))
        waiting.extend(children.get(current, ()))
    return tuple(found)


def _send(process: Process, number: signal.Signals) -> None:
    if process.lives():  # narrows the window in which the number could name another process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


def end_family(
    process: Process,
    *,
    known: tuple[Process, ...] = (),
    patience_s: float = _TERM_S,
    reap: Callable[[], object] = lambda: None,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """End a process and its descendants: SIGTERM, then SIGKILL. Blocking.

    Args:
        process: head of the family.
        known: members seen earlier; ended as well if the head is gone and they are not.
        patience_s: from SIGTERM to SIGKILL.
        reap: called while waiting; collects the exit status where the process is our child.
        monotonic: seconds.
        sleep: seconds.
    """
    members = {*known, *(family(process.pid) if process.lives() else ())}
    _send(process, signal.SIGTERM)
    told, until = False, monotonic() + patience_s
    while any(member.lives() for member in members) and monotonic() < until:
        if not told and not process.lives():  # a living head tells the others itself
            told = True
            for member in members:
                _send(member, signal.SIGTERM)
        reap()
        sleep(_POLL_S)
    # Who was born meanwhile counts as well.
    for member in {*members, *(family(process.pid) if process.lives() else ())}:
        _send(member, signal.SIGKILL)
    until = monotonic() + patience_s
    while any(member.lives() for member in members) and monotonic() < until:
        reap()
        sleep(_POLL_S)


def remember(path: Path, process: Process) -> None:
    """Write down who was started, so that the next agent can end it."""
    atomic_write(path, canonical_bytes({"pid": process.pid, "started": process.started}))


def remembered(path: Path) -> Process | None:
    """Who was started, if it still lives."""
    try:
        value: Any = parse_json(path.read_bytes())
        process = Process(int(value["pid"]), str(value["started"]))
    except (OSError, MalformedMessageError, KeyError, TypeError, ValueError):
        return None
    return process if process.lives() else None
