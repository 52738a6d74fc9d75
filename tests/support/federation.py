"""A real federation for tests: coordinator and agents as processes, synthetic updates, no torch.

    with running(tmp_path, nodes=3) as federation:
        run = federation.submit(rounds=2)
        report = federation.wait(run)                  # until the run has ended
        federation.household.kill("node-1")            # SIGKILL; federation.start_node("node-1")

Every update is the same constant, and by default it lies exactly on the grid of the fixed scale:
rounding draws nothing, so the sum and the next model have the same digests in every run. The
metric ``nodes`` of a sum says how many updates were added, and ``weight`` says it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.demo.federation import COORDINATOR, Federation
from infra.demo.follow import Entry, History
from infra.demo.processes import Child, Household, tail
from infra.runs.client import AdminClient
from infra.runs.facts import RoundReport, RunReport
from infra.runs.plan_file import complete_plan, federation_of, read_initial_model
from infra.runs.submission import submit
from protocols.errors import NotReadyError
from protocols.identifiers import RunId
from protocols.tensors.manifest import Manifest, TensorSpec
from tests.support.faulty_coordinator import shift

ROOT = Path(__file__).parents[2]
CLOCK = "clock"  # file beside coordinator/ that says how far its clock is off
GRID = 10  # exponent of the fixed scale: 1,024 steps per 1.0
ON_GRID = 2.0**-GRID  # one step
PATIENCE_S = 180.0  # a busy machine; nothing waits for it when all goes well

__all__ = ["COORDINATOR", "Running", "running"]


class ClockedFederation(Federation):
    """Its coordinator is the real one with a clock that a test may set."""

    def start_coordinator(self) -> Child:
        """Start serving; does not wait."""
        command = self.household.python(
            "tests.support.faulty_coordinator",
            *("--dir", str(self.folder), "--clock", str(self.folder / CLOCK)),
            *("--faults", str(self.folder / "faults" / COORDINATOR)),
        )
        return self.household.start(
            COORDINATOR, command, log=self.log(COORDINATOR), environment={"PYTHONPATH": str(ROOT)}
        )


@dataclass(frozen=True, kw_only=True)
class Running:
    """A federation that serves, and an operator's connection to it."""

    federation: Federation
    client: AdminClient
    sites: tuple[str, ...]

    @property
    def household(self) -> Household:
        """The processes: kill, stop, pause, resume."""
        return self.federation.household

    @property
    def folder(self) -> Path:
        """As in a real deployment: coordinator/, nodes/<site>/, blobs/."""
        return self.federation.folder

    # -- runs ------------------------------------------------------------------------------------

    def submit(
        self,
        run: str = "run-1",
        *,
        rounds: int = 2,
        coordinates: int = 5_000,
        delta: float = ON_GRID,
        **changes: Any,
    ) -> RunId:
        """Submit a run of synthetic updates on a model of zeros.

        Args:
            run: its id.
            rounds: training rounds.
            coordinates: of the model, one tensor.
            delta: every coordinate of every update.
            changes: further fields of the plan, such as ``min_participants`` or ``deadlines``.
        """
        folder = self.folder / "start" / run
        folder.mkdir(parents=True)
        manifest = Manifest((TensorSpec("vector", (coordinates,)),))
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
        np.zeros(coordinates, "<f4").tofile(folder / "theta.f32")
        written: dict[str, Any] = {
            "run": run,
            "mode": "open",
            "roster": sorted(self.sites),
            "min_participants": len(self.sites),
            "rounds": rounds,
            "model": {"family": "vector"},
            "local_step": {"kind": "synthetic", "synthetic": {"delta": delta}},
            "vector": {"ring_bits": 20, "scale": {"mode": "fixed", "exponent": GRID}},
            "deadlines": {
                "join": 120,
                "train": 120,
                "deal": 120,
                "upload": 120,
                "commit": 120,
                "reveal": 120,
            },
        }
        return self.submit_written(folder, written | changes)

    def submit_written(self, folder: Path, written: dict[str, Any]) -> RunId:
        """Submit a run of an author's plan, from the model that lies in ``folder``."""
        model = read_initial_model(folder)
        operator = self.federation.operator()
        made = complete_plan(
            written, model, federation_of(operator.certificate), self.client.signing_keys()
        )
        submit(self.client, made, model)
        return RunId(written["run"])

    def wait(
        self,
        run: RunId,
        until: Callable[[RunReport], bool] = lambda report: report.ended,
        *,
        timeout_s: float = PATIENCE_S,
        check: bool = True,
    ) -> RunReport:
        """The run once ``until`` holds.

        Args:
            run: which.
            until: asked about ten times a second.
            timeout_s: after it the test fails, with the ends of all logs.
            check: whether a child that ends by itself fails the test at once.
        """
        give_up = time.monotonic() + timeout_s
        last: RunReport | None = None
        while time.monotonic() < give_up:
            if check:
                self.household.check()
            try:
                last = self.client.show(run)
            except NotReadyError:  # killed by the test, or just starting
                last = None
            if last is not None and until(last):
                return last
            time.sleep(0.1)
        raise AssertionError(f"{run} did not get there in time: {last}\n{self.logs()}")

    def confirmed(self, run: RunId, *, timeout_s: float = PATIENCE_S) -> RunReport:
        """The ended run, once every survivor has said which model it computed."""

        def complete(report: RunReport) -> bool:
            return report.ended and all(
                {entry.node for entry in round_.traffic if entry.confirmed} >= set(round_.survivors)
                for round_ in report.released
            )

        return self.wait(run, complete, timeout_s=timeout_s)

    @contextmanager
    def history(self, run: RunId) -> Iterator[History]:
        """The coordinator's history of a run as it happens."""
        with History(self.federation.client, run) as history:
            yield history

    def entries(
        self, history: History, wanted: Callable[[Entry], bool], *, timeout_s: float = PATIENCE_S
    ) -> Entry:
        """The next entry of the history that is wanted."""
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            entry = history.next(timeout_s=1.0)
            if entry is not None and wanted(entry):
                return entry
        raise AssertionError(f"the history did not get there in time\n{self.logs()}")

    # -- time ------------------------------------------------------------------------------------

    def jump(self, by_s: float) -> None:
        """Let the coordinator's clock jump; only with ``running(clock=True)``."""
        shift(self.folder / CLOCK, by_s)

    def pass_deadline(self, run: RunId, phase: str, without: str, *, by_s: float) -> None:
        """Let the deadline of a phase pass once everybody but one has done what it asks for."""
        others = set(self.sites) - {without}

        def there(report: RunReport) -> bool:
            now = report.current
            return now is not None and now.phase == phase and set(now.ready) >= others

        self.wait(run, there)
        self.jump(by_s)

    # -- processes -------------------------------------------------------------------------------

    def start_node(self, site: str) -> None:
        """Start an agent (again)."""
        self.federation.start_node(site)

    def start_held(self, site: str, *, at: str, until: Path) -> None:
        """Start an agent that stands still at an instant until a file exists (node_crash)."""
        folder = self.federation.node_folder(site)
        command = self.household.python(
            "tests.support.node_crash",
            *("--dir", str(folder), "--at", at, "--hold", str(until)),
        )
        path = {"PYTHONPATH": str(ROOT)}
        self.household.start(site, command, log=self.federation.log(site), environment=path)

    def start_coordinator(self) -> None:
        """Start the coordinator (again) and wait until it answers."""
        self.federation.start_coordinator()
        self.federation.wait_until_serving(self.client)

    def logs(self) -> str:
        """The ends of all diagnostics, for a test that fails."""
        names = (COORDINATOR, *self.sites)
        paths = {name: self.federation.log(name) for name in names}
        # Further coordinators, and whoever else was started beside them (tests.support.second).
        paths |= {str(path.parent.name): path for path in self.folder.glob("*/diagnostics.log")}
        return "\n".join(f"{name}:\n{tail(path, 15)}" for name, path in paths.items())


