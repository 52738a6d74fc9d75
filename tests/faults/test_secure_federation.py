"""Secure sums among real processes: nodes that die, stay away, or come back with an old state.

Real processes, mutual TLS, four nodes of which three must agree. The updates lie on the grid, so a
masked run must have the digests of an open one with the same survivors; the metric ``nodes`` says
how many were added. One node is started with one crash armed (tests/support/node_crash.py): it
kills itself with SIGKILL at that instant and leaves a mark. How the coordinator is killed in each
phase is in ``test_demo_kill.py``.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from infra.runs.facts import RunReport
from node_agent.config import NodeFolder
from node_agent.status import read_status
from protocols.identifiers import RunId
from tests.support.federation import PATIENCE_S, Running, results, running

ROOT = Path(__file__).parents[2]
VICTIM = "node-2"
COORDINATES = 300_000
HOLDER = "node-1"
LONG_S = 900  # nothing waits so long: a test lets the coordinator's clock jump over it
NEVER = dict.fromkeys(("join", "train", "deal", "upload", "commit", "reveal"), LONG_S)

# In the order in which a round reaches them. Each launch of the node dies at one of them.
INSTANTS = (
    "stage-ready:after",  # a state that the journal does not know yet
    "post-ready:after",
    "stage-dealt:after",
    "post-deal:after",
    "stage-agreed:before",
    "post-deal_ok:before",
    "stage-fixed:before",  # a masked vector is in the spool, and not fixed
    "add_upload:before",  # fixed, and the journal does not know it
    "post-upload:after",
    "stage-committed:before",
    "post-commit:before",
    "post-reveal:before",
    "stage-closed:before",
)
ALL_FOUR = {"threshold": 4, "min_surviving": 4, "colluders": 1}  # nothing goes on without one

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One federation for the whole file; the victim does not run unless a test starts it."""
    folder = tmp_path_factory.mktemp("secure") / "federation"
    with running(folder, nodes=4, clock=True) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(federation: Running) -> dict[int, tuple[str, str, int, int]]:
    """What an open round gives: with all four nodes, and with three."""
    whole = federation.submit("open-4", rounds=1, coordinates=COORDINATES)
    (four,) = results(federation.confirmed(whole))
    federation.household.stop(VICTIM)
    less = federation.submit(
        "open-3",
        rounds=1,
        coordinates=COORDINATES,
        min_participants=3,
        deadlines=NEVER,
    )
    federation.pass_deadline(less, "Open", VICTIM, by_s=LONG_S + 1)
    (three,) = results(federation.confirmed(less))
    return {4: four, 3: three}


@pytest.fixture
def folder(federation: Running, wanted: object) -> Iterator[Path]:
    """The victim's folder; the node is stopped before and after."""
    yield federation.folder / "nodes" / VICTIM
    if VICTIM in federation.household:
        federation.household.stop(VICTIM)


def masked(federation: Running, name: str, **changes: object) -> RunId:
    """Submit one masked round."""
    terms: dict[str, object] = {
        "rounds": 1,
        "coordinates": COORDINATES,
        "mode": "aggregate-only",
        "min_participants": 3,
        "deadlines": NEVER,
    }
    return federation.submit(name, **terms | changes)  # type: ignore[arg-type]


def die_at(folder: Path, at: str) -> None:
    """Run the victim until it kills itself at an instant."""
    marks = folder / "crashed"
    before = marks.read_text().count("\n") if marks.exists() else 0
    command = [sys.executable, "-m", "tests.support.node_crash", "--dir", str(folder), "--at", at]
    with (folder / "crash.log").open("ab") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            status = agent.wait(timeout=PATIENCE_S)
        finally:
            agent.kill()
    assert status == -signal.SIGKILL, (folder / "crash.log").read_text()[-3000:]
    assert marks.read_text().split()[before:] == [at], "it died elsewhere: nothing was tested"


def ends_with(federation: Running, run: RunId) -> RunReport:
    """The ended run, which must have come to its end."""
    report = federation.wait(run, check=False)
    assert report.status == "done", (report, federation.logs())
    return report


def test_the_numbers_of_nodes_show_in_the_digests(wanted):
    """The oracle can fail: a lost or doubled update is another sum."""
    assert (wanted[3][2], wanted[4][2]) == (3, 4)
    assert wanted[3][0] != wanted[4][0]


def test_a_node_killed_at_every_instant_is_counted_once(federation, wanted, folder):
    run = masked(federation, "storm", min_participants=4, secagg=ALL_FOUR)
    for at in INSTANTS:
        die_at(folder, at)
    federation.start_node(VICTIM)

    report = federation.confirmed(run)

    assert results(report) == [wanted[4]]
    assert VICTIM in report.released[0].survivors
    assert report.released[0].attempt == 1
    state = (folder / "secagg" / f"{run}.state").read_text()
    assert "minga.secagg.state.closed/1" in state
    assert [path.name for path in (folder / "secagg").glob("*.tmp")] == []


