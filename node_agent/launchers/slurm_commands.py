"""The commands of Slurm that the launcher needs. Blocking, each with a limit on its time.

They get an environment of a few plain variables: a job inherits what sbatch sees, and the agent's
environment may hold an invitation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from node_agent.launchers.slurm_rules import JobSeen, read_accounts, read_queue
from protocols.errors import MalformedMessageError

_PASSED: Final = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "SLURM_CONF", "KRB5CCNAME",
)  # fmt: skip
_LIMIT_S: Final = 30.0
_BUSY: Final = (  # the controller, not the request
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "zero bytes were transmitted",
    "controller is in standby",
    "transport endpoint is not connected",
    "resource temporarily unavailable",
    "rate limit exceeded",
)
COMMANDS: Final = ("sbatch", "squeue", "scancel", "scontrol")


class SlurmError(Exception):
    """A command of Slurm failed; one sentence."""


class SlurmBusyError(SlurmError):
    """Slurm did not answer, or not in time: nothing is known of what was asked for."""


class SlurmRefusedError(SlurmError):
    """Slurm answered no."""


def slurm_environment(outside: Mapping[str, str]) -> dict[str, str]:
    """What sbatch and its job may see of the agent's environment."""
    return {name: outside[name] for name in _PASSED if name in outside}


@dataclass(frozen=True, slots=True)
class Slurm:
    """Runs sbatch, squeue, sacct and scancel."""

    environment: Mapping[str, str] = field(repr=False)

    @classmethod
    def here(cls) -> Slurm:
        """With this process' environment."""
        return cls(slurm_environment(os.environ))

    def missing(self) -> list[str]:
        """Commands that are not installed."""
        path = self.environment.get("PATH")
        return [command for command in COMMANDS if shutil.which(command, path=path) is None]

    def submit(self, script: Path) -> int:
        """Hand in a batch script; returns the job's number.

        Raises:
            SlurmRefusedError: Slurm does not take it.
            SlurmBusyError: no clear answer; it may have been taken.
        """
        said = self._run("sbatch", "--parsable", str(script)).decode("utf-8", "replace").strip()
        number = said.split("\n")[-1].partition(";")[0]  # "17" or "17;cluster"
        if not (number.isascii() and number.isdigit()):
            raise SlurmBusyError(f"sbatch answered {said!r:.80}")
        return int(number)

    def test(self, script: Path) -> str:
        """What would become of a batch script: one sentence with the expected start.

        Raises:
            SlurmError: Slurm would not take it, or does not answer.
        """
        done = self._done("sbatch", "--test-only", str(script))
        lines = done.stderr.decode("utf-8", "replace").strip().split("\n")
        return lines[-1].removeprefix("sbatch: ")

    def queue(self) -> tuple[JobSeen, ...]:
        """This user's jobs, those that ended a short while ago too.

        Raises:
            SlurmError: no answer, or one that cannot be read.
        """
        try:
            return read_queue(self._run("squeue", "--json", "--states=all", "--me"))
        except MalformedMessageError as error:
            raise SlurmError(str(error)) from None

    def accounts(self, job: int) -> str | None:
        """The last state of a job that left the queue; None where there is no accounting."""
        with suppress(SlurmError, MalformedMessageError):
            return read_accounts(self._run("sacct", "--json", f"--jobs={job}"), job)
        return None

    def cancel(self, job: int) -> None:
        """End a job. One that has ended is no error.

        Raises:
            SlurmError: Slurm does not answer, or does not allow it.
        """
        self._run("scancel", str(job))

    def kill_step(self, job: int, step: int) -> None:
        """Kill one step of a job; its batch script goes on.

        Raises:
            SlurmError: Slurm does not answer, or does not allow it.
        """
        self._run("scancel", "--signal=KILL", f"{job}.{step}")

    def _run(self, *command: str) -> bytes:
        return self._done(*command).stdout

    def _done(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=dict(self.environment),
                timeout=_LIMIT_S,
                check=False,
            )
        except FileNotFoundError:
            raise SlurmRefusedError(f"{command[0]} is not installed here") from None
        except OSError as error:
            raise SlurmRefusedError(f"{command[0]} cannot be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise SlurmBusyError(f"{command[0]} did not answer within {_LIMIT_S:.0f} s") from None
        if done.returncode == 0:
            return done
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[:300]
        sentence = f"{command[0]} ended with status {done.returncode}: {said or 'no reason given'}"
        if any(words in said.lower() for words in _BUSY):
            raise SlurmBusyError(sentence)
        raise SlurmRefusedError(sentence)
