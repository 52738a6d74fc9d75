"""Processes killed with SIGKILL while a round is under way: nothing is lost, nothing counted twice.

Real processes, mutual TLS, SQLite. The updates lie on the grid, so an undisturbed run and a
disturbed one with the same survivors must agree in every digest, and a masked one with both: masks
must vanish without a trace. The metrics ``nodes`` and ``weight`` of each sum convict a double
count, the digest of the sum everything else. That the kill fell into the phase is read from the
coordinator itself while all agents stand still. Here a few phases are met with the demonstration's
own means; every commit point is visited in ``test_commit_points.py`` and by `make faults`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from infra.demo.faults import Striker
from protocols.identifiers import RunId
from protocols.tensors.sizes import UNIT
from tests.support.federation import PATIENCE_S, Running, results, running

NODES = 3
ROUNDS = 6  # so many tries to meet a phase of some milliseconds
COORDINATES = 600_000  # 1.5 MB up

OPEN, MASKED = "open", "aggregate-only"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One federation for the whole file; every test has a run of its own."""
    with running(tmp_path_factory.mktemp("kill") / "federation", nodes=NODES) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(federation: Running) -> list[tuple[str, str, int, int]]:
    """What comes out when nobody is killed."""
    run = federation.submit("undisturbed", rounds=ROUNDS, coordinates=COORDINATES)
    return results(federation.confirmed(run))


def strike(federation: Running, run: RunId, **how: str | int) -> Striker | None:
    """Let a striker kill once, when its moment comes; None if the run ended before."""
    striker = Striker(federation.federation, sites=federation.sites, **how)
    give_up = time.monotonic() + PATIENCE_S
    with federation.history(run) as history:
        while striker.struck is None:
            assert time.monotonic() < give_up, federation.logs()
            entry = history.next(timeout_s=0.2)
            if entry is not None:
                if striker.on_entry(entry, federation.client) is not None:
                    striker.revive()
            elif federation.client.show(run).ended:
                return None
    federation.wait(run, lambda report: striker.on_report(report) is not None)
    return striker


def submit(federation: Running, name: str, mode: str) -> RunId:
    """A run like the undisturbed one, in ``mode``."""
    return federation.submit(name, rounds=ROUNDS, coordinates=COORDINATES, mode=mode)


def test_the_undisturbed_run_adds_every_node_once(undisturbed):
    assert len(undisturbed) == ROUNDS
    assert [(nodes, weight) for _, _, nodes, weight in undisturbed] == [(3, 3 * 65_536)] * ROUNDS
    # The same constant is added each time: one sum, and as many models as rounds.
    assert len({sum_ for sum_, _, _, _ in undisturbed}) == 1
    assert len({model for _, model, _, _ in undisturbed}) == ROUNDS


def test_the_digest_of_a_sum_shows_another_update(federation, undisturbed):
    """The oracle can fail: one grid step more in every update is another sum and another model."""
    run = federation.submit("other", rounds=1, coordinates=COORDINATES, delta=2 * 2.0**-10)

    ((sum_, model, nodes, _),) = results(federation.confirmed(run))

    assert nodes == NODES
    assert sum_ != undisturbed[0][0]
    assert model != undisturbed[0][1]


def test_a_masked_run_has_the_very_digests_of_the_open_one(federation, undisturbed):
    run = submit(federation, "masked", MASKED)

    assert results(federation.confirmed(run)) == undisturbed


@pytest.mark.parametrize(
    ("mode", "phase"),
    [
        (OPEN, "Open"),
        (OPEN, "Uploading"),
        (MASKED, "Dealing"),
        (MASKED, "Revealing"),
    ],
)
def test_the_coordinator_is_killed_and_the_result_is_the_same(federation, undisturbed, mode, phase):
    run = submit(federation, f"coordinator-{mode}-{phase.lower()}", mode)

    striker = strike(federation, run, target="coordinator", phase=phase, from_number=0)

    assert striker is not None, f"no round was met in {phase}: nothing was tested"
    assert (striker.struck.name, striker.struck.phase) == ("coordinator", phase)
    assert striker.struck.unfinished
    assert striker.struck.ended == "Released"
    report = federation.confirmed(run)
    assert report.status == "done"
    assert results(report) == undisturbed


@pytest.mark.parametrize("mode", [OPEN, MASKED])
def test_the_coordinator_is_killed_while_it_adds(federation, undisturbed, mode):
    """Nobody but the coordinator acts then, so it is killed unasked, until it had not finished."""
    run = submit(federation, f"coordinator-{mode}-released", mode)
    met = []
    for number in range(ROUNDS):
        striker = strike(
            federation, run, target="coordinator", phase="Released", from_number=number
        )
        if striker is None:
            break
        met.append(striker.struck.unfinished)
        if met[-1]:
            break

    assert any(met), "the sum was public before every kill: nothing was tested"
    report = federation.confirmed(run)
    assert report.status == "done"
    assert results(report) == undisturbed


@pytest.mark.parametrize(
    ("mode", "phase"),
    [
        (OPEN, "Uploading"),
        (MASKED, "Dealing"),
        (MASKED, "Revealing"),
    ],
)
def test_a_node_is_killed_comes_back_and_is_counted_once(federation, undisturbed, mode, phase):
    """All three are needed: two of three do not open a masked sum."""
    run = submit(federation, f"node-{mode}-{phase.lower()}", mode)

    striker = strike(federation, run, target="node", phase=phase, from_number=0)

    assert striker is not None, f"no round was met in {phase}: nothing was tested"
    assert striker.struck.name in federation.sites
    assert striker.struck.in_the_sum
    assert striker.struck.unfinished
    report = federation.confirmed(run)
    assert report.status == "done"
    assert results(report) == undisturbed


def test_a_node_killed_in_mid_transfer_goes_on_where_it_was(federation):
    """The vector has several resume units; what is durable at the coordinator is not sent twice."""
    coordinates = 12_000_000  # 30 MB up, 7.2 units
    size = coordinates * 5 // 2
    run = federation.submit("resumed", rounds=1, coordinates=coordinates)
    victim = federation.sites[1]
    vector = federation.folder / "coordinator" / "spool" / run / f"0.1.{victim}.vector"

    give_up = time.monotonic() + PATIENCE_S
    while not vector.exists() or vector.stat().st_size < 2 * UNIT:
        assert time.monotonic() < give_up, federation.logs()
        time.sleep(0.001)
    federation.household.kill(victim)
    there = vector.stat().st_size
    assert 2 * UNIT <= there < size, "the transfer was over: nothing was tested"
    federation.start_node(victim)
    report = federation.confirmed(run)

    (round_,) = report.released
    assert victim in round_.survivors
    assert round_.metrics["nodes"] == NODES
    sent = {entry.node: entry.up for entry in round_.traffic}
    assert sent[victim] < size + there, "it began again from the first byte"
    assert sent[victim] - size <= UNIT + 2**20 + 1000  # at most what was not durable yet
