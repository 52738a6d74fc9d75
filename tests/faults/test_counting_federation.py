"""What is in a sum, and what is not: late work once, held-out scores of enough sites.

Real processes: a coordinator whose clock the test sets, and four nodes with a worker that counts
(tests/support/fake_worker.py): its update is one step of the grid for each of its steps. So every
sum is a whole number that says whose steps are in it. What the real worker does when it is told to
finish is in ``tests/numerics/test_worker_training.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.runs.facts import RoundReport, RunReport
from node_agent.config import NodeFolder
from node_agent.journal import Journal
from node_agent.spool import Spool, last_status, runs_in
from protocols.errors import MalformedMessageError
from protocols.identifiers import RunId
from tests.support.federation import GRID, Running, running
from tests.support.node import NOW
from tests.support.worker import wait_for

ROOT = Path(__file__).parents[2]
SLOW = "node-4"
LONG_S = 900  # nothing waits so long: the test lets the coordinator's clock jump over it
USUAL = 2  # steps of the others in every round
SLOW_TOO = 4  # the round in which the others are slower
OTHERS = 3 * USUAL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Sites:
    """A federation of light nodes, and what its workers are told."""

    def __init__(self, federation: Running) -> None:
        self.federation = federation

    def folder(self, site: str) -> NodeFolder:
        return NodeFolder(self.federation.folder / "nodes" / site)

    def spool(self, site: str) -> Spool:
        return Spool(self.folder(site).spool.resolve()).make()

    def start(self, site: str) -> None:
        """Start an agent."""
        home = self.folder(site).root
        command = [sys.executable, "-m", "tests.support.light_node", "--dir", str(home)]
        self.federation.household.start(
            site,
            command,
            log=self.federation.federation.log(site),
            environment={"PYTHONPATH": str(ROOT)},
        )

    def steps(self, site: str, number: int, count: int) -> None:
        """How many steps a round's job has; one that did more of them ends now."""
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


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    folder = tmp_path_factory.mktemp("counting") / "f"
    with running(folder, nodes=4, start=False, log=False, clock=True) as federation:
        made = Sites(federation)
        for site in federation.sites:
            text = made.folder(site).root / "text.jsonl"
            text.write_text('{"text":"minga"}\n')
            config = made.folder(site).root / "config.toml"
            lines = config.read_text().splitlines()
            lines = [line.replace("valid_public = false", "valid_public = true") for line in lines]
            for key in ("train", "valid"):
                lines = [
                    f'{key} = ["{text}"]' if line.startswith(f"{key} =") else line for line in lines
                ]
            config.write_text("\n".join(lines) + "\n")
            (made.spool(site).root / "behave").write_text("counts\n" * 9)
            for number in range(9):
                if site != SLOW and number != SLOW_TOO:
                    made.steps(site, number, USUAL)
            made.start(site)
        yield made


def test_the_work_of_a_late_site_is_in_the_next_sum_it_is_part_of(sites):
    """Round 0: done too late. 2: withdrawn in mid-training. 4: ready in time, uploaded too late.

    No round can end before what the test looks at in the one before was looked at: the slow site
    gets its steps only then.
    """
    federation = sites.federation
    run = federation.submit(
        "late",
        rounds=6,
        min_participants=2,
        local_step={"kind": "builtin", "max_steps": 10**6},
        deadlines=dict.fromkeys(("join", "train", "upload"), LONG_S),
    )

    def without_the_slow_one(number: int, phase: str = "Training") -> None:
        federation.wait(run, lambda report: report.current.round.number == number)
        federation.pass_deadline(run, phase, SLOW, by_s=LONG_S + 1)
        assert sites.summed(run, number) == OTHERS

    sites.at_work(run, 0)
    federation.household.pause([SLOW])  # its worker goes on
    sites.steps(SLOW, 0, 3)
    wait_for(sites.spool(SLOW).result(f"{run}.0").exists)
    without_the_slow_one(0)
    federation.household.resume([SLOW])
    assert sites.late(run, 0) == 3
    sites.steps(SLOW, 1, 7)
    assert sites.summed(run, 1) == OTHERS + 7 + 3

    sites.at_work(run, 2)
    without_the_slow_one(2)
    done = sites.late(run, 2)
    assert done >= 3
    sites.steps(SLOW, 3, 5)
    assert sites.summed(run, 3) == OTHERS + 5 + done

    sites.steps(SLOW, 4, 3)
    federation.wait(run, lambda r: r.current.round.number == 4 and SLOW in r.current.ready)
    wait_for(lambda: (4, "upload") in sites.said(run))  # its vector is made
    federation.household.pause([SLOW])
    for site in set(federation.sites) - {SLOW}:
        sites.steps(site, 4, USUAL)
    without_the_slow_one(4, "Uploading")
    federation.household.resume([SLOW])
    assert sites.late(run, 4) == 3
    sites.steps(SLOW, 5, 1)
    assert sites.summed(run, 5) == OTHERS + 1 + 3
    federation.confirmed(run)


# What each site holds: Guarani, Quechua and Portuguese are spoken at one site each, and one site
# alone is in Peru, one in Argentina. Node n's nats have a digit of their own: a total names who is
# in it, and how often.
TEXTS = {
    "node-1": {"country": "CL", "languages": ["es"]},
    "node-2": {"country": "CL", "languages": ["es", "gn"]},
    "node-3": {"country": "PE", "languages": ["es", "quy"]},
    "node-4": {"country": "AR", "languages": ["es", "pt"]},
}
WHOLE = {"threshold": 4, "min_surviving": 4, "colluders": 1}  # no node may be lost


def test_held_out_scores_of_few_sites_are_opened_with_others(sites):
    """Masked and open, in a training round and in the last one, which only evaluates."""
    federation = sites.federation
    for number, (site, texts) in enumerate(TEXTS.items()):
        rows = [
            {"language": language, "nll_nats": 1e4 + 10.0**number, "bytes": 10, "documents": 1}
            for language in texts["languages"]
        ]
        (sites.spool(site).root / "scores.json").write_text(json.dumps(rows))
        for index in range(2):
            sites.steps(site, index, USUAL)
    common = {
        "rounds": 1,
        "min_participants": 4,
        "local_step": {"kind": "builtin", "max_steps": 10},
        "evaluation": {"languages": ["es", "gn", "pt", "quy"], "sites": TEXTS, "min_sites": 2},
        "deadlines": dict.fromkeys(("join", "train", "deal", "upload", "commit", "reveal"), LONG_S),
    }
    plain = federation.submit("scores-open", **common)
    opened = federation.confirmed(plain)
    masked = federation.submit("scores-masked", mode="aggregate-only", secagg=WHOLE, **common)
    hidden = federation.confirmed(masked)

    assert len(opened.released) == len(hidden.released) == 2
    for plainly, masked_ in zip(opened.released, hidden.released, strict=True):
        assert masked_.sum == plainly.sum
        assert masked_.metrics == plainly.metrics
        figures = {name: value for name, value in masked_.metrics.items() if "/" in name}
        assert {name.partition("/")[2] for name in figures} == {"es", "other", "CL", "ZZ"}
        for name, texts, digits in (
            ("es", 4, 1111),
            ("other", 3, 1110),
            ("CL", 3, 21),
            ("ZZ", 4, 2200),
        ):
            assert figures[f"nll_millinats/{name}"] == 1000 * (10_000 * texts + digits), name
            assert figures[f"bytes/{name}"] == 10 * texts
            assert figures[f"documents/{name}"] == texts

    for site in federation.sites:  # what the worker kept of the runs goes by itself
        wait_for(lambda site=site: not runs_in(sites.spool(site)))
