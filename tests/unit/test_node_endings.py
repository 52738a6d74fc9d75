"""A worker's spool does not grow for ever, and loses nothing that is still of use."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest

from node_agent.endings import ABSENT_S, EVIDENCE, Ending, Endings, may_go
from node_agent.journal import Journal
from node_agent.launchers.jobs import Launcher
from node_agent.rules import Refusal
from node_agent.spool import Spool, StatusWriter, write_job
from protocols.identifiers import RunId
from tests.support.node import NOW, RUN, confirmed, digest, round_seen, run_seen, the_plan
from tests.unit.test_node_decide import LAST, RELEASED, TRAINING
from tests.unit.test_worker_spool import JOB

DONE = run_seen(round_seen(RELEASED), status="done")
ENDED = Ending(seen=DONE, absent_s=0.0, busy=False, unsaid=False, stopped_for=None)
GONE = replace(ENDED, seen=None)
ACTIVE = run_seen(round_seen(TRAINING))


@pytest.mark.parametrize(
    ("what", "ending", "goes"),
    [
        ("it ended", ENDED, True),
        ("before its first round", replace(ENDED, seen=run_seen(status="stopped")), True),
        ("it goes on", replace(ENDED, seen=ACTIVE), False),
        (
            "it was stopped, and its round is not over",
            replace(ENDED, seen=run_seen(round_seen(TRAINING), status="stopped")),
            False,
        ),
        ("a worker is on a job", replace(ENDED, busy=True), False),
        ("its last model is to be confirmed", replace(ENDED, unsaid=True), False),
        ("it is not shown, for a moment", replace(ENDED, seen=None, absent_s=ABSENT_S - 1), False),
        ("it is not shown", replace(ENDED, seen=None, absent_s=ABSENT_S), True),
        ("nobody asks for its model", replace(GONE, absent_s=ABSENT_S, unsaid=True), True),
        ("not shown, a worker on it", replace(ENDED, seen=None, absent_s=1e9, busy=True), False),
        ("evidence", replace(ENDED, stopped_for=EVIDENCE - timedelta(1)), False),
        ("evidence, not shown", replace(GONE, absent_s=1e9, stopped_for=timedelta()), False),
        ("old evidence", replace(ENDED, seen=ACTIVE, stopped_for=EVIDENCE), True),
    ],
)  # fmt: skip
def test_when_it_goes(what, ending, goes):
    assert may_go(ending) is goes, what


def test_nothing_goes_while_a_worker_is_on_it_or_the_run_goes_on():
    """Whatever else is so."""
    stopped = (None, timedelta(), 2 * EVIDENCE)
    for seen, absent, unsaid, old in product(
        (None, DONE, ACTIVE), (0.0, 1e9), (False, True), stopped
    ):
        ending = Ending(seen=seen, absent_s=absent, busy=True, unsaid=unsaid, stopped_for=old)
        assert not may_go(ending)
        if seen is ACTIVE and old is None:
            assert not may_go(replace(ending, busy=False))


class Node:
    """A spool with all that a worker keeps of one run, and the journal."""

    def __init__(self, root: Path) -> None:
        self.journal = Journal(root / "journal.sqlite", now=lambda: NOW)
        self.launcher = Launcher(spool=Spool(root / "spool").make())
        self.endings = Endings()
        self.job = JOB.model_copy(update={"id": f"{RUN}.3", "run": RUN})
        spool = self.launcher.spool
        self.launcher.submit(self.job)
        StatusWriter(spool.status(self.job.id), now=lambda: 1.0).event("failed", code="x.y")
        (spool.state(RUN) / "000003").mkdir(parents=True)
        (spool.root / "carry" / RUN).mkdir(parents=True)
        (spool.root / "carry" / RUN / "mean.json").touch()
        other = JOB.model_copy(update={"id": "r10.0", "run": "r10"})
        write_job(spool, other)

    def look(self, *shown, monotonic: float = 0.0, now=NOW) -> set[str]:
        """Look once; what there is of the run afterwards."""
        other = replace(ACTIVE, run=RunId("r10"))
        self.endings.look(
            [self.launcher], [*shown, other], self.journal, now=now, monotonic=monotonic
        )
        root = self.launcher.spool.root
        left = {
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() or path.name == "000003"
        }
        assert "jobs/r10.0.json" in left
        return left - {"jobs/r10.0.json"}


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    yield made
    made.journal.close()


def test_what_is_left_of_an_ended_run_is_removed(node):
    assert len(node.look(ACTIVE)) == 4
    assert node.look(DONE) == set()
    assert node.launcher.under_way() == []  # or a worker would be started for nothing
    assert node.look(DONE) == set()


def test_a_run_whose_last_model_was_not_confirmed_keeps_it(node):
    """The node took part in the last round; it computes, then says what it found."""
    node.journal.add_run(the_plan())
    seen = run_seen(round_seen(RELEASED), last=LAST, status="done")
    node.journal.add_decision(LAST.round, index=0, start_root=LAST.start.model_root, refusal=None)
    assert len(node.look(seen)) == 4
    node.journal.add_confirm(confirmed(computed=digest("x"), answered=False))
    assert len(node.look(seen)) == 4
    node.journal.confirm_answered(LAST.round)
    assert node.look(seen) == set()


def test_a_run_that_is_not_shown_any_more_goes_after_a_while(node):
    assert len(node.look(monotonic=5.0)) == 4
    assert len(node.look(monotonic=5.0 + ABSENT_S - 1)) == 4
    assert len(node.look(ACTIVE, monotonic=5.0 + ABSENT_S)) == 4  # shown again: from the beginning
    assert len(node.look(monotonic=6.0 + ABSENT_S)) == 4
    assert node.look(monotonic=6.0 + 2 * ABSENT_S) == set()


def test_evidence_stays_for_thirty_days(node):
    """This node objected: what its worker did is kept, whatever becomes of the run."""
    node.journal.add_run(the_plan())
    node.journal.stop_run(RUN, Refusal("model_disagreement", "another model"))
    assert len(node.look(DONE)) == 4
    assert len(node.look(DONE, now=NOW + EVIDENCE - timedelta(hours=1))) == 4
    assert node.look(DONE, now=NOW + EVIDENCE) == set()
