"""The child processes of a demonstration: started, watched, and all stopped at the end.

Every child has its own session, so that Ctrl-C reaches the demonstration alone and it stops the
others in order. Children have children (an agent starts a worker): each look at the household
remembers them, so that a killed child leaves nothing behind. A process is its number AND its
start time: a number that the system gave to somebody else meanwhile is never signalled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from protocols.errors import NotReadyError

_GRACE_S: Final = 10.0  # from SIGTERM to SIGKILL
_TAIL: Final = 12  # lines of a log that are shown
_POLL_S: Final = 0.05
# Folders of a demonstration are called like our packages: a child must not import from where it
# happens to stand. Diagnostics are written as they come.
_SAFE: Final = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


class ChildDiedError(NotReadyError):
    """A process of the demonstration ended by itself; the sentence shows the end of its log."""

    code = "child_died"

    def diagnostics(self) -> str:
        """The sentence, its log lines, and the code on a line of its own."""
        return f"{self}\n[{self.code}]"


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """One process of this machine, told apart from a later one with the same number."""

    pid: int
    started: str


@dataclass(frozen=True, slots=True)
class _Entry:
    parent: int
    started: str
    ended: bool  # a zombie waits for its parent; it does nothing any more


def _process_table() -> dict[int, _Entry]:
    """All processes, from /proc or, where there is none, from ps."""
    if Path("/proc/self/stat").exists():
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError, IndexError):  # it ended while we looked
                    text = (folder / "stat").read_text("ascii", "replace")
                    fields = text.rpartition(")")[2].split()
                    found[int(folder.name)] = _Entry(int(fields[1]), fields[19], fields[0] in "ZX")
        return found
    lines = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,stat=,lstart="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = (line.split(None, 3) for line in lines)
    return {
        int(pid): _Entry(int(parent), started, state.startswith("Z"))
        for pid, parent, state, started in rows
    }


def alive(processes: Iterable[Process]) -> frozenset[Process]:
    """Those that still run."""
    table = _process_table()
    return frozenset(
        process
        for process in processes
        if (entry := table.get(process.pid)) is not None
        and entry.started == process.started
        and not entry.ended
    )


def descendants(pid: int) -> frozenset[Process]:
    """The children of a process, their children, and so on; not itself."""
    table = _process_table()
    children: dict[int, list[int]] = {}
    for number, entry in table.items():
        children.setdefault(entry.parent, []).append(number)
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return frozenset(Process(number, table[number].started) for number in found)


def send(signal_: signal.Signals, processes: Iterable[Process]) -> None:
    """Signal those that still run."""
    for process in alive(processes):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal_)


def end(processes: Iterable[Process], *, grace_s: float) -> None:
    """SIGTERM, wait, SIGKILL; returns when none of them runs any more."""
    left = alive(processes)
    send(signal.SIGTERM, left)
    until = time.monotonic() + grace_s
    while (left := alive(left)) and time.monotonic() < until:
        time.sleep(_POLL_S)
    send(signal.SIGKILL, left)
    while alive(left):
        time.sleep(_POLL_S)


@contextmanager
def _unhurried() -> Iterator[None]:
    """A second Ctrl-C while children are being stopped must not leave some of them behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    impatient = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in impatient}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tail(path: Path, lines: int = _TAIL) -> str:
    """The last lines of a log, indented."""
    try:
        text = path.read_text("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        text = []
    return "\n".join(f"    {line[:300]}" for line in text) or "    (nothing)"


@dataclass(slots=True)
class Child:
    """One child and everything it was seen to start."""

    name: str
    log: Path
    popen: subprocess.Popen[bytes]
    process: Process
    passing: bool = False  # it may end by itself, with status 0
    family: set[Process] = field(default_factory=set)

    def look(self) -> None:
        """Remember what it has started by now."""
        self.family |= descendants(self.process.pid)

    @property
    def everybody(self) -> frozenset[Process]:
        """The child and its family."""
        return frozenset({self.process, *self.family})


class Household:
    """All children of one demonstration. Leaving the ``with`` block stops every one of them.

    ``processes.json`` in the folder lists who runs, so that after a crash of the demonstration
    itself the next one can end what was left.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: dict[str, Child] = {}

    @property
    def _record(self) -> Path:
        return self._folder / "processes.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _unhurried():
            self.close()

    # -- starting --------------------------------------------------------------------------------

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        said: bytes | None = None,
        passing: bool = False,
    ) -> Child:
        """Start a child; what it prints is appended to ``log``.

        Args:
            name: for people; one child of a name at a time.
            command: program and arguments.
            log: its diagnostics.
            environment: variables added to ours.
            said: what it reads from its standard input; at most a few kilobytes.
            passing: whether it ends by itself when it is done, see ``finish``.
        """
        if name in self._children:
            raise ValueError(f"{name} runs already")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if said is None else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **_SAFE, **(environment or {})},
            )
        if popen.stdin is not None:
            with suppress(BrokenPipeError), popen.stdin as pipe:  # it may have ended already
                pipe.write(said or b"")
        entry = _process_table().get(popen.pid)
        process = Process(popen.pid, entry.started if entry else "")
        child = Child(name=name, log=log, popen=popen, process=process, passing=passing)
        self._children[name] = child
        self._write_record()
        return child

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        timeout_s: float = 300,
        said: bytes | None = None,
    ) -> None:
        """Run a child to its end.

        Raises:
            ChildDiedError: it ended with another status than 0, or not in time.
        """
        self.start(name, command, log=log, said=said, passing=True)
        self.finish(name, timeout_s=timeout_s)

    def finish(self, name: str, *, timeout_s: float = 300) -> None:
        """Wait for a child that ends by itself.

        Raises:
            ChildDiedError: it ended with another status than 0, or not in time.
        """
        child = self._children[name]
        try:
            status = child.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill(name)
            raise ChildDiedError(f"{name} did not end within {timeout_s:.0f} seconds") from None
        self._forget(name)
        if status != 0:
            raise ChildDiedError(_died(child, status))

    def python(self, module: str, *arguments: str) -> list[str]:
        """The command for one of our own modules, by this interpreter."""
        return [sys.executable, "-P", "-m", module, *arguments]

    # -- watching --------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name in self._children

    def child(self, name: str) -> Child:
        """A running child."""
        return self._children[name]

    def check(self) -> None:
        """Look at everybody.

        Raises:
            ChildDiedError: one ended by itself.
        """
        for child in list(self._children.values()):
            status = child.popen.poll()
            if status is None:
                child.look()
            elif status != 0 or not child.passing:
                raise ChildDiedError(_died(child, status))

    # -- stopping --------------------------------------------------------------------------------

    def pause(self, names: Iterable[str]) -> None:
        """Let children stand still (SIGSTOP), not what they started."""
        for name in names:
            self._children[name].popen.send_signal(signal.SIGSTOP)

    def resume(self, names: Iterable[str]) -> None:
        """Let children that stand still go on (SIGCONT)."""
        for name in names:
            if name in self._children:
                self._children[name].popen.send_signal(signal.SIGCONT)

    def kill(self, name: str) -> frozenset[Process]:
        """SIGKILL a child and everything it started, at once; who was killed."""
        child = self._children[name]
        child.look()
        everybody = child.everybody
        # The child first: it must not see its worker die and write that down.
        send(signal.SIGKILL, [child.process])
        send(signal.SIGKILL, everybody)
        child.popen.wait()
        while alive(everybody):
            time.sleep(_POLL_S)
        self._forget(name)
        return everybody

    def stop(self, name: str, *, grace_s: float = _GRACE_S) -> None:
        """Ask a child to end, then make it; its family too."""
        child = self._children[name]
        child.look()
        send(signal.SIGCONT, [child.process])  # a paused process cannot hear SIGTERM
        send(signal.SIGTERM, [child.process])
        with suppress(subprocess.TimeoutExpired):
            child.popen.wait(grace_s)
        end(child.everybody, grace_s=1.0)
        child.popen.wait()
        self._forget(name)

    def close(self, *, grace_s: float = _GRACE_S) -> None:
        """Stop everybody: all are asked at once, so that it takes as long as the slowest."""
        children = list(self._children.values())
        for child in children:
            child.look()
            send(signal.SIGCONT, [child.process])
            send(signal.SIGTERM, [child.process])
        until = time.monotonic() + grace_s
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.popen.wait(max(0.0, until - time.monotonic()))
        end([process for child in children for process in child.everybody], grace_s=1.0)
        for child in children:
            child.popen.wait()
            self._children.pop(child.name, None)
        self._record.unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        del self._children[name]
        self._write_record()

    def _write_record(self) -> None:
        listed = [
            {"name": child.name, "pid": child.process.pid, "started": child.process.started}
            for child in self._children.values()
        ]
        temporary = self._record.with_name(".processes.json.tmp")
        temporary.write_text(json.dumps(listed))
        temporary.replace(self._record)

    def end_leftovers(self) -> int:
        """End what an earlier demonstration in this folder left running; how many there were."""
        try:
            listed = json.loads(self._record.read_text("utf-8"))
        except (OSError, ValueError):
            return 0
        recorded = alive(Process(int(item["pid"]), str(item["started"])) for item in listed)
        families = [descendants(process.pid) for process in recorded]
        end(recorded.union(*families), grace_s=_GRACE_S)
        self._record.unlink(missing_ok=True)
        return len(recorded)


def _died(child: Child, status: int) -> str:
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    return f"{child.name} ended {how}; the end of {child.log}:\n{tail(child.log)}"
