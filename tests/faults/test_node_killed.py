"""A node is killed with SIGKILL at every instant that matters, again and again, in one run.

Right before and right after each statement is written to the journal, in the middle of an upload
and of a download, before a model gets its name. The run must end as an undisturbed one does: same
sums, same models; nothing said twice, nothing trained twice, no byte sent twice beyond one unit.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from node_agent.journal import Journal
from protocols.tensors.sizes import UNIT
from tests.support.federation import PATIENCE_S, results, running

ROOT = Path(__file__).parents[2]
VICTIM, OTHER = "node-1", "node-2"
COORDINATES = 4_000_000  # 10 MB up: three units; 16 MB of theta: four
SLOW = dict.fromkeys(("join", "train", "deal", "upload", "commit", "reveal"), 900)

# In the order in which one round reaches them; each launch of the node dies at one of them.
INSTANTS = (
    "add_run:before",
    "add_run:after",
    "unit:after:2",  # of theta
    "_finish:before",  # the model is complete, but has no name
    "add_decision:before",
    "add_decision:after",
    "add_outcome:before",
    "add_outcome:after",
    "add_upload:before",  # the vector is on the disk, unsigned
    "add_upload:after",
    "append:before:2",  # in the first unit
    "append:before:7",  # in the second
    "add_receipt:before",
    "add_receipt:after",
    "unit:after:2",  # of the sum
    "compute_next:after",
    "add_confirm:before",
    "add_confirm:after",
    "confirm_answered:before",
    "confirm_answered:after",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def launch(folder: Path, at: str) -> subprocess.Popen[bytes]:
    """The agent of a node, with one crash armed."""
    log = (folder / "crash.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.node_crash", "--dir", str(folder), "--at", at],
        stdout=log,
        stderr=log,
        cwd=ROOT,
    )


def test_a_node_killed_at_every_instant(tmp_path):
    with running(tmp_path / "federation", nodes=2, start=False) as federation:
        federation.start_node(OTHER)
        federation.start_node(VICTIM)
        undisturbed = federation.submit("calm", rounds=3, coordinates=COORDINATES)
        wanted = results(federation.confirmed(undisturbed))
        federation.household.stop(VICTIM)

        folder = federation.folder / "nodes" / VICTIM
        run = federation.submit("storm", rounds=3, coordinates=COORDINATES, deadlines=SLOW)
        for at in INSTANTS:
            agent = launch(folder, at)
            try:
                status = agent.wait(timeout=PATIENCE_S)
            finally:
                agent.kill()
            assert status == -signal.SIGKILL, (folder / "crash.log").read_text()[-2000:]
        federation.start_node(VICTIM)
        report = federation.confirmed(run)

        assert (folder / "crashed").read_text().split() == list(INSTANTS)
        assert report.status == "done"
        assert results(report) == wanted
        for round_ in report.released:
            (traffic,) = [line for line in round_.traffic if line.node == VICTIM]
            assert traffic.confirmed == round_.model_out
            vector = next(line for line in round_.traffic if line.node == OTHER).up
            assert traffic.up <= vector + 2 * UNIT  # two crashes while it was sent

    journal = Journal(folder / "journal.sqlite", now=lambda: datetime.now(UTC), read_only=True)
    said = Counter((entry.run, entry.number, entry.what) for entry in journal.entries(run=run))
    starts = sum(entry.what == "start" for entry in journal.entries())
    journal.close()
    assert set(said.values()) == {1}  # each statement stands once
    # The last upload ends the phase: killed before it kept the receipt, a node is not asked again.
    spoken = {what for _, number, what in said if number == 0} - {"receipt"}
    assert spoken == {"join", "ready", "upload", "confirm"}
    assert starts == len(INSTANTS) + 2
    leftovers = [path.name for path in (folder / "spool" / "uploads").iterdir()]
    assert leftovers == [], leftovers
