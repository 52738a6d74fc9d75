"""What every ledger must do, on SQLite and on a real PostgreSQL alike."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError

from coordinator.ledger import LeaseLostError, Tx
from coordinator.rounds import advance
from protocols.errors import (
    EquivocationError,
    LedgerBusyError,
    TokenRefusedError,
)
from protocols.identifiers import NodeId
from protocols.rounds import (
    DeclineArrived,
    JoinArrived,
    Open,
    TimePassed,
    Training,
)
from tests.support.ledger_urls import url, with_ledger
from tests.support.ledgers import (
    NODES,
    ROUND,
    RUN,
    START,
    begin,
    enrol,
    first_phase,
    make_plan,
)
from tests.support.postgres import postgres

__all__ = ["postgres", "url"]  # fixtures

MANY = tuple(NodeId(f"node-{i:02}") for i in range(16))
TTL = timedelta(seconds=10)


# -- transactions and history ------------------------------------------------------------------


def test_a_transaction_leaves_its_reason(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        await ledger.run("tell", lambda tx: tx.note("for the federation", now=START))
        entries = await ledger.read("history", lambda tx: tx.history())

        assert [entry.id for entry in entries] == list(range(1, len(entries) + 1))
        assert ledger.version() == entries[-1].id
        opening = next(entry for entry in entries if entry.number == 0)
        assert (opening.run, opening.transaction, opening.phase) == (RUN, "begin", "Open")
        assert (opening.why, opening.at, opening.node) == ("the first round", START, None)
        assert (entries[-1].run, entries[-1].number) == (None, None)

    with_ledger(url, story)


def test_what_fails_leaves_nothing(url):
    """Neither rows nor history nor a gap in its ids."""

    class Boom(Exception):
        pass

    def half(tx: Tx) -> None:
        advance(tx, ROUND, JoinArrived(NODES[0]), START, transaction="join", node=NODES[0])
        tx.write_history()
        raise Boom

    async def story(ledger):
        await ledger.run("begin", begin)
        before = ledger.version()
        with pytest.raises(Boom):
            await ledger.run("join", half)
        assert (await ledger.read("look", lambda tx: tx.round(ROUND))).phase.joined == frozenset()
        await ledger.run("tell", lambda tx: tx.note("after", now=START))
        assert await ledger.read("look", Tx.version) == before + 1

    with_ledger(url, story)


CRASH = """
import asyncio, os, sys
from coordinator.clock import ManualClock
from coordinator.ledger import Ledger
from coordinator.rounds import advance
from protocols.rounds import JoinArrived
from tests.support.ledgers import NODES, ROUND, START, begin

async def main():
    ledger = await Ledger(sys.argv[1], clock=ManualClock(START)).open()
    await ledger.run("begin", begin)
    print("acknowledged", flush=True)
    def half(tx):
        advance(tx, ROUND, JoinArrived(NODES[0]), START, transaction="join", node=NODES[0])
        if sys.argv[2] == "before history":
            os.kill(os.getpid(), 9)
        tx.write_history()
        os.kill(os.getpid(), 9)
    await ledger.run("join", half)

asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["before history", "before commit"])
def test_a_process_killed_inside_a_transaction_leaves_what_was_acknowledged(url, moment):
    done = subprocess.run(
        [sys.executable, "-c", CRASH, url, moment],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == -9, done.stderr  # else nothing was tested
    assert done.stdout == "acknowledged\n"

    async def story(ledger):
        row = await ledger.read("look", lambda tx: tx.round(ROUND))
        assert row.phase == first_phase(make_plan())
        assert await ledger.read("look", Tx.version) == len(
            await ledger.read("look", lambda tx: tx.history())
        )
        await ledger.run(  # the file, the rows and the lease of the dead are free
            "join", lambda tx: advance(tx, ROUND, JoinArrived(NODES[0]), START, transaction="join")
        )

    with_ledger(url, story)


def test_reading_cannot_write(url):
    async def story(ledger):
        with pytest.raises(DBAPIError):
            await ledger.read("cheat", enrol)
        assert await ledger.read("look", lambda tx: tx.nodes()) == []

    with_ledger(url, story)


def test_references_must_exist(url):
    async def story(ledger):
        with pytest.raises(IntegrityError):
            await ledger.run("traffic", lambda tx: tx.add_traffic(ROUND, NODES[0], up=1))

    with_ledger(url, story)


# -- many at once ------------------------------------------------------------------------------


def test_sixteen_joins_at_once_are_all_counted(url):
    plan = make_plan(roster=MANY, min_participants=16)

    async def story(ledger):
        await ledger.run("begin", lambda tx: begin(tx, plan))
        before = ledger.version()
        steps = await asyncio.gather(
            *(
                ledger.run("join", lambda tx, n=node: advance(
                    tx, ROUND, JoinArrived(n), START, transaction="join", node=n
                ))
                for node in MANY
            )
        )  # fmt: skip
        row = await ledger.read("look", lambda tx: tx.round(ROUND))
        assert isinstance(row.phase, Training)
        assert row.phase.cohort == frozenset(MANY)
        assert sum(isinstance(step.phase, Training) for step in steps) == 1  # who came last
        entries = await ledger.read("look", lambda tx: tx.history(before))
        assert {entry.node for entry in entries} == set(MANY)
        assert [entry.id for entry in entries] == list(range(before + 1, before + 17))

    with_ledger(url, story)


def test_one_join_sent_sixteen_times_is_counted_once(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        before = ledger.version()
        await asyncio.gather(
            *(
                ledger.run("join", lambda tx: advance(
                    tx, ROUND, JoinArrived(NODES[0]), START, transaction="join", node=NODES[0]
                ))
                for _ in range(16)
            )
        )  # fmt: skip
        assert ledger.version() == before + 1

    with_ledger(url, story)


def test_of_a_join_and_a_decline_at_once_one_is_refused(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        events = [JoinArrived(NODES[0]), DeclineArrived(NODES[0])] * 8
        answers = await asyncio.gather(
            *(
                ledger.run("either", lambda tx, e=event: advance(
                    tx, ROUND, e, START, transaction="either"
                ))
                for event in events
            ),
            return_exceptions=True,
        )  # fmt: skip
        refused = [answer for answer in answers if isinstance(answer, EquivocationError)]
        assert len(refused) == 8
        phase = (await ledger.read("look", lambda tx: tx.round(ROUND))).phase
        assert len(phase.joined | phase.declined) == 1
        assert not phase.joined & phase.declined

    with_ledger(url, story)


def test_a_token_is_used_by_one_of_sixteen(url):
    token = bytes(32)

    async def story(ledger):
        await ledger.run("invite", lambda tx: tx.add_token(token, NODES[0], START + TTL))
        answers = await asyncio.gather(
            *(
                ledger.run("enrol", lambda tx, i=i: tx.use_token(token, START, bytes([i])))
                for i in range(16)
            ),
            return_exceptions=True,
        )
        winners = [i for i, answer in enumerate(answers) if answer == NODES[0]]
        assert len(winners) == 1
        assert sum(isinstance(answer, TokenRefusedError) for answer in answers) == 15
        assert await ledger.read("look", lambda tx: tx.token_use(token)) == bytes(winners)

    with_ledger(url, story)


def test_history_is_never_read_with_a_hole(url):
    """A reader that goes on from the last id it saw sees every entry, whoever commits when."""

    async def story(ledger):
        seen: list[int] = []

        async def write(count: int) -> None:
            for _ in range(count):
                await ledger.run("tell", lambda tx: tx.note("x", now=START))

        async def look() -> None:
            after = seen[-1] if seen else 0
            entries = await ledger.read("look", lambda tx: tx.history(after))
            seen.extend(entry.id for entry in entries)

        writers = asyncio.gather(*(write(12) for _ in range(8)))
        while not writers.done():
            await look()
        await look()
        assert seen == list(range(1, 97))

    with_ledger(url, story)


# -- news --------------------------------------------------------------------------------------


def test_a_commit_wakes_who_waits(url):
    async def story(ledger):
        waiting = [asyncio.create_task(ledger.changed(0, 60.0)) for _ in range(50)]
        await asyncio.sleep(0)
        await ledger.run("tell", lambda tx: tx.note("x", now=START))
        assert await asyncio.gather(*waiting) == [1] * 50

    with_ledger(url, story)


def test_waiting_ends_with_its_time_and_with_the_ledger(url):
    async def story(ledger):
        assert await ledger.changed(0, 0.01) == 0
        waiting = asyncio.create_task(ledger.changed(0, 60.0))
        await asyncio.sleep(0)
        await ledger.close()
        assert await waiting == 0
        for call in (ledger.changed(0, 60.0), ledger.run("x", enrol), ledger.read("x", enrol)):
            with pytest.raises(LedgerBusyError, match="stopping"):
                await call

    with_ledger(url, story)


def test_a_transaction_without_history_is_no_news(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        before = ledger.version()
        await ledger.run("seen", lambda tx: tx.seen(NODES[0], START, "running", "1.0"))
        await ledger.run("traffic", lambda tx: tx.add_traffic(ROUND, NODES[0], up=5))
        assert await ledger.read("look", Tx.version) == before

    with_ledger(url, story)


# -- leases ------------------------------------------------------------------------------------


def test_a_lease_has_one_holder_and_a_growing_fence(url):
    async def story(ledger):
        def take(holder: str, after: timedelta) -> object:
            return ledger.run("take", lambda tx: tx.take_lease("d", holder, START + after, TTL))

        assert await take("a", timedelta()) == 1
        assert await take("b", timedelta()) is None
        assert await ledger.run("renew", lambda tx: tx.renew_lease("d", 1, START + TTL, TTL))
        assert await take("b", TTL) is None
        assert await take("b", 2 * TTL) == 2
        assert not await ledger.run("renew", lambda tx: tx.renew_lease("d", 1, START, TTL))
        await ledger.run("release", lambda tx: tx.release_lease("d", 1))  # the stale one: no effect
        assert await take("a", 2 * TTL) is None
        await ledger.run("release", lambda tx: tx.release_lease("d", 2))
        assert await take("a", 2 * TTL) == 3

    with_ledger(url, story)


def test_a_lease_from_before_the_clock_was_set_back_counts_as_run_out(url):
    """Its holder is dead and the clock was an hour ahead: nobody waits for that hour."""

    async def story(ledger):
        def take(holder, at):
            return ledger.run("take", lambda tx: tx.take_lease("d", holder, at, TTL))

        assert await take("a", START + timedelta(hours=1)) == 1
        assert await take("b", START) == 2
        assert (
            await take("c", START - timedelta(seconds=30)) is None
        )  # a clock that is nearly right

    with_ledger(url, story)


def test_sixteen_processes_take_a_lease_at_once_and_one_gets_it(url):
    async def story(ledger):
        for moment in (START, START + 2 * TTL):  # the first lease, and one that ran out
            fences = await asyncio.gather(
                *(
                    ledger.run(
                        "take", lambda tx, i=i, m=moment: tx.take_lease("d", f"p{i}", m, TTL)
                    )
                    for i in range(16)
                )
            )
            assert sum(fence is not None for fence in fences) == 1

    with_ledger(url, story)


def test_a_stale_holder_writes_nothing(url):
    """It slept through its lease and still believes in it: refused in the same transaction."""

    def stale(tx: Tx) -> None:
        advance(tx, ROUND, TimePassed(), START + timedelta(hours=1), transaction="deadline")
        tx.check_fence("d", 1)

    async def story(ledger):
        await ledger.run("begin", begin)
        await ledger.run("take", lambda tx: tx.take_lease("d", "a", START, TTL))
        await ledger.run("check", lambda tx: tx.check_fence("d", 1))
        await ledger.run("take", lambda tx: tx.take_lease("d", "b", START + TTL, TTL))
        before = ledger.version()
        with pytest.raises(LeaseLostError):
            await ledger.run("deadline", stale)
        row = await ledger.read("look", lambda tx: tx.round(ROUND))
        assert isinstance(row.phase, Open)
        assert ledger.version() == before
        for name, fence in (("d", 3), ("unknown", 1)):
            with pytest.raises(LeaseLostError):
                await ledger.run("c", lambda tx, n=name, f=fence: tx.check_fence(n, f))

    with_ledger(url, story)


def test_a_takeover_waits_for_the_holders_open_transaction(url):
    """Between the check of the fence and the commit, nobody else becomes the holder."""
    order: list[str] = []
    checked, go_on = threading.Event(), threading.Event()

    def slow(tx: Tx) -> None:
        tx.check_fence("d", 1)
        checked.set()
        assert go_on.wait(20)
        order.append("old holder is done")

    def take(tx: Tx) -> int | None:
        fence = tx.take_lease("d", "b", START + TTL, TTL)
        order.append("new holder")
        return fence

    async def story(ledger):
        await ledger.run("take", lambda tx: tx.take_lease("d", "a", START, TTL))
        writing = asyncio.create_task(ledger.run("write", slow))
        await asyncio.to_thread(checked.wait, 20)
        taking = asyncio.create_task(ledger.run("take", take))
        await asyncio.sleep(0.2)
        assert order == []
        go_on.set()
        await writing
        assert await taking == 2
        assert order == ["old holder is done", "new holder"]

    with_ledger(url, story)
