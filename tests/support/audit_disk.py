"""The run of ``tests.support.audit_run`` on disk, for commands: made once, copied for each test."""

from __future__ import annotations

import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from infra.cli import root_command
from protocols.errors import FederationError, exit_status
from tests.support.audit_run import Run


@functools.cache
def the_run() -> Run:
    """The whole run."""
    return Run().whole()


@functools.cache
def _written() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="audit-run-"))
    the_run().write(folder)
    (folder / "anchor.txt").write_bytes(the_run().policy())
    return folder


def copy_run(target: Path) -> Path:
    """A copy of the run: ``log/``, ``blobs/``, ``uploads/``, and the trust policy elsewhere."""
    shutil.copytree(_written(), target, dirs_exist_ok=True)
    return target


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str


def minga(*arguments: object) -> Ended:
    """Run a command in this process, with the exit status that ``infra.cli.main`` would give."""
    done = CliRunner().invoke(root_command(), [str(argument) for argument in arguments])
    if isinstance(done.exception, FederationError):
        return Ended(exit_status(done.exception), done.stdout, done.exception.diagnostics())
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Ended(done.exit_code, done.stdout, done.stderr)
