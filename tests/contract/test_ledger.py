"""What every ledger must do, on SQLite and on a real PostgreSQL alike."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError

from coordinator.clock import ManualClock
from coordinator.ledger import LeaseLostError, Ledger, Tx
from coordinator.rounds import advance
from protocols.errors import (
    EquivocationError,
    ExistsError,
    LedgerBusyError,
    NotFoundError,
    TokenRefusedError,
    WrongPhaseError,
)
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.rounds import (
    Aborted,
    Burned,
    Committing,
    Dealing,
    DeclineArrived,
    JoinArrived,
    Open,
    Opened,
    Phase,
    Released,
    Revealing,
    TimePassed,
    Training,
    Uploading,
    deadline,
)
from tests.support.ledgers import (
    NODES,
    ROUND,
    RUN,
    START,
    begin,
    digest,
    enrol,
    first_phase,
    make_plan,
    snapshot_bytes,
    terms,
)
from tests.support.postgres import PostgresServer, postgres

__all__ = ["postgres"]  # a fixture

MANY = tuple(NodeId(f"node-{i:02}") for i in range(16))
TTL = timedelta(seconds=10)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty ledger is."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Ledger]:
    async with Ledger(url, clock=ManualClock(START)) as ledger:
        yield ledger


def with_ledger(url: str, story: Callable[[Ledger], object]) -> None:
    """Run ``story`` (a coroutine function) on an open ledger."""

    async def play() -> None:
        async with opened(url) as ledger:
            await story(ledger)  # type: ignore[misc]

    asyncio.run(play())


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
        timeout=60,
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


# -- rows --------------------------------------------------------------------------------------

T, CLOSES, SOME = terms(), START + timedelta(minutes=5), frozenset(NODES[:2])
PHASES: list[Phase] = [
    Open(terms=T, closes_at=CLOSES, joined=SOME, declined=frozenset(NODES[2:])),
    Training(terms=T, closes_at=CLOSES, cohort=frozenset(NODES), ready=SOME, left=frozenset()),
    Dealing(terms=T, closes_at=CLOSES, attempt=2, ready=SOME, dealt=SOME, agreed=frozenset()),
    Uploading(terms=T, closes_at=CLOSES, attempt=2, ready=SOME, received=SOME),
    Committing(terms=T, closes_at=CLOSES, attempt=1, ready=SOME, survivors=SOME, aborts=SOME),
    Revealing(terms=T, closes_at=CLOSES, attempt=1, ready=SOME, survivors=SOME, commits=SOME),
    Released(attempt=1, survivors=SOME),
    Released(
        attempt=1,
        survivors=SOME,
        opened=Opened(sum=Digest(digest("s")), model_root=Digest(digest("m"))),
    ),
    Aborted(code="stopped", reason="ñandú"),
    Burned(code="no_verdict", reason="x"),
]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: type(phase).__name__)
def test_a_phase_comes_back_as_it_went_in(url, phase):
    async def story(ledger):
        await ledger.run("begin", begin)
        await ledger.run("set", lambda tx: tx.set_phase(ROUND, phase, "why", now=START))
        row = await ledger.read("look", lambda tx: tx.round(ROUND))
        assert row.phase == phase
        assert row.why == "why"
        waiting = await ledger.read("look", lambda tx: tx.unfinished_rounds())
        assert [found.round for found in waiting] == ([] if row.final else [ROUND])
        late = START + timedelta(hours=1)
        due = await ledger.read("look", lambda tx: tx.due(late))
        assert [found.round for found in due] == ([ROUND] if deadline(phase) else [])
        assert await ledger.read("look", lambda tx: tx.due(START)) == []

    with_ledger(url, story)


def test_a_run_is_submitted_once(url):
    plan, other = make_plan(), make_plan(title="another")

    async def story(ledger):
        first = await ledger.run("submit", lambda tx: tx.add_run(plan, snapshot_bytes(), START))
        before = ledger.version()
        again = await ledger.run("submit", lambda tx: tx.add_run(plan, snapshot_bytes(), START))
        assert first == again
        assert ledger.version() == before
        assert first.plan == plan
        for changed, snapshot in ((other, snapshot_bytes()), (plan, snapshot_bytes("other"))):
            with pytest.raises(ExistsError):
                await ledger.run("s", lambda tx, p=changed, s=snapshot: tx.add_run(p, s, START))
        with pytest.raises(NotFoundError):
            await ledger.read("look", lambda tx: tx.run(RunId("nobody")))

    with_ledger(url, story)


def test_a_run_ends_with_a_reason(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        assert [run.run for run in await ledger.read("l", lambda tx: tx.active_runs())] == [RUN]
        await ledger.run("stop", lambda tx: tx.set_run_status(RUN, "stopped", "enough", START))
        assert await ledger.read("l", lambda tx: tx.active_runs()) == []
        run = await ledger.read("l", lambda tx: tx.run(RUN))
        assert (run.status, run.why, run.ended_at) == ("stopped", "enough", START)
        assert await ledger.read("l", lambda tx: tx.run_statuses()) == {RUN: ("stopped", START)}

    with_ledger(url, story)


def test_a_round_number_is_used_once(url):
    async def story(ledger):
        plan = await ledger.run("begin", begin)
        with pytest.raises(ExistsError):
            await ledger.run(
                "again",
                lambda tx: tx.open_round(
                    ROUND, index=1, phase=first_phase(plan), start_snapshot=b"", why="", now=START
                ),
            )
        assert await ledger.read("look", lambda tx: tx.round(RoundId(RUN, 7))) is None
        with pytest.raises(NotFoundError):
            await ledger.run("look", lambda tx: tx.lock_round(RoundId(RUN, 7)))

    with_ledger(url, story)


def test_results_and_the_last_release(url):
    phase = Released(
        attempt=1,
        survivors=SOME,
        opened=Opened(sum=Digest(digest("s")), model_root=Digest(digest("m"))),
    )
    metrics = {"weight": 2**53 + 1, "nodes": 2, "nll_millinats/es": 7}

    def release(tx: Tx) -> None:
        tx.lock_round(ROUND)
        tx.set_phase(ROUND, phase, "opened", now=START, entered=True)
        tx.set_result(ROUND, Digest(digest("s")), snapshot_bytes("next", 1), metrics)

    async def story(ledger):
        await ledger.run("begin", begin)
        assert await ledger.read("look", lambda tx: tx.last_released(RUN)) is None
        await ledger.run("release", release)
        row = await ledger.read("look", lambda tx: tx.last_released(RUN))
        assert (row.round, row.metrics, row.sum) == (ROUND, metrics, digest("s"))
        assert row.next_snapshot == snapshot_bytes("next", 1)
        assert row.released
        assert row.final
        assert await ledger.read("look", lambda tx: tx.released_rounds(RUN)) == [row]
        times = await ledger.read("look", lambda tx: tx.phase_times(RUN))
        assert [time.phase for time in times] == ["Open", "Released"]

    with_ledger(url, story)


def test_a_verdict_is_kept_and_not_changed(url):
    async def story(ledger):
        await ledger.run("begin", begin)

        def say(root: str, objection: str) -> object:
            return ledger.run(
                "confirm",
                lambda tx: tx.confirm(ROUND, NODES[0], root, objection, "detail", now=START),
            )

        assert await say(digest("m"), "") is True
        assert await say(digest("m"), "") is False
        for root, objection in ((digest("other"), ""), (digest("m"), "not_in_sum")):
            with pytest.raises(EquivocationError):
                await say(root, objection)
        (kept,) = await ledger.read("look", lambda tx: tx.confirmations(RUN))
        assert (kept.node, kept.model_root, kept.objection) == (NODES[0], digest("m"), "")

    with_ledger(url, story)


def test_uploads(url):
    def add(tx: Tx, node: NodeId = NODES[0], id_: bytes = b"1" * 32) -> object:
        return tx.add_upload(
            id_, ROUND, 1, node, header=b"h", signature=b"s", unit_hashes=[b"a" * 32] * 2, total=5
        )

    async def story(ledger):
        await ledger.run("begin", begin)
        assert await ledger.read("look", lambda tx: tx.upload(ROUND, 1, NODES[0])) is None
        row = await ledger.run("begin_upload", add)
        assert (row.node, row.total, row.unit_hashes) == (NODES[0], 5, (b"a" * 32,) * 2)
        assert row.receipt is None
        for again in (add, lambda tx: add(tx, id_=b"2" * 32), lambda tx: add(tx, node=NODES[1])):
            with pytest.raises(ExistsError):
                await ledger.run("begin_upload", again)
        finish = lambda tx: tx.finish_upload(b"1" * 32, b"r" * 32, START)  # noqa: E731
        assert await ledger.run("finish", finish) is True
        assert await ledger.run("finish", finish) is False
        done = await ledger.read("look", lambda tx: tx.upload_by_id(b"1" * 32))
        assert (done.receipt, done.finished_at) == (b"r" * 32, START)
        assert await ledger.read("look", lambda tx: tx.uploads(ROUND, 1)) == [done]
        assert await ledger.read("look", lambda tx: tx.uploads(ROUND, 2)) == []

    with_ledger(url, story)


def test_traffic_adds_up(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        await asyncio.gather(
            *(
                ledger.run("traffic", lambda tx: tx.add_traffic(ROUND, NODES[0], up=2**40, down=1))
                for _ in range(10)
            )
        )
        (row,) = await ledger.read("look", lambda tx: tx.traffic(RUN))
        assert (row.node, row.up, row.down) == (NODES[0], 10 * 2**40, 10)

    with_ledger(url, story)


def test_tokens_say_why_they_are_refused(url):
    async def story(ledger):
        await ledger.run("invite", lambda tx: tx.add_token(b"1" * 32, NODES[0], START + TTL))
        with pytest.raises(ExistsError):
            await ledger.run("invite", lambda tx: tx.add_token(b"1" * 32, NODES[1], START))
        for token, at, sentence in (
            (b"2" * 32, START, "unknown"),
            (b"1" * 32, START + TTL, "expired at 2026-03-01 12:00Z"),
        ):
            with pytest.raises(TokenRefusedError, match=sentence):
                await ledger.run("enrol", lambda tx, t=token, a=at: tx.use_token(t, a, b""))
        await ledger.run("enrol", lambda tx: tx.use_token(b"1" * 32, START, b"request"))
        with pytest.raises(TokenRefusedError, match="used before"):
            await ledger.run("enrol", lambda tx: tx.use_token(b"1" * 32, START, b"request"))
        assert await ledger.read("look", lambda tx: tx.token_use(b"1" * 32)) == b"request"

    with_ledger(url, story)


def test_nodes_and_certificates(url):
    def certify(tx: Tx, serial: int, days: int) -> None:
        tx.add_certificate(
            serial=serial,
            spki_sha256=Digest(digest("key")),
            subject_role="node",
            subject_name=NODES[0],
            not_after=START + timedelta(days=days),
            der=b"der",
        )

    async def story(ledger):
        await ledger.run("enrol", enrol)
        rows = await ledger.read("look", lambda tx: tx.nodes())
        assert [row.node for row in rows] == list(NODES)
        assert rows[0].seen_at is None
        await ledger.run("seen", lambda tx: tx.seen(NODES[0], START, "paused", "1.2"))
        await ledger.run("s", lambda tx: tx.set_node_status(NODES[0], "suspended", "key lost"))
        row = await ledger.read("look", lambda tx: tx.node(NODES[0]))
        assert (row.seen_at, row.state, row.agent_version) == (START, "paused", "1.2")
        assert row.status == "suspended"
        await ledger.run("enrol", lambda tx: tx.add_node(NODES[0], b"k" * 32, START))
        row = await ledger.read("look", lambda tx: tx.node(NODES[0]))
        assert (row.signing_key, row.status) == (b"k" * 32, "suspended")  # no way back in

        await ledger.run("certify", lambda tx: certify(tx, 2**159, 30))
        await ledger.run("certify", lambda tx: certify(tx, 7, 10))
        with pytest.raises(ExistsError):
            await ledger.run("certify", lambda tx: certify(tx, 7, 90))
        found = await ledger.read("look", lambda tx: tx.certificate(Digest(digest("key"))))
        assert found.serial == 2**159
        assert await ledger.read("look", lambda tx: tx.certificate(Digest(digest("no")))) is None

    with_ledger(url, story)


def test_progress_is_replaced(url):
    async def story(ledger):
        await ledger.run("enrol", enrol)
        for text in (b"first", b"second"):
            await ledger.run("p", lambda tx, t=text: tx.set_progress(NODES[0], t, START))
        (row,) = await ledger.read("look", lambda tx: tx.progress())
        assert (row.node, row.reports, row.received_at) == (NODES[0], b"second", START)

    with_ledger(url, story)


def test_a_refused_event_is_not_recorded(url):
    async def story(ledger):
        await ledger.run("begin", begin)
        before = ledger.version()
        late = START + timedelta(hours=1)
        with pytest.raises(WrongPhaseError):
            await ledger.run(
                "join", lambda tx: advance(tx, ROUND, JoinArrived(NODES[0]), late, transaction="j")
            )
        assert ledger.version() == before

    with_ledger(url, story)
