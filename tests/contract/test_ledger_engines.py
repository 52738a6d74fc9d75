"""What is particular to SQLite, to PostgreSQL, and to several processes over one ledger."""

from __future__ import annotations

import asyncio
import sqlite3
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import DBAPIError, OperationalError

from coordinator.clock import ManualClock, SystemClock
from coordinator.ledger import Ledger, migrate, schema
from coordinator.ledger import engine as engines
from coordinator.rounds import advance
from protocols.errors import (
    ConfigurationError,
    CorruptStateError,
    LedgerBusyError,
    StorageFullError,
    UnreachableError,
)
from protocols.identifiers import NodeId, RoundId
from protocols.rounds import JoinArrived, Training
from tests.support.ledger_urls import url
from tests.support.ledgers import NODES, ROUND, START, begin, enrol, make_plan
from tests.support.postgres import postgres

__all__ = ["postgres", "url"]  # fixtures

CLOCK = ManualClock(START)


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder}/ledger.sqlite"


# -- migrations --------------------------------------------------------------------------------


def test_migrations_make_the_tables_that_the_code_knows(url):
    write = engines.connect(url).write
    with write.begin() as connection:
        migrate.upgrade(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    write.dispose()


def test_the_comparison_sees_a_difference(tmp_path):
    write = engines.connect(sqlite_url(tmp_path)).write
    with write.begin() as connection:
        migrate.upgrade(connection)
        connection.exec_driver_sql("ALTER TABLE nodes ADD COLUMN surprise TEXT")
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, schema.metadata)
    write.dispose()


def test_every_migration_goes_up_down_and_up(url):
    write = engines.connect(url).write
    revisions = migrate.revisions()
    for revision in revisions:
        with write.begin() as connection:
            migrate.upgrade(connection, revision)
    for revision in ["base", *revisions[:-1]][::-1]:
        with write.begin() as connection:
            migrate.downgrade(connection, revision)
    with write.begin() as connection:
        assert set(sa.inspect(connection).get_table_names()) <= {"alembic_version"}
        migrate.upgrade(connection)
    write.dispose()


def test_a_migration_that_fails_leaves_nothing(url):
    write = engines.connect(url).write

    def half() -> None:
        with write.begin() as connection:
            migrate.upgrade(connection)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    with write.begin() as connection:
        assert sa.inspect(connection).get_table_names() == []
    write.dispose()


def test_a_ledger_of_a_newer_version_is_refused(url):
    async def play() -> None:
        async with Ledger(url, clock=CLOCK) as ledger:
            await ledger.run(
                "future",
                lambda tx: tx._c.execute(
                    sa.text("UPDATE alembic_version SET version_num = '9999'")
                ),
            )
        with pytest.raises(ConfigurationError, match="another version"):
            await Ledger(url, clock=CLOCK).open()

    asyncio.run(play())


def test_every_column_says_its_unit_and_what_null_means():
    for table in schema.metadata.tables.values():
        assert table.comment, table.name
        for column in table.columns:
            assert column.comment, f"{table.name}.{column.name}"
            assert column.nullable == ("NULL:" in column.comment), f"{table.name}.{column.name}"
            if column.name.endswith("_at"):
                assert "Unix ms UTC" in column.comment, f"{table.name}.{column.name}"


# -- SQLite ------------------------------------------------------------------------------------


def test_sqlite_is_durable_and_strict(tmp_path):
    connections = engines.connect(sqlite_url(tmp_path))
    for engine in (connections.write, connections.read):
        with engine.connect() as connection:
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            ]
        assert found == ["wal", 2, 1, engines.BUSY_MS]
    connections.dispose()


def test_a_second_process_on_the_same_file_is_refused(tmp_path):
    async def play() -> None:
        async with Ledger(sqlite_url(tmp_path), clock=CLOCK):
            with pytest.raises(LedgerBusyError, match="two need PostgreSQL"):
                await Ledger(sqlite_url(tmp_path), clock=CLOCK).open()
        async with Ledger(sqlite_url(tmp_path), clock=CLOCK):
            pass  # the first one let go

    asyncio.run(play())


def test_a_lock_that_is_not_released_is_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "BUSY_MS", 50)

    async def play() -> None:
        async with Ledger(sqlite_url(tmp_path), clock=CLOCK) as ledger:
            other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerBusyError):
                await ledger.run("tell", lambda tx: tx.note("x"))
            assert await ledger.read("look", lambda tx: tx.nodes()) == []  # readers go on
            other.execute("ROLLBACK")
            other.close()
            await ledger.run("tell", lambda tx: tx.note("x"))

    asyncio.run(play())


