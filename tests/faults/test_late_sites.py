"""A site that is too slow for a round: its work is in a later sum, all of it and once.

Real processes: a coordinator whose clock the test sets, and three nodes with a worker that counts
(tests/support/fake_worker.py): its update is one step of the grid for each of its steps. So every
sum is a whole number that says whose steps are in it. What the real worker does when it is told to
finish is in ``tests/numerics/test_worker_training.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.runs.facts import RoundReport, RunReport
from node_agent.config import NodeFolder
from node_agent.journal import Journal
from node_agent.spool import Spool, last_status
from protocols.errors import MalformedMessageError
from protocols.identifiers import RunId
from tests.support.federation import GRID, Running, running
from tests.support.node import NOW
from tests.support.worker import wait_for

ROOT = Path(__file__).parents[2]
SLOW = "node-3"
LONG_S = 900  # nothing waits so long: the test lets the coordinator's clock jump over it
USUAL = 2  # steps of the others in every round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Sites:
    """A federation of light nodes, and what its workers are told."""

    def __init__(self, federation: Running) -> None:
        self.federation = federation

    def folder(self, site: str) -> NodeFolder:
        return NodeFolder(self.federation.folder / "nodes" / site)

    def spool(self, site: str) -> Spool:
        return Spool(self.folder(site).spool.resolve()).make()

    def start(self, site: str, *arguments: str) -> None:
        """Start an agent (again)."""
        home = self.folder(site).root
        command = [sys.executable, "-m", "tests.support.light_node", "--dir", str(home), *arguments]
        self.federation.household.start(
            site,
            command,
            log=self.federation.federation.log(site),
            environment={"PYTHONPATH": str(ROOT)},
        )

    def steps(self, site: str, number: int, count: int) -> None:
        """After how many steps a round's job ends; of one that is past them: now."""
        (self.spool(site).root / f"steps.{number}").write_text(str(count))

    def at_work(self, run: RunId, number: int, *, steps: int = 3) -> None:
        """Wait until the slow site has done some steps of a round."""
        spool = self.spool(SLOW)

        def there() -> bool:
            try:
                last = last_status(spool, f"{run}.{number}")
            except MalformedMessageError:
                return False
            return last is not None and (last.step or 0) >= steps

        wait_for(there)

    def said(self, run: RunId) -> list[tuple[int | None, str]]:
        """What the slow site's journal says of a run: round and what."""
        journal = Journal(self.folder(SLOW).journal, now=lambda: NOW, read_only=True)
        try:
            return [(entry.number, entry.what) for entry in journal.entries(run=run)]
        finally:
            journal.close()

    def late(self, run: RunId, number: int) -> int:
        """Steps in what the slow site kept of a round, once it has."""
        path = self.spool(SLOW).root / "carry" / run / f"late-{number}.f32"
        wait_for(lambda: (number, "carried over") in self.said(run))
        return steps_of(np.fromfile(path, "<f4"))

    def model(self, run: RunId, root: str) -> np.ndarray:
        path = self.folder("node-1").run_models(run) / root / "theta.f32"
        wait_for(path.exists)
        return np.fromfile(path, "<f4")

    def released(self, run: RunId, number: int) -> RoundReport:
        """A round, once its sum is public."""

        def there(report: RunReport) -> bool:
            return any(round_.round.number == number for round_ in report.released)

        report = self.federation.wait(run, there)
        (found,) = [each for each in report.released if each.round.number == number]
        return found

    def summed(self, run: RunId, number: int) -> int:
        """Steps of all sites in a round's sum: what it moved the model by."""
        round_ = self.released(run, number)
        moved = self.model(run, round_.model_out) - self.model(run, round_.model_in)
        return steps_of(moved * len(round_.survivors))


def steps_of(values: np.ndarray) -> int:
    """An update of equal coordinates, in steps of the grid."""
    assert values.size
    assert np.ptp(values) == 0
    steps = float(values[0]) * 2**GRID
    assert steps == pytest.approx(round(steps), abs=1e-3)
    return round(steps)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    with running(tmp_path / "f", nodes=3, start=False, log=False, clock=True) as federation:
        made = Sites(federation)
        for site in federation.sites:
            text = made.folder(site).root / "text.jsonl"
            text.write_text('{"text":"minga"}\n')
            config = made.folder(site).root / "config.toml"
            lines = config.read_text().splitlines()
            lines = [f'train = ["{text}"]' if line.startswith("train") else line for line in lines]
            config.write_text("\n".join(lines) + "\n")
            (made.spool(site).root / "behave").write_text("counts\n" * 9)
            for number in range(9):
                if site != SLOW:
                    made.steps(site, number, USUAL)
            made.start(site)
        yield made


def test_the_work_of_a_late_site_is_in_the_next_sum_it_is_part_of(sites):
    """Round 0: it is done too late. Round 2: it is withdrawn in mid-training."""
    federation = sites.federation
    run = federation.submit(
        "late",
        rounds=5,
        min_participants=2,
        local_step={"kind": "builtin", "max_steps": 10**6},
        deadlines=dict.fromkeys(("join", "train", "upload"), LONG_S),
    )

    def without_the_slow_one(number: int) -> None:
        federation.wait(run, lambda report: report.current.round.number == number)
        federation.pass_deadline(run, "Training", SLOW, by_s=LONG_S + 1)
        assert sites.summed(run, number) == 2 * USUAL

    sites.at_work(run, 0)
    federation.household.pause([SLOW])  # its worker goes on
    sites.steps(SLOW, 0, 1)
    wait_for(sites.spool(SLOW).result(f"{run}.0").exists)
    without_the_slow_one(0)
    sites.steps(SLOW, 1, 7)
    federation.household.resume([SLOW])
    first = sites.late(run, 0)
    assert first >= 3
    assert sites.summed(run, 1) == 2 * USUAL + 7 + first

    sites.at_work(run, 2)
    sites.steps(SLOW, 3, 5)
    without_the_slow_one(2)
    second = sites.late(run, 2)
    assert second >= 3
    assert sites.summed(run, 3) == 2 * USUAL + 5 + second

    sites.steps(SLOW, 4, 1)
    assert sites.summed(run, 4) == 2 * USUAL + 1  # nothing twice
    federation.confirmed(run)
