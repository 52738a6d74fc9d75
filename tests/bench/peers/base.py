"""What all peers have in common: an environment of their own, a deadline, and a checked result."""

from __future__ import annotations

import abc
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.processes import Stage, TooLongError
from tests.bench.rows import Row, Spread, round_work

APPS = Path(__file__).with_name("apps")
NODES = 4
STEP = 1e-3  # what the mean of the clients adds in a round
STEPS = tuple(STEP + (index - 1.5) * 2e-4 for index in range(NODES))  # what each of them adds
INSTALL_TIMEOUT_S = 900.0


class SkippedError(Exception):
    """This peer cannot be measured here, and why. Never a failure of the benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One measurement of one peer."""

    params: int
    rounds: int  # measured; one more is run first, as warm-up
    timeout_s: float  # for everything but the installation
    venv: Path
    folder: Path  # empty; gone afterwards

    @property
    def events(self) -> Path:
        return self.folder / "events"

    def tool(self, name: str) -> str:
        return str(self.venv / "bin" / name)

    def environment(self) -> dict[str, str]:
        """For every process of the peer: its tools first, a home of its own, our plug-ins."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        self.events.mkdir(parents=True, exist_ok=True)
        return {
            "PATH": f"{self.venv / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "VIRTUAL_ENV": str(self.venv),
            "HOME": str(home),
            "PYTHONPATH": str(APPS),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "MINGA_BENCH_EVENTS": str(self.events),
        }


class Peer(abc.ABC):
    """One system."""

    name: str  # for --only
    system: str  # with its version, as in the table
    requirements: tuple[str, ...]
    note: str

    @abc.abstractmethod
    def run(self, job: Job, stage: Stage) -> None:
        """Start it on ``stage`` and return when it has done ``job.rounds + 1`` rounds."""


def measure(peer: Peer, *, params: int, rounds: int, timeout_s: float, work: Path) -> Row:
    """One row; a peer that does not install, start, finish or add up gives a skipped row."""
    what = round_work(params=params, nodes=NODES)
    scratch = work / "runs" / f"{peer.name}-{params}"
    shutil.rmtree(scratch, ignore_errors=True)
    job = Job(
        params=params,
        rounds=rounds,
        timeout_s=timeout_s,
        venv=work / f"venv-{peer.name}",
        folder=scratch,
    )
    try:
        ensure_environment(job.venv, peer.requirements)
        with Stage(folder=scratch / "logs") as stage:
            peer.run(job, stage)
            peak = stage.peak_rss_mb("server")
        seconds = round_seconds(job)
    except (SkippedError, TooLongError, OSError, subprocess.SubprocessError) as error:
        # The scratch folder stays: its logs are what one looks at next.
        return Row(
            what=what, system=peer.system, params=params, nodes=NODES, skipped=one_line(error)
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return Row(
        what=what,
        system=peer.system,
        params=params,
        nodes=NODES,
        seconds_per_round=Spread.of(seconds),
        server_peak_rss_mb=peak,
        bytes_per_node={"up": 4 * params, "down": 4 * params},
        note=f"{peer.note}; {len(seconds)} rounds after a warm-up; payload bytes; means checked",
    )


def one_line(error: BaseException) -> str:
    """The reason in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def ensure_environment(venv: Path, requirements: tuple[str, ...]) -> None:
    """Make the peer's virtual environment, once; later runs find it by the stamp it leaves.

    Raises:
        SkippedError: it cannot be made; with the last line that pip said.
    """
    stamp = venv / "minga-bench-requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
    for command in ([sys.executable, "-m", "venv", "--clear", str(venv)], pip):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise SkippedError(f"installation took over {INSTALL_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[-1] if errors else (done.stderr.strip() or "no message")
            raise SkippedError(f"installation failed: {reason}")
    stamp.write_text(wanted)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """What all processes of a run reported, by time."""
    events = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # the last line of a process that is writing it now
    return sorted(events, key=lambda event: event["at"])


def wait_for_rounds(job: Job, stage: Stage, watched: Mapping[str, Any]) -> None:
    """Until the server has ended ``job.rounds + 1`` rounds.

    Args:
        watched: processes by log name which must not end with an error before that.

    Raises:
        SkippedError: one did.
        TooLongError: the deadline passed.
    """
    until = time.monotonic() + job.timeout_s
    while True:
        ends = [event for event in read_events(job.events) if event["event"] == "round_end"]
        if len(ends) > job.rounds:
            return
        for name, process in watched.items():
            if process.poll() not in (None, 0):
                raise SkippedError(
                    f"{name} ended with {process.returncode} after {len(ends)} rounds: "
                    f"{stage.tail(name)}"
                )
        if time.monotonic() > until:
            raise TooLongError(
                f"only {len(ends)} of {job.rounds + 1} rounds within {job.timeout_s:.0f} s"
            )
        time.sleep(0.5)


def round_seconds(job: Job) -> list[float]:
    """Check what was computed, then the time between the ends of successive rounds.

    Each of four clients adds a step of its own, 1e-3 on average, so after k rounds the model is
    k/1000 above the first one: that is what every client must receive in round k, counted from 0,
    as float32 of full size. Values are below 0.02, so float32 errs by less than 1e-8 a round.

    Raises:
        SkippedError: a value, a size or a number of messages is not what it must be.
    """
    events = read_events(job.events)
    for event in events:
        if event["event"] not in ("received", "sent"):
            continue
        want = event["round"] * STEP + (STEPS[event["client"]] if event["event"] == "sent" else 0)
        low, high = event["low"], event["high"]
        if max(abs(low - want), abs(high - want)) > 1e-6:
            raise SkippedError(
                f"wrong values: {event['event']} in round {event['round']}: "
                f"{low} to {high}, not {want}"
            )
        if event["bytes"] != 4 * job.params or event["dtype"] != "float32":
            raise SkippedError(f"wrong payload: {event['bytes']} bytes of {event['dtype']}")
    for kind in ("received", "sent"):
        count = sum(event["event"] == kind for event in events)
        if count != NODES * (job.rounds + 1):
            raise SkippedError(f"{count} models {kind}, not {NODES * (job.rounds + 1)}")
    ends = [event["at"] for event in events if event["event"] == "round_end"]
    return [after - before for before, after in itertools.pairwise(ends)]