def test_who_may_write_has_the_lock_from_the_first_look_on(tmp_path):
    """BEGIN IMMEDIATE: what was read before a write cannot have changed in between."""

    def look_then_write(tx) -> None:
        tx.nodes()
        other = sqlite3.connect(tmp_path / "ledger.sqlite", timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()

    async def play() -> None:
        async with Ledger(sqlite_url(tmp_path), clock=CLOCK) as ledger:
            await ledger.run("look", look_then_write)

    asyncio.run(play())


def test_a_full_disk_is_said_and_survived(tmp_path):
    """SQLite itself refuses another page, as it does when the disk has none."""

    def fill(tx) -> None:
        pages = tx._c.exec_driver_sql("PRAGMA page_count").scalar_one()
        tx._c.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1}")
        for i in range(2000):
            tx.add_node(NodeId(f"node-{i}"), b"k" * 32, START)

    async def play() -> None:
        async with Ledger(sqlite_url(tmp_path), clock=CLOCK) as ledger:
            with pytest.raises(StorageFullError):
                await ledger.run("fill", fill)
            assert await ledger.read("look", lambda tx: tx.nodes()) == []
            assert ledger.version() == 0
            limit = "PRAGMA max_page_count = 1073741823"
            await ledger.run("free", lambda tx: tx._c.exec_driver_sql(limit).scalar_one())
            await ledger.run("enrol", enrol)
            assert len(await ledger.read("look", lambda tx: tx.nodes())) == len(NODES)

    asyncio.run(play())


def test_a_file_that_is_no_database_is_said(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"this is not a database, it is a note" * 100)

    with pytest.raises(CorruptStateError):
        asyncio.run(Ledger(sqlite_url(tmp_path), clock=CLOCK).open())


def test_a_restart_need_not_wait_for_the_lease_of_the_dead(tmp_path):
    ttl = timedelta(hours=1)

    async def play() -> None:
        for fence in (1, 2):
            async with Ledger(sqlite_url(tmp_path), clock=CLOCK) as ledger:
                taken = await ledger.run("t", lambda tx: tx.take_lease("d", "p", START, ttl))
                assert taken == fence

    asyncio.run(play())


# -- URLs and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mysql://u:secret@h/d", "mysql is neither"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("not a url secret", "not a database URL"),
    ],
)
def test_a_wrong_url_is_refused_without_its_password(text, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        Ledger(text, clock=CLOCK)
    assert "secret" not in str(caught.value)


def test_nobody_answers_at_the_database():
    ledger = Ledger("postgresql+psycopg://minga:secret@127.0.0.1:1/none", clock=CLOCK)

    with pytest.raises(UnreachableError) as caught:
        asyncio.run(ledger.open())
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(ledger._engines.write.url)


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("40001", LedgerBusyError),
        ("55P03", LedgerBusyError),
        ("57014", LedgerBusyError),
        ("53300", LedgerBusyError),
        ("53100", StorageFullError),
        ("XX001", CorruptStateError),
        ("08006", UnreachableError),
        ("57P01", UnreachableError),
    ],
)
def test_what_postgresql_errors_mean(state, error):
    original = psycopg.Error("boom")
    original.__class__ = type("E", (psycopg.Error,), {"sqlstate": state})

    with pytest.raises(error), engines.ledger_errors():
        raise OperationalError("SELECT 1", {}, original)


def test_a_constraint_that_fails_is_our_bug_and_passes_through():
    original = psycopg.errors.UniqueViolation("boom")

    with pytest.raises(DBAPIError), engines.ledger_errors():
        raise sa.exc.IntegrityError("INSERT", {}, original)


# -- PostgreSQL: two coordinators --------------------------------------------------------------


@pytest.mark.postgres
def test_two_coordinators_share_a_ledger_and_hear_of_each_other(postgres):
    async def play() -> None:
        url = postgres.new_database()
        async with Ledger(url, clock=CLOCK) as one, Ledger(url, clock=CLOCK) as two:
            waiting = asyncio.create_task(two.changed(0, 20.0))
            await one.run("tell", lambda tx: tx.note("x"))
            assert await waiting == 1

    asyncio.run(play())


@pytest.mark.postgres
def test_two_coordinators_may_start_at_once(postgres):
    async def play() -> None:
        url = postgres.new_database()
        ledgers = await asyncio.gather(*(Ledger(url, clock=CLOCK).open() for _ in range(3)))
        await asyncio.gather(*(ledger.run("tell", lambda tx: tx.note("x")) for ledger in ledgers))
        assert await ledgers[0].changed(2, 20.0) == 3
        await asyncio.gather(*(ledger.close() for ledger in ledgers))

    asyncio.run(play())


