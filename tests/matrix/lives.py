"""Lives of one process: each is forked from a parent that has done nothing but import the code.

A matrix of hundreds of kills is not to spend its time on starting Python. What that start costs is
measured once, from the kernel's own record of when the parent began, and is part of every time to
go on. The parent holds no connection, no lock and no thread; it forwards SIGTERM and ends with the
first life that was not killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import sqlalchemy as sa

from tests.matrix.arming import arm, write_mark


def since_start_s() -> float:
    """Seconds since this process was started, from /proc."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK")


def phase_of(url: str) -> str:
    """The phase of the newest round, read from the database itself; none: there is no round."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            query = sa.text("SELECT phase FROM phase_times ORDER BY history_id DESC LIMIT 1")
            row = connection.execute(query).first()
    except sa.exc.OperationalError:
        return "no database"
    return str(row.phase) if row else "none"


def live(serve: Callable[[], None], faults: Path, url: str) -> None:
    """Let ``serve`` run, killed at the points of ``faults``, until it ends by itself."""
    marks, points = faults / "marks", faults / "points.json"
    write_mark(marks, {"import_s": since_start_s()})
    child = 0
    ending = False

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal ending
        ending = True
        os.kill(child, number)

    signal.signal(signal.SIGTERM, end)
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _one_life(serve, points, marks)
        _, status = os.waitpid(child, 0)
        if ending or not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(0 if ending else os.waitstatus_to_exitcode(status))
        write_mark(marks, {"phase": phase_of(url), "died": time.time()})


def _one_life(serve: Callable[[], None], points: Path, marks: Path) -> None:
    status = 1
    try:
        arm(points, marks)
        serve()
        status = 0
    except BaseException:  # noqa: BLE001 - a forked child must not go on
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
