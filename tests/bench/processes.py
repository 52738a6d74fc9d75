"""Start processes, watch their memory, and end exactly those.

Everything a benchmark starts carries a token in its environment, and children inherit it; so what
was started can be told from everything else on the machine, whoever its parent has become. Roles
("server", "client", ...) travel the same way. Linux only: /proc is read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

TOKEN_VAR = "MINGA_BENCH_TOKEN"
ROLE_VAR = "MINGA_BENCH_ROLE"
SAMPLE_S = 0.2  # between two looks at memory
MB = 10**6


class TooLongError(Exception):
    """A wait passed its deadline."""


class Stage:
    """The processes of one measurement; leaving the ``with`` block ends all of them."""

    def __init__(self, *, folder: Path) -> None:
        self.folder = folder
        self._token = secrets.token_hex(8)
        self._started: list[subprocess.Popen[bytes]] = []
        self._roles: dict[tuple[int, str], str | None] = {}  # (pid, start time) -> role, if ours
        self._peak: dict[str, int] = {}  # role -> highest sum of resident bytes at one moment
        self._private: dict[str, int] = {}  # the same without pages of mapped files
        self._peak_at: dict[str, float] = {}  # when the first of these was, seconds since 1970
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Stage:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._watcher.join()
        self._end_all()

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        role: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start one process in its own group; its output goes to ``folder/name.log``."""
        full = {**os.environ, **(env or {}), TOKEN_VAR: self._token, ROLE_VAR: role}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=full,
                cwd=cwd,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        role: str = "setup",
    ) -> None:
        """Start, wait, and raise with the end of its log when it fails or takes too long."""
        process = self.start(name, argv, role=role, env=env, cwd=cwd)
        try:
            status = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TooLongError(f"{name} took longer than {timeout_s:.0f} s") from None
        if status != 0:
            raise ChildProcessError(f"{name} ended with {status}: {self.tail(name)}")

    def tail(self, name: str, lines: int = 3) -> str:
        """The last lines of a log, in one line."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])

    def peak_rss_mb(self, role: str) -> float | None:
        """Highest sum of the resident memory of a role's processes at one moment, MB.

        Pages that two of them share count twice. None: no process of the role was ever seen.
        """
        peak = self._peak.get(role)
        return None if peak is None else peak / MB

    def peak_private_mb(self, role: str) -> float | None:
        """The same without the pages of mapped files, which the kernel takes back when it must."""
        peak = self._private.get(role)
        return None if peak is None else peak / MB

    def peak_at(self, role: str) -> float | None:
        """When ``peak_rss_mb`` was reached, seconds since 1970."""
        return self._peak_at.get(role)

    def mine(self) -> dict[int, str]:
        """Every living process of this stage: pid -> role."""
        found = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                role = self._role_of(int(entry.name))
                if role is not None:
                    found[int(entry.name)] = role
        return found

    def _role_of(self, pid: int) -> str | None:
        try:
            # The start time tells a process from a later one with the same number.
            started = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
            key = (pid, started)
            if key not in self._roles:
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                if not environ:
                    return None  # between fork and exec, or a zombie: ask again next time
                values = dict(part.partition(b"=")[::2] for part in environ.split(b"\0"))
                ours = values.get(TOKEN_VAR.encode()) == self._token.encode()
                self._roles[key] = values.get(ROLE_VAR.encode(), b"").decode() if ours else None
            return self._roles[key]
        except (OSError, IndexError):
            return None  # it has ended, or belongs to somebody else

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(SAMPLE_S):
            now: dict[str, tuple[int, int]] = {}
            for pid, role in self.mine().items():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = Path(f"/proc/{pid}/statm").read_text().split()
                    resident, shared = int(fields[1]) * page, int(fields[2]) * page
                    all_, private = now.get(role, (0, 0))
                    now[role] = (all_ + resident, private + resident - shared)
            for role, (all_, private) in now.items():
                if all_ > self._peak.get(role, 0):
                    self._peak[role], self._peak_at[role] = all_, time.time()
                self._private[role] = max(private, self._private.get(role, 0))

    def _end_all(self) -> None:
        for kind, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            until = time.monotonic() + patience
            for pid in self.mine():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, kind)
            while time.monotonic() < until:
                for process in self._started:
                    process.poll()  # reap, so that the dead leave the list
                if not self.mine():
                    return
                time.sleep(0.1)


def free_port() -> int:
    """A loopback port that was free a moment ago. Whoever gets it must report a bind that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, *, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Until something listens on loopback ``port``; raises when the process ends or time is up."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ChildProcessError(f"the process ended with {process.returncode} before listening")
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TooLongError(f"nothing listened on port {port} within {timeout_s:.0f} s")