@pytest.mark.postgres
def test_events_through_two_coordinators_are_all_counted(postgres):
    many = tuple(NodeId(f"node-{i:02}") for i in range(16))
    plan = make_plan(roster=many, min_participants=16)

    async def play() -> None:
        url = postgres.new_database()
        async with Ledger(url, clock=CLOCK) as one, Ledger(url, clock=CLOCK) as two:
            await one.run("begin", lambda tx: begin(tx, plan))

            def join(ledger: Ledger, node: NodeId) -> object:
                return ledger.run(
                    "join",
                    lambda tx: advance(
                        tx, ROUND, JoinArrived(node), START, transaction="join", node=node
                    ),
                )

            await asyncio.gather(
                *(join(ledger, node) for node in many for ledger in (one, two)),
            )
            phase = (await two.read("look", lambda tx: tx.round(ROUND))).phase
            assert isinstance(phase, Training)
            assert phase.cohort == frozenset(many)
            entries = await one.read("look", lambda tx: tx.history())
            assert [entry.id for entry in entries] == list(range(1, len(entries) + 1))
            assert sum(entry.transaction == "join" for entry in entries) == 16

    asyncio.run(play())


@pytest.mark.postgres
def test_history_of_two_coordinators_is_never_read_with_a_hole(postgres):
    """Ids are given in order of commit: a reader that goes on from the last id misses nothing."""

    async def play() -> None:
        url = postgres.new_database()
        async with Ledger(url, clock=CLOCK) as one, Ledger(url, clock=CLOCK) as two:

            async def write(ledger: Ledger) -> None:
                for _ in range(15):
                    await ledger.run("tell", lambda tx: tx.note("x"))

            seen: list[int] = []

            async def look() -> None:
                after = seen[-1] if seen else 0
                entries = await one.read("look", lambda tx: tx.history(after))
                seen.extend(entry.id for entry in entries)

            writing = asyncio.gather(*(write(ledger) for ledger in (one, two) for _ in range(4)))
            while not writing.done():
                await look()
            await look()
            assert seen == list(range(1, 121))

    asyncio.run(play())


@pytest.mark.postgres
def test_a_deadlock_is_tried_again_and_both_succeed(postgres):
    """Two transactions lock two rounds in opposite order; PostgreSQL sacrifices one of them."""
    other = RoundId(ROUND.run, 1)
    tries: list[str] = []

    async def play() -> None:
        async with Ledger(postgres.new_database(), clock=CLOCK) as ledger:
            plan = await ledger.run("begin", begin)
            await ledger.run(
                "open",
                lambda tx: tx.open_round(
                    other,
                    index=1,
                    phase=tx.round(ROUND).phase,
                    start_snapshot=b"{}",
                    why="for the test",
                    now=START,
                ),
            )
            assert plan.rounds == 2

            def both(tx, name: str, first: RoundId, second: RoundId) -> None:
                tries.append(name)
                tx.lock_round(first)
                if len(tries) < 3:
                    tx._c.execute(sa.text("SELECT pg_sleep(0.3)"))
                tx.lock_round(second)
                tx.note(name, now=START)

            await asyncio.gather(
                ledger.run("a", lambda tx: both(tx, "a", ROUND, other)),
                ledger.run("b", lambda tx: both(tx, "b", other, ROUND)),
            )
            assert len(tries) > 2  # else no deadlock happened and nothing was tested
            entries = await ledger.read("look", lambda tx: tx.history())
            assert sorted(entry.why for entry in entries[-2:]) == ["a", "b"]

    asyncio.run(play())


@pytest.mark.postgres
def test_a_crash_of_the_database_loses_nothing_that_was_acknowledged(postgres):
    async def play() -> None:
        async with Ledger(postgres.new_database(), clock=SystemClock()) as ledger:
            await ledger.run("begin", begin)
            acknowledged = ledger.version()

            def interrupted(tx) -> None:
                advance(tx, ROUND, JoinArrived(NODES[0]), START, transaction="join")
                tx.write_history()
                postgres.crash_and_restart()

            with pytest.raises(UnreachableError):
                await ledger.run("join", interrupted)
            assert (await ledger.read("look", lambda tx: tx.round(ROUND))).phase.joined == set()
            assert await ledger.read("look", lambda tx: tx.version()) == acknowledged
            await ledger.run(
                "join",
                lambda tx: advance(tx, ROUND, JoinArrived(NODES[0]), START, transaction="join"),
            )

    asyncio.run(play())
