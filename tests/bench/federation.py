"""A federation of our own, in real processes, for measuring.

Everything is done with the commands that people use: ``minga coordinator init|serve|invite``,
``minga node join|run``, ``minga run submit|show``. SQLite, mutual TLS, every fsync where a real
deployment has it; only the training is left out (plan kind "synthetic": each node contributes the
same constant), because that is what is measured around.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coordinator.operator_client import operator_stub
from infra.runs.client import AdminClient
from infra.runs.operator import find_operator
from protocols.gen import admin_pb2
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.snapshot import Snapshot
from tests.bench.peers.apps.bench_events import GRAIN, PERIOD, STRIDE, first_model
from tests.bench.processes import Stage, TooLongError, free_port, wait_for_port

T = TypeVar("T")
DELTA = 1e-3  # what each node adds in a round
RUN = "bench-1"
TENSOR = "w"
COMMAND_S = 90.0  # for one command


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a federation is to do."""

    params: int
    nodes: int
    rounds: int  # measured; one more goes before as warm-up, one after to mark the end
    timeout_s: float  # for all rounds together


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What it did."""

    seconds: list[float]  # per measured round
    phases: dict[str, float]  # phase -> seconds, mean over the measured rounds
    up: int  # bytes, largest of any node and measured round
    down: int  # bytes, likewise
    rss_mb: float  # the coordinator's peak, all resident pages
    private_mb: float  # the same without pages of mapped files, which the kernel may drop
    peak_in: str  # the phase in which the peak was
    begun: float  # the first measured round, seconds since 1970
    ended: float  # the last of them


class Federation:
    """One coordinator and some nodes in ``folder``; processes live on ``stage``."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        self.folder = folder
        self._stage = stage
        self.address = self.enrolment = ""  # HOST:PORT, once the coordinator serves

    # -- commands --------------------------------------------------------------------------------

    def minga(self, *words: str, name: str, said: str = "") -> str:
        """Run one command to its end, ``said`` on its standard input; its standard output.

        Raises:
            ChildProcessError: it failed; with what it said.
        """
        done = subprocess.run(
            [sys.executable, "-m", "infra.cli", *words],
            input=said,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())[-400:]
            raise ChildProcessError(f"{name} ended with {done.returncode}: {said}")
        return done.stdout

    def initialise(self, *, log: bool = True) -> None:
        """Make the coordinator's folder.

        Args:
            log: whether it keeps a round log; light nodes sign nothing for one.
        """
        address, enrolment = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.minga(
            "coordinator", "init", "--dir", str(self.folder), "--federation", "bench",
            "--address", address, "--enrolment", enrolment, "--ungoverned",
            "--log" if log else "--no-log", name="coordinator init",
        )  # fmt: skip
        self.address, self.enrolment = address, enrolment

    def start_coordinator(self, *, log: bool = True) -> subprocess.Popen[bytes]:
        """Make the coordinator's folder and serve it."""
        self.initialise(log=log)
        return self.serve()

    def start_after(self, work: Callable[[Path], T]) -> tuple[subprocess.Popen[bytes], T]:
        """Make the folder of a coordinator without a log, do something with it, then serve it."""
        self.initialise(log=False)
        found = work(self.folder)
        return self.serve(), found

    def serve(self) -> subprocess.Popen[bytes]:
        """Serve the folder that was made."""
        process = self._stage.start(
            "coordinator",
            [sys.executable, "-m", "infra.cli", "coordinator", "serve", "--dir", str(self.folder)],
            role="server",
        )
        wait_for_port(int(self.address.rpartition(":")[2]), process=process, timeout_s=60)
        return process

    def invitations(self, institutions: list[str]) -> dict[str, str]:
        """One invitation for each."""
        with AdminClient(find_operator(folder=self.folder, config=None, environment={})) as client:
            return {name: client.invite(name) for name in institutions}

    def join(self, name: str, token: str) -> Path:
        """Enrol an institution; the folder of its node."""
        folder = self.folder / "nodes" / name
        # By standard input: arguments can be read by every user of the machine.
        self.minga(
            "node", "join", "--dir", str(folder), "--coordinator", self.address,
            "--enrolment", self.enrolment, "--token", "-",
            name="node join", said=f"{token}\n",
        )  # fmt: skip
        return folder

    def start_node(self, name: str, folder: Path) -> subprocess.Popen[bytes]:
        """Run an institution's agent."""
        command = [sys.executable, "-m", "infra.cli", "node", "run", "--dir", str(folder)]
        return self._stage.start(name, command, role="client")

    # -- the run ---------------------------------------------------------------------------------

    def write_model(self, params: int) -> Path:
        """The snapshot folder of round 0: one tensor, not constant, written piece by piece."""
        folder = self.folder / "initial"
        folder.mkdir(parents=True)
        manifest = Manifest(tensors=(TensorSpec(TENSOR, (params,)),))
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
        np.asarray(first_model(params), "<f4").tofile(folder / "theta.f32")
        return folder

    def submit(self, job: Job, roster: list[str]) -> None:
        """Submit the plan, by the command that operators use."""
        snapshot = self.write_model(job.params)
        plan = {
            "run": RUN,
            "title": "benchmark",
            "mode": "open",
            "roster": sorted(roster),
            "min_participants": len(roster),
            "rounds": job.rounds + 2,
            "model": {"family": "vector"},
            "local_step": {"kind": "synthetic", "synthetic": {"delta": DELTA}},
            "deadlines": dict.fromkeys(("join", "train", "upload"), int(job.timeout_s)),
        }
        path = self.folder / "plan.json"
        path.write_text(json.dumps(plan))
        self.minga(
            "run", "submit", str(path), "--snapshot", str(snapshot), "--dir", str(self.folder),
            name="run submit",
        )  # fmt: skip

    def facts(self) -> Any:
        """The run as the coordinator tells it to operators, with the bytes of its snapshots."""
        with operator_stub(self.folder) as stub:
            return stub.ShowRun(admin_pb2.ShowRunRequest(run=RUN), timeout=20)

    def wait_until_done(
        self,
        job: Job,
        watched: dict[str, subprocess.Popen[bytes]],
        *,
        ends: subprocess.Popen[bytes] | None = None,
    ) -> Any:
        """Until the run has ended well; its facts.

        It asks every few seconds only, not to disturb what is measured.

        Raises:
            TooLongError, ChildProcessError: it did not; the sentence says how far it got.
        """
        until = time.monotonic() + job.timeout_s
        while True:
            facts = self.facts()
            if facts.status == "done":
                return facts
            phases = [f"{entry.phase.name} ({entry.why})" for entry in facts.rounds]
            if ends is not None and ends.poll() not in (None, 0):
                raise ChildProcessError(f"the nodes ended with {ends.returncode}")
            if facts.status != "active":
                raise ChildProcessError(f"the run is {facts.status}: {phases[-1:]}")
            for name, process in watched.items():
                if process.poll() is not None:
                    raise ChildProcessError(
                        f"{name} ended with {process.returncode}: {self._stage.tail(name)}"
                    )
            if time.monotonic() > until:
                raise TooLongError(f"not done within {job.timeout_s:.0f} s: {phases[-1:]}")
            time.sleep(2.0)

    def check_model(self, facts: Any, job: Job) -> None:
        """The last model must be the first one plus ``DELTA`` for each round, within the ring's
        resolution.

        Raises:
            ChildProcessError: it is not.
        """
        with AdminClient(find_operator(folder=self.folder, config=None, environment={})) as client:
            last = Snapshot.from_bytes(facts.rounds[-1].next_snapshot)
            path = self.folder / "last.f32"
            client.fetch(last.theta, path)
        theta = np.memmap(path, "<f4", "r", shape=(job.params,))
        first = np.arange(0, job.params, STRIDE) % PERIOD * GRAIN
        moved = theta[::STRIDE].astype(np.float64) - first
        want = DELTA * len(facts.rounds)
        if np.abs(moved - want).max() > 2e-3 * want:
            raise ChildProcessError(
                f"wrong model: it moved by {moved.min()} to {moved.max()}, not by {want}"
            )


