"""Services, ledger, spool, release and driver on one clock, under faults, to the end of a run."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from coordinator.aggregation.release import release
from coordinator.drivers.rounds import LEASE_TTL, RoundDriver
from coordinator.layouts import Layouts
from coordinator.ledger import Tx
from protocols.errors import StorageFullError, WrappedSumError
from protocols.identifiers import RoundId
from protocols.rounds import Aborted, Burned, Open, Released, Uploading
from tests.support.ledgers import NODES
from tests.support.postgres import PostgresServer, postgres
from tests.support.spine import (
    Network,
    SimulatedNode,
    Simulation,
    Spine,
    quick_folder,
    vector_of,
)

__all__ = ["postgres"]  # a fixture


@asynccontextmanager
async def running(folder: Path, *, seed: int = 0, loss: float = 0.0, url: str = "", **plan):
    """A submitted run and its nodes."""
    spine = Spine(folder, url=url)
    await spine.start()
    made = await spine.submit(**plan)
    simulation = Simulation(
        seed=seed,
        spine=spine,
        plan=made,
        nodes=[SimulatedNode(node) for node in made.roster_ids],
        network=Network(random.Random(seed), loss=loss),
    )
    try:
        yield simulation
    finally:
        await spine.stop()


async def everybody(simulation: Simulation, times: int = 1) -> None:
    for _ in range(times):
        for node in simulation.nodes:
            await node.act(simulation.spine, simulation.network)
        await simulation.spine.drive()


def until(simulation: Simulation, phase: type) -> Callable[[], object]:
    """Everybody acts until the newest round is in ``phase``."""

    async def play() -> RoundId:
        for _ in range(10):
            rows = await simulation.spine.all_rounds(simulation.plan.run_id)
            if rows and isinstance(rows[-1].phase, phase):
                return rows[-1].round
            await everybody(simulation)
        raise AssertionError(f"never {phase.__name__}")

    return play


@pytest.mark.parametrize("seed", range(8))
def test_a_run_under_faults(seed, tmp_path):
    """Whatever is lost: each survivor is in each sum once, and every model is what it must be."""

    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, seed=seed, loss=0.1, rounds=3) as simulation:
                status = await simulation.play()
                ends = await simulation.check(tmp_path)
                assert status == ("done" if ends["Released"] == 3 else "failed"), ends
                assert min(simulation.network.fired.values()) > 5  # else nothing was tested
                history = await simulation.spine.ledger.read("h", lambda tx: tx.history())
                assert [entry.id for entry in history] == list(range(1, len(history) + 1))
                assert all(entry.why for entry in history)

    asyncio.run(play())


def test_the_seeds_reach_what_they_should(tmp_path):
    """Restarts, aborted rounds and finished runs all happen; else the simulation means little."""
    seen: Counter[str] = Counter()

    async def play(seed: int) -> None:
        with quick_folder() as folder:
            need = 2 if seed % 2 else 4  # of four: some runs can do without a node, some cannot
            async with running(
                folder, seed=seed, loss=0.15, rounds=1, min_participants=need
            ) as simulation:
                seen[await simulation.play(400)] += 1
                seen["restarts"] += simulation.restarts
                rows = await simulation.spine.all_rounds(simulation.plan.run_id)
                seen.update(type(row.phase).__name__ for row in rows)
                for row in rows:
                    if isinstance(row.phase, Released) and len(row.phase.survivors) < len(NODES):
                        seen["released without somebody"] += 1

    for seed in range(100, 112):
        asyncio.run(play(seed))
    assert seen["done"] >= 6, seen
    assert seen["restarts"] >= 5, seen
    assert seen["Aborted"] >= 1, seen
    assert seen["released without somebody"] >= 1, seen


def test_the_oracle_convicts_a_double_count(tmp_path):
    """A release that adds one upload twice is seen in the digits, and in the model."""

    def twice(*, uploads, **rest):
        doubled = vector_of(rest["plan"], NODES[0], rest["index"])
        path = uploads[0].with_suffix(".twice")
        path.write_bytes(doubled)
        return release(uploads=[*uploads[:-1], path], **rest)

    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=1) as simulation:
                simulation.spine.add_up = twice
                await simulation.spine.restart()
                assert await simulation.play() == "done"
                with pytest.raises(AssertionError):
                    await simulation.check(tmp_path)

    asyncio.run(play())


def test_without_faults_everybody_is_in_every_sum(tmp_path):
    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=2) as simulation:
                await everybody(simulation, 10)
                assert await simulation.check(tmp_path) == {"Released": 2}
                for row in await simulation.spine.all_rounds(simulation.plan.run_id):
                    assert row.phase.survivors == frozenset(NODES)
                run = await simulation.spine.ledger.read("l", Tx.runs)
                assert (run[0].status, run[0].why) == ("done", "all 2 rounds were released")

    asyncio.run(play())


def test_a_crash_while_adding_up_is_repeated_and_gives_the_same(tmp_path):
    """The sum was computed, the process died before it was recorded: the next one does it again."""
    made: list[object] = []

    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=1) as simulation:
                spine = simulation.spine

                def dies(**arguments):
                    made.append(release(**arguments))
                    raise MemoryError("killed after the blobs were written")

                spine.add_up = dies
                await spine.restart()
                for _ in range(4):
                    await everybody(simulation)
                assert made  # else nothing was tested
                (row,) = await spine.all_rounds(simulation.plan.run_id)
                assert row.phase == Released(attempt=1, survivors=frozenset(NODES))
                spine.add_up = release
                await spine.restart()
                await spine.drive()
                await simulation.check(tmp_path)
                (row,) = await spine.all_rounds(simulation.plan.run_id)
                assert row.released
                assert row.next_snapshot == made[0].snapshot.to_bytes()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("error", "ends_as"), [(StorageFullError("no room"), Released), (WrappedSumError("x"), Burned)]
)
def test_no_room_waits_and_a_broken_sum_burns(error, ends_as):
    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=1) as simulation:
                tries: list[int] = []

                def fails(**arguments):
                    tries.append(1)
                    raise error

                simulation.spine.add_up = fails
                await simulation.spine.restart()
                await until(simulation, Uploading)()
                await everybody(simulation)
                rows = await simulation.spine.all_rounds(simulation.plan.run_id)
                assert isinstance(rows[0].phase, ends_as)
                assert not rows[0].released
                before = len(tries)
                simulation.spine.clock.advance(timedelta(seconds=3))
                await simulation.spine.drive()
                again = len(tries) > before
                assert again == (ends_as is Released)

    asyncio.run(play())


def test_five_rounds_without_a_release_fail_the_run():
    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=1) as simulation:
                spine = simulation.spine
                opened_at = []
                for _ in range(60):
                    await spine.drive()
                    spine.clock.advance(timedelta(seconds=1))
                    spine.clock.advance(timedelta(seconds=60))
                rows = await spine.all_rounds(simulation.plan.run_id)
                assert [row.round.number for row in rows] == [0, 1, 2, 3, 4]
                assert {row.index for row in rows} == {0}
                assert all(isinstance(row.phase, Aborted) for row in rows)
                opened_at = [row.opened_at for row in rows]
                pauses = [
                    later - row.changed_at for row, later in zip(rows, opened_at[1:], strict=False)
                ]
                assert pauses == sorted(pauses)
                (run,) = await spine.ledger.read("look", Tx.runs)
                assert run.status == "failed"
                assert "5 rounds in a row" in run.why

    asyncio.run(play())


def test_a_late_update_of_an_ended_round_is_not_in_the_next(tmp_path):
    """A node is cut off while it uploads; the round goes on without it, the next counts it once."""

    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=2) as simulation:
                spine, network = simulation.spine, simulation.network
                await until(simulation, Uploading)()
                late, *others = simulation.nodes
                for node in others:
                    await node.act(spine, network)
                spine.clock.advance(timedelta(seconds=600))
                await spine.drive()
                rows = await spine.all_rounds(simulation.plan.run_id)
                assert rows[0].phase.survivors == frozenset(n.node for n in others)
                await late.act(spine, network)
                await everybody(simulation, 6)
                ends = await simulation.check(tmp_path)
                assert ends == {"Released": 2}
                rows = await spine.all_rounds(simulation.plan.run_id)
                assert rows[1].phase.survivors == frozenset(NODES)

    asyncio.run(play())


def test_who_slept_through_its_lease_records_nothing(tmp_path):
    """It was adding up when another process took over; what it brings is not written."""
    taken_over = threading.Event()

    def slow(**arguments):
        assert taken_over.wait(20)
        return release(**arguments)

    def no_room(**_arguments):
        raise StorageFullError("no room")

    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=1) as simulation:
                one = simulation.spine
                one.add_up = slow
                await one.restart()
                for _ in range(3):
                    await one.driver.pass_once()
                    for node in simulation.nodes:
                        await node.act(one, simulation.network)
                await one.driver.pass_once()  # begins to add up
                two = RoundDriver(
                    ledger=one.ledger,
                    clock=one.clock,
                    blobs=one.blobs,
                    layouts=Layouts(one.blobs),
                    spool=one.spool.root,
                    add_up=no_room,
                )
                await two.pass_once()
                assert not two.drives
                one.clock.advance(LEASE_TTL)
                await two.pass_once()
                assert two.drives
                taken_over.set()
                await one.driver.settle()
                (row,) = await one.all_rounds(simulation.plan.run_id)
                assert row.phase == Released(attempt=1, survivors=frozenset(NODES))
                await one.driver.pass_once()
                assert not one.driver.drives
                await two.settle()
                await two.stop()  # gives the lease back: nobody has to wait for it
                one.clock.advance(timedelta(seconds=2))
                await one.drive()
                assert await simulation.check(tmp_path) == {"Released": 1}

    asyncio.run(play())


@pytest.mark.postgres
def test_two_coordinators_over_one_postgresql(postgres: PostgresServer, tmp_path):
    """Services are active/active; one drives, and when it stops answering the other takes over."""

    async def play() -> None:
        with quick_folder() as folder:
            url = postgres.new_database()
            async with running(folder, url=url, seed=3, loss=0.1, rounds=2) as simulation:
                one, rng = simulation.spine, simulation.network.rng
                two = Spine(folder, url=url, clock=one.clock)
                await two.start()
                drivers = Counter()
                for step in range(600):
                    spine = rng.choice((one, two))
                    if rng.random() < 0.8:
                        await rng.choice(simulation.nodes).act(spine, simulation.network)
                    elif step < 30 or spine is two:  # later the first one drives no more
                        await spine.driver.pass_once()
                        await spine.driver.settle()
                        drivers["one" if spine is one else "two"] += spine.driver.drives
                    if rng.random() < 0.2:
                        one.clock.advance(timedelta(seconds=2))
                    (run,) = await two.ledger.read("look", Tx.runs)
                    if run.status != "active":
                        break
                assert run.status == "done"
                assert min(drivers.values()) > 0, drivers  # else nobody took over
                assert await simulation.check(tmp_path) >= Counter(Released=2)
                await two.stop()

    asyncio.run(play())


def test_a_round_that_nobody_opened_yet_is_open_after_a_pass():
    async def play() -> None:
        with quick_folder() as folder:
            async with running(folder, rounds=1) as simulation:
                assert await simulation.spine.all_rounds(simulation.plan.run_id) == []
                await simulation.spine.driver.pass_once()
                (row,) = await simulation.spine.all_rounds(simulation.plan.run_id)
                assert isinstance(row.phase, Open)

    asyncio.run(play())
