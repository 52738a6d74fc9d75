"""The end of a demonstration, and the moment at which a striker strikes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from infra.demo.faults import Striker, Struck
from infra.demo.report import learned, learning_facts, print_end, summary, write_summary
from infra.demo.settings import Settings
from infra.demo.sites import SiteText
from infra.runs.facts import PhaseSpan, RoundReport, RunReport, Traffic
from protocols.errors import UnreachableError
from protocols.gen import admin_pb2, rounds_pb2
from protocols.identifiers import NodeId, RoundId, RunId

START = datetime(2026, 11, 23, 7, 0, tzinfo=UTC)
SETTINGS = Settings(sites=("a", "b"), rounds=1, mode="open", two_ranks=1, data="/text")
TEXTS = [
    SiteText(
        site=NodeId(site),
        documents=10,
        text_bytes=1000,
        languages=frozenset({"es"}),
        left_out=1,
    )
    for site in "ab"
]


def round_(number: int, *, millinats: int, phase: str = "Released") -> RoundReport:
    """A round whose starting model needs ``millinats`` for 1,000 bytes of Spanish."""
    released = phase == "Released"
    return RoundReport(
        round=RoundId(RunId("demo-1"), number),
        index=number,
        phase=phase,
        why="because",
        spans=(
            PhaseSpan(phase="Training", entered_at=START, seconds=5.0),
            PhaseSpan(phase=phase, entered_at=START + timedelta(seconds=5), seconds=None),
        ),
        traffic=(
            Traffic(node="a", up=100, down=50, confirmed="f" * 64),
            Traffic(node="b", up=101, down=51, confirmed=""),
        ),
        metrics={
            "nll_millinats/es": millinats,
            "bytes/es": 1000,
            "documents/es": 3,
            "tokens": 100,
            "loss_micronats": 200_000_000,
        },
        model_in="a" * 64,
        model_out="f" * 64 if released else "",
        sum="5" * 64 if released else "",
        survivors=("a", "b") if released else (),
        ready=("a",),
        next_snapshot=b"{}" if released else None,
    )


def run_of(*rounds: RoundReport, status: str = "done") -> RunReport:
    return RunReport(
        run="demo-1",
        title="t",
        status=status,
        plan_digest="d" * 64,
        submitted_at=START,
        rounds_planned=2,
        rounds=rounds,
    )


BETTER = run_of(round_(0, millinats=5_545_177), round_(1, millinats=2_079_442))
WORSE = run_of(round_(0, millinats=2_079_442), round_(1, millinats=5_545_177))


def facts_of(run: RunReport, **kills: object) -> dict:
    return summary(run=run, settings=SETTINGS, texts=TEXTS, struck=[], seconds=12.34, **kills)


# -- the summary ---------------------------------------------------------------------------------


def test_learning_is_fewer_bits_per_byte_at_the_end():
    assert learned(BETTER)
    assert not learned(WORSE)
    assert not learned(run_of(round_(0, millinats=1)))  # one point shows nothing
    assert not learned(run_of())


def test_before_and_after_are_the_first_and_the_last_model():
    facts = learning_facts(BETTER)

    assert facts["all"] == facts["languages"]["es"]
    assert facts["all"]["before"] == pytest.approx(8.0, abs=1e-5)
    assert facts["all"]["after"] == pytest.approx(3.0, abs=1e-5)
    assert facts["all"]["change_percent"] == -62.5
    assert facts["all"]["training_rounds"] == 1


def test_the_summary_holds_what_was_printed_and_says_that_open_is_not_private(tmp_path):
    facts = facts_of(BETTER)
    path = write_summary(tmp_path, facts)
    read = json.loads(path.read_text("utf-8"))

    assert path == tmp_path / "report" / "summary.json"
    assert read == facts
    assert read["learned"] is True
    assert read["mode"]["masked"] is False
    assert read["mode"]["differentially_private"] is False
    assert "NOT PRIVATE" in read["mode"]["meaning"]
    assert read["traffic"] == {
        "a": {"bytes_up": 200, "bytes_down": 100},
        "b": {"bytes_up": 202, "bytes_down": 102},
    }
    assert read["seconds_by_phase"] == {"Training": 10.0}
    assert [site["training_processes"] for site in read["sites"]] == [2, 1]


def test_the_tables_and_the_label_are_printed():
    out = io.StringIO()

    print_end(Console(file=out, width=100, markup=False), BETTER, SETTINGS)

    text = out.getvalue()
    for words in ("8.000", "3.000", "-62.5 %", "200 B", "102 B", "Training", "NOT PRIVATE"):
        assert words in text, words


def test_a_run_that_was_never_evaluated_has_an_end_too():
    bare = replace(round_(0, millinats=0), metrics={})
    out = io.StringIO()

    print_end(Console(file=out, width=100, markup=False), run_of(bare), SETTINGS)

    assert learning_facts(run_of(bare)) == {"all": None, "languages": {}}
    assert "Bytes over the whole run" in out.getvalue()


# -- the striker ---------------------------------------------------------------------------------


class Household(set):
    """Who runs, and what was done to them."""

    def __init__(self, names):
        super().__init__(names)
        self.done = []

    def pause(self, names):
        self.done.append(("pause", tuple(names)))

    def resume(self, names):
        self.done.append(("resume", tuple(name for name in names if name in self)))


class Parts:
    """A federation whose processes are only names."""

    def __init__(self, *names):
        self.household = Household(names)
        self.restarted = []

    def kill(self, name):
        self.household.discard(name)
        self.household.done.append(("kill", name))
        return frozenset({1, 2})

    def restart(self, name, *, after_s):
        self.household.add(name)
        self.restarted.append((name, after_s))


class Client:
    """Answers with one report, or not at all."""

    def __init__(self, report):
        self.report = report

    def show(self, _run):
        if self.report is None:
            raise UnreachableError("away")
        return self.report


def entry(number: int, phase: str) -> admin_pb2.HistoryEntry:
    ref = rounds_pb2.RoundRef(run="demo-1", number=number)
    return admin_pb2.HistoryEntry(id=1, round=ref, phase=phase)


def striker(parts: Parts, target: str = "node", phase: str = "Uploading", **how) -> Striker:
    how = {"sites": ("a", "b"), "from_number": 1, "now": lambda: 1000.0} | how
    return Striker(parts, target=target, phase=phase, **how)


UPLOADING = run_of(round_(1, millinats=1, phase="Uploading"), status="active")


def test_it_kills_a_node_that_is_not_done_while_all_stand_still():
    parts = Parts("coordinator", "a", "b")

    made = striker(parts)
    struck = made.on_entry(entry(1, "Uploading"), Client(UPLOADING))

    assert struck is not None
    assert (struck.name, struck.phase, struck.round) == ("b", "Uploading", "demo-1/1")  # a is done
    assert parts.household.done == [
        ("pause", ("a", "b")),
        ("kill", "b"),
        ("resume", ("a",)),
    ]
    assert parts.restarted == []  # not yet: whoever watches is told first
    assert made.revive().restarted_at == 1000.0
    assert parts.restarted == [("b", 1.0)]
    assert (
        struck.killed_line() == "SIGKILL: node b (2 processes) in round demo-1/1, phase Uploading"
    )


@pytest.mark.parametrize(
    ("said", "report"),
    [
        (entry(1, "Training"), UPLOADING),  # not the phase
        (entry(0, "Uploading"), UPLOADING),  # too early
        (entry(1, "Uploading"), run_of(round_(1, millinats=1))),  # it is over already
        (entry(1, "Uploading"), run_of(round_(2, millinats=1, phase="Uploading"))),  # the next one
        (entry(1, "Uploading"), None),  # nobody answers
    ],
)
def test_it_lets_a_moment_pass_that_is_none(said, report):
    parts = Parts("coordinator", "a", "b")
    made = striker(parts)

    assert made.on_entry(said, Client(report)) is None

    assert made.struck is None
    assert ("kill", "b") not in parts.household.done
    paused = sum(what == "pause" for what, _ in parts.household.done)
    assert paused == sum(what == "resume" for what, _ in parts.household.done)


def test_nobody_is_killed_when_everybody_is_done():
    done = run_of(replace(UPLOADING.rounds[0], ready=("a", "b")), status="active")

    assert striker(Parts("a", "b")).on_entry(entry(1, "Uploading"), Client(done)) is None


def test_it_strikes_once():
    parts = Parts("coordinator", "a", "b")
    made = striker(parts, target="coordinator")

    assert made.on_entry(entry(1, "Uploading"), Client(UPLOADING)) is not None
    made.revive()
    assert made.on_entry(entry(1, "Uploading"), Client(UPLOADING)) is None

    assert parts.restarted == [("coordinator", 1.0)]


def test_the_coordinator_that_adds_is_killed_unasked():
    parts = Parts("coordinator", "a", "b")

    struck = striker(parts, target="coordinator", phase="Released").on_entry(
        entry(1, "Released"), Client(None)
    )

    assert struck is not None
    assert struck.name == "coordinator"


def after_a_kill(target: str, *, killed_at: float) -> Striker:
    """A striker whose kill and restart (a second later) are done."""
    at = START.timestamp()
    seconds = iter([killed_at, killed_at + 0.25, killed_at + 1, killed_at + 3, killed_at + 8.5])
    made = striker(Parts("coordinator", "a", "b"), target=target, now=lambda: at + next(seconds))
    made.on_entry(entry(1, "Uploading"), Client(UPLOADING))
    made.revive()
    return made


@pytest.mark.parametrize(("killed_at", "unfinished"), [(4.0, True), (6.0, False)])
def test_it_says_what_came_of_the_kill(killed_at, unfinished):
    made = after_a_kill("node", killed_at=killed_at)

    assert made.on_report(UPLOADING) is None
    struck = made.on_report(run_of(round_(1, millinats=1)))

    assert made.done
    assert isinstance(struck, Struck)
    assert struck.unfinished is unfinished  # the round ended at second 5
    assert struck.in_the_sum
    assert struck.restarted_line() == "b started again 1.0 s after the kill"
    assert struck.went_on_line() == (
        "round demo-1/1 went on: Released 7.5 s after the restart, 2 nodes in the sum, b among them"
    )
    assert made.on_report(run_of(round_(1, millinats=1))) is None  # said once
    json.dumps(struck.to_json())


def test_of_the_coordinator_it_says_when_it_answered_again():
    made = after_a_kill("coordinator", killed_at=4.0)

    assert made.on_report(UPLOADING) is None
    struck = made.on_report(run_of(round_(1, millinats=1)))

    assert struck.in_the_sum is None
    assert struck.went_on_line().startswith(
        "it answered again 2.0 s after its restart; round demo-1/1 went on: Released 7.5 s"
    )


def test_what_was_not_restarted_cannot_have_gone_on():
    made = striker(Parts("a", "b"))
    made.on_entry(entry(1, "Uploading"), Client(UPLOADING))

    assert made.on_report(run_of(round_(1, millinats=1))) is None
    with pytest.raises(ValueError, match="nobody was killed"):
        striker(Parts("a", "b")).revive()