def measured(facts: Any, job: Job, stage: Stage) -> Measured:
    """Read the coordinator's own record of a run.

    A round lasts from the moment it opens to the moment the next one does. The first is warm-up,
    the last one only marks the end of the one before it.

    Raises:
        ChildProcessError: a round did not end well at the first try.
    """
    opened, spent = [], []
    for entry in facts.rounds:
        if entry.phase.name != "Released" or not entry.phase.model_root:
            raise ChildProcessError(
                f"round {entry.round.number} is {entry.phase.name}: {entry.why}"
            )
        opened.append(entry.times[0].entered_at_ms)
        spent.append([(time_.phase, time_.entered_at_ms) for time_ in entry.times])
    seconds = [(after - before) / 1000 for before, after in itertools.pairwise(opened)]
    if len(seconds) != job.rounds + 1:
        raise ChildProcessError(f"{len(opened)} rounds were opened, not {job.rounds + 2}")
    phases: dict[str, float] = {}
    for number in range(1, job.rounds + 1):
        marks = [*spent[number], ("", opened[number + 1])]
        for (phase, begun), (_, ended) in itertools.pairwise(marks):
            phases[phase] = phases.get(phase, 0.0) + (ended - begun) / 1000 / job.rounds
    traffic = [node for entry in facts.rounds[1:-1] for node in entry.traffic]
    return Measured(
        seconds=seconds[1:],
        phases=phases,
        up=max(node.bytes_up for node in traffic),
        down=max(node.bytes_down for node in traffic),
        rss_mb=stage.peak_rss_mb("server") or 0.0,
        private_mb=stage.peak_private_mb("server") or 0.0,
        peak_in=_phase_at(facts, stage.peak_at("server") or 0.0),
        begun=opened[1] / 1000,
        ended=opened[-1] / 1000,
    )


def _phase_at(facts: Any, at: float) -> str:
    """Round and phase at a moment, seconds since 1970."""
    found = "before the first round"
    for entry in facts.rounds:
        for time_ in entry.times:
            if time_.entered_at_ms / 1000 <= at:
                found = f"{time_.phase} of round {entry.round.number}"
    return found