def results(report: RunReport) -> list[tuple[str, str, int, int]]:
    """What came out of each released round: sum, model, nodes and weight in the sum."""

    def one(round_: RoundReport) -> tuple[str, str, int, int]:
        return (round_.sum, round_.model_out, round_.metrics["nodes"], round_.metrics["weight"])

    return [one(round_) for round_ in report.released]


@contextmanager
def running(
    folder: Path,
    *,
    nodes: int | Sequence[str] = 3,
    start: bool = True,
    federation: str = "test",
    log: bool = True,
    clock: bool = False,
    ledger: str = "",
) -> Iterator[Running]:
    """A coordinator that serves and nodes that have joined; everything is stopped at the end.

    Args:
        folder: empty or missing; a relative or absolute path.
        nodes: how many (node-1, node-2, ...), or their ids.
        start: whether the agents run from the beginning.
        federation: its name.
        log: whether it keeps a round log. Every node that has joined is a witness: with two of
            them, one whose agent does not run stops all rounds.
        clock: whether the coordinator's clock may be set, with ``Running.jump``.
        ledger: URL of an empty database; SQLite if not given.
    """
    sites = (
        tuple(f"node-{number + 1}" for number in range(nodes))
        if isinstance(nodes, int)
        else tuple(nodes)
    )
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with Household(folder) as household:
        kind = ClockedFederation if clock else Federation
        parts = kind(folder=folder, household=household)
        parts.initialise(name=federation, log=log, ledger=ledger)
        parts.start_coordinator()
        with parts.client() as client:
            parts.wait_until_serving(client)
            for site in sites:
                parts.join(site, client.invite(site))
            made = Running(federation=parts, client=client, sites=sites)
            if start:
                for site in sites:
                    made.start_node(site)
            yield made