@pytest.mark.parametrize(
    ("at", "phase", "nodes", "attempt"),
    [
        ("add_outcome:before", "Training", 3, 1),
        ("stage-dealt:before", "Dealing", 3, 2),  # the others begin again with fresh keys
        ("stage-fixed:after", "Uploading", 3, 1),
    ],
)
def test_a_node_that_dies_and_stays_away_is_left_out(
    federation, wanted, folder, at, phase, nodes, attempt
):
    run = masked(federation, f"away-{phase.lower()}")
    die_at(folder, at)
    federation.pass_deadline(run, phase, VICTIM, by_s=LONG_S + 1)

    report = ends_with(federation, run)

    (round_,) = report.released
    assert results(report) == [wanted[nodes]]
    assert VICTIM not in round_.survivors
    assert round_.attempt == attempt


@pytest.mark.parametrize("at", ["stage-committed:before", "stage-revealed:before"])
def test_a_node_that_dies_after_its_upload_and_stays_away_is_in_the_sum(
    federation, wanted, folder, at
):
    """Three words of four are enough, so one of the others is held back until the victim is dead:
    else the round could end before the victim comes to that point."""
    go_on = folder / f"go-on-{at.split(':')[0]}"
    federation.household.stop(HOLDER)
    federation.start_held(HOLDER, at="stage-committed:before", until=go_on)
    run = masked(federation, f"away-{at.split(':')[0]}")
    die_at(folder, at)
    go_on.touch()

    report = ends_with(federation, run)

    (round_,) = report.released
    assert results(report) == [wanted[4]]
    assert VICTIM in round_.survivors
    assert round_.attempt == 1


@pytest.mark.parametrize(
    ("names", "at", "phase"),
    [
        (["secagg"], "post-commit:before", "Committing"),  # the journal finds it out
        (
            ["secagg", "journal.sqlite"],
            "post-commit:after",
            "Revealing",
        ),  # the coordinator shows it
    ],
    ids=["its state", "its state and its journal"],
)
def test_a_node_whose_state_was_put_back_stays_out_of_that_round(
    federation, wanted, folder, tmp_path, names, at, phase
):
    run = masked(federation, f"put-back-{phase.lower()}", min_participants=4, secagg=ALL_FOUR)
    die_at(folder, "stage-fixed:after")
    copy(folder, tmp_path, names)
    die_at(folder, at)
    copy(tmp_path, folder, names)

    federation.start_node(VICTIM)
    wait_for_why(folder, run, "secagg.state_lost")
    federation.pass_deadline(run, phase, VICTIM, by_s=LONG_S + 1)
    report = ends_with(federation, run)

    burned, released = report.rounds
    assert burned.phase == "Burned"  # no second verdict, no share: it could not be opened
    assert results(report) == [wanted[4]]
    assert VICTIM in released.survivors


def copy(source: Path, target: Path, names: list[str]) -> None:
    """Copy by hand, as a backup does."""
    for name in names:
        if (source / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(source / name, target / name)
            continue
        for suffix in ("", "-wal", "-shm"):  # a database is copied with what belongs to it
            (target / f"{name}{suffix}").unlink(missing_ok=True)
            if (source / f"{name}{suffix}").exists() and suffix != "-shm":
                shutil.copy2(source / f"{name}{suffix}", target / f"{name}{suffix}")


def wait_for_why(folder: Path, run: RunId, words: str) -> None:
    """Wait until the node says a reason."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        status = read_status(NodeFolder(folder).status)
        runs = status["runs"] if status else []
        if any(seen["run"] == run and words in seen["why"] for seen in runs):
            return
        time.sleep(0.05)
    raise AssertionError(f"the node never said {words}: {status}")


def repin(folder: Path, key: str) -> str:
    """Write another key for node-1 into the journal, or none; the one that was there, or none."""
    with closing(sqlite3.connect(folder / "journal.sqlite")) as journal, journal:
        row = journal.execute("SELECT key FROM pins WHERE node = 'node-1'").fetchone()
        journal.execute("DELETE FROM pins WHERE node = 'node-1'")
        if key:
            journal.execute("INSERT INTO pins VALUES ('node-1', ?, 0)", (key,))
    return str(row[0]) if row else ""


def test_a_node_that_knows_another_key_of_a_member_declines(federation, wanted, folder):
    known = repin(folder, "0" * 64)
    try:
        run = masked(federation, "another-key")
        federation.start_node(VICTIM)
        with federation.history(run) as history:
            entry = federation.entries(history, lambda e: "secagg.key_changed" in e.why)
        report = ends_with(federation, run)
    finally:
        federation.household.stop(VICTIM)
        repin(folder, known)

    assert entry.node == VICTIM
    assert "another signing key for node-1" in entry.why
    assert results(report) == [wanted[3]]
