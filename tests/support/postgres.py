"""A real PostgreSQL server on loopback, in a temporary folder, for tests.

The server refuses root, so as root it runs as the user ``postgres``. Fixtures skip, with a reason,
where the binaries are absent. What was started is stopped by its own data folder, never by name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

_HOME = Path("/usr/lib/postgresql")
# Tests kill processes, not the machine: what the kernel holds survives, so no fsync is needed.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "deadlock_timeout": "100ms",
    "max_connections": "80",
}
_PREFIX = "minga-postgres-"
_numbers = count(1)


def binaries() -> Path | None:
    """Folder with initdb and pg_ctl of the newest version that is installed, if any."""
    for version in sorted(_HOME.glob("*/bin"), reverse=True):
        if (version / "initdb").exists():
            return version
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """One server; ``folder`` holds its data, socket and log."""

    folder: Path
    port: int
    programs: Path

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def initialise(self) -> None:
        """Make the data folder."""
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        data = str(self.folder / "data")
        self._run("initdb", "-D", data, "-A", "trust", "-U", "minga", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        """Start and wait until it answers."""
        options = [f"-k {self.folder}", f"-p {self.port}"]
        options += [f"-c {name}={value}" for name, value in _SETTINGS.items()]
        self._run(
            "pg_ctl",
            "-D",
            str(self.folder / "data"),
            "-l",
            str(self.folder / "log"),
            "-o",
            " ".join(options),
            "-w",
            "start",
        )

    def stop(self, mode: str = "immediate") -> None:
        """Stop; ``immediate`` is a crash."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "stop")

    def crash_and_restart(self) -> None:
        """Kill every server process, then recover from the log."""
        self.stop("immediate")
        self.start()

    def new_database(self) -> str:
        """URL of an empty database of its own."""
        name = f"ledger_{next(_numbers)}"
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "minga"]
        self._run("createdb", *where, name)
        return f"postgresql+psycopg://minga@127.0.0.1:{self.port}/{name}"


def _clear_leftovers(programs: Path) -> None:
    """Stop servers whose test session was killed before it could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            owner = int((folder / "owner").read_text())
            os.kill(owner, 0)
        except ProcessLookupError:
            if (folder / "data" / "postmaster.pid").exists():
                with suppress(RuntimeError):  # it is down already
                    PostgresServer(folder=folder, port=0, programs=programs).stop()
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue  # somebody else's


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server for the whole test session."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    _clear_leftovers(programs)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    (folder / "owner").write_text(str(os.getpid()))
    server = PostgresServer(folder=folder, port=_free_port(), programs=programs)
    try:
        server.initialise()
        server.start()
        yield server
    finally:
        try:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
