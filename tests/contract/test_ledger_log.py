"""The round log in the ledger, on SQLite and on a real PostgreSQL: leaves are part of what they
speak of, stand in order without gaps, and nobody's chain is forked."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.clock import ManualClock
from coordinator.ledger import Ledger, Sequencer, Tx
from policies.audit.replay import LeafRefusedError
from protocols.errors import ConfigurationError, CorruptStateError
from protocols.identifiers import Digest
from protocols.tlog import kinds
from protocols.tlog.leaf import BrokenChainError
from tests.support.leaves import NODES, D, World, key
from tests.support.ledger_urls import url
from tests.support.ledgers import START
from tests.support.postgres import postgres

__all__ = ["postgres", "url"]  # fixtures
CLOCK = ManualClock(START)


def sequencer():
    return Sequencer(key=key("coordinator"))


def play(url, story, orders="one"):
    async def run():
        order = sequencer() if orders == "one" else orders
        async with Ledger(url, clock=CLOCK, sequencer=order) as ledger:
            return await story(ledger)

    return asyncio.run(run())


def fill(ledger, entries):
    async def all_of_them():
        for entry in entries:
            await ledger.run("leaf", lambda tx, entry=entry: tx.append_leaf(entry))

    return all_of_them()


def test_leaves_stand_in_order_with_their_roots(url):
    world = World().begin().round()

    async def story(ledger):
        await fill(ledger, world.entries)
        rows = await ledger.read("rows", lambda tx: tx.leaves(0, 1000))
        hashes = await ledger.read("hashes", lambda tx: tx.leaf_hashes(3))
        return rows, hashes, ledger.version()

    rows, hashes, version = play(url, story)
    assert [row.entry for row in rows] == world.entries
    assert [row.index for row in rows] == list(range(len(rows)))
    assert rows[-1].root == world.replay().root
    assert [h.hex() for h in hashes] == world.hashes[3:]
    assert version >= len(rows)  # whoever waits for news hears of each


def test_a_transaction_that_fails_leaves_no_leaf(url):
    world = World().begin()

    def half(tx: Tx):
        tx.append_leaf(world.entries[0])
        tx.write_history()
        raise RuntimeError("before the commit")

    async def story(ledger):
        with pytest.raises(RuntimeError):
            await ledger.run("half", half)
        assert await ledger.read("size", Tx.log_size) == 0
        await fill(ledger, world.entries)
        return await ledger.read("size", Tx.log_size)

    assert play(url, story) == len(world.entries)


def test_a_leaf_that_may_not_stand_takes_its_transaction_with_it(url):
    world = World().begin()
    await_entries = list(world.entries)
    stranger = world.say("somebody", kinds.Heartbeat(interval_s=60))
    early = world.say(NODES[0], world.commit(NODES[0]), **world.subject())

    async def story(ledger):
        await fill(ledger, await_entries)
        for entry in (stranger, early, b"{}", early[:-2]):

            def work(tx, entry=entry):
                tx.note("the state change")
                tx.append_leaf(entry)

            with pytest.raises(Exception) as caught:
                await ledger.run("bad", work)
            assert not isinstance(caught.value, AssertionError)
        entries = await ledger.read("history", lambda tx: tx.history())
        assert "the state change" not in [entry.why for entry in entries]
        return await ledger.read("size", Tx.log_size)

    assert play(url, story) == len(await_entries)


def test_the_same_leaf_again_changes_nothing_and_a_fork_is_refused(url):
    world = World().begin().round(upto="round.plan")
    about = world.subject()
    head = world.heads[NODES[0]]
    join = world.say(NODES[0], world.join(NODES[0]), **about)
    world.heads[NODES[0]] = head
    other = world.say(
        NODES[0],
        kinds.RoundDecline(node=NODES[0], plan_sha256=world.plan_sha256, rules=("site.hours",)),
        **about,
    )

    async def story(ledger):
        await fill(ledger, world.entries[:-2])
        for _ in range(3):
            await ledger.run("join", lambda tx: tx.append_leaf(join))
        with pytest.raises(BrokenChainError):
            await ledger.run("fork", lambda tx: tx.append_leaf(other))
        rows = await ledger.read("rows", lambda tx: tx.leaves(0, 1000))
        found = await ledger.read("chain", lambda tx: tx.chain_head(rows[-1].signer))
        return rows, found

    rows, found = play(url, story)
    assert rows[-1].entry == join
    assert found == (2, rows[-1].leaf_hash)


def test_our_own_leaves_continue_their_chain_over_a_restart(url):
    world = World().begin()
    beat = kinds.Heartbeat(interval_s=3600)

    async def one(ledger):
        def say(tx):
            tx.append_own(beat, subject="log/heartbeat", digest=Digest(D["a"]), now=START)

        await ledger.run("beat", say)
        return await ledger.read("rows", lambda tx: tx.leaves(0, 1000))

    async def first(ledger):
        await fill(ledger, world.entries)
        return await one(ledger)

    play(url, first)
    rows = play(url, one)
    assert [row.kind for row in rows[-2:]] == ["log.heartbeat"] * 2
    last = play(url, one)[-1]
    assert last.index == len(rows)


def test_many_at_once_get_each_its_place(url):
    world = World().begin()
    entries = world.entries
    requests = entries[1::2]  # each node asks, each is certified

    async def story(ledger):
        await fill(ledger, entries[:1])
        await asyncio.gather(
            *(ledger.run("leaf", lambda tx, e=e: tx.append_leaf(e)) for e in requests)
        )
        return await ledger.read("rows", lambda tx: tx.leaves(0, 1000))

    rows = play(url, story)
    assert [row.index for row in rows] == list(range(1 + len(NODES)))


def test_two_processes_share_one_order(url):
    """What another process committed is read before the next leaf gets its place."""
    world = World().begin()
    half = len(world.entries) // 2

    async def story():
        if not url.startswith("postgresql"):
            pytest.skip("a SQLite ledger belongs to one process")
        async with (
            Ledger(url, clock=CLOCK, sequencer=sequencer()) as one,
            Ledger(url, clock=CLOCK, sequencer=sequencer()) as two,
        ):
            await fill(one, world.entries[:half])
            await fill(two, world.entries[half:])
            with pytest.raises(LeafRefusedError):
                await one.run("again", lambda tx: tx.append_leaf(_second_genesis(world)))
            return await one.read("rows", lambda tx: tx.leaves(0, 1000))

    rows = asyncio.run(story())
    assert [row.entry for row in rows] == world.entries[: len(rows)]


def _second_genesis(world):
    world.genesis()
    return world.entries.pop()


def test_a_ledger_that_went_back_is_noticed(url):
    """The process has seen more leaves committed than the ledger now has."""
    world = World().begin()

    def forget(tx: Tx):
        import sqlalchemy as sa

        tx._c.execute(sa.text('DELETE FROM log_leaf WHERE "index" > 2'))
        tx._c.execute(sa.text("UPDATE log_size SET value = 3"))

    async def story(ledger):
        await fill(ledger, world.entries)
        await ledger.run("forget", forget)
        with pytest.raises(CorruptStateError):
            await ledger.run("next", lambda tx: tx.append_leaf(world.entries[3]))

    play(url, story)


def test_without_a_log_our_leaves_are_not_written_and_others_refused(url):
    async def story(ledger):
        beat = kinds.Heartbeat(interval_s=3600)
        await ledger.run("beat", lambda tx: tx.append_own(beat, subject="x", digest=Digest(D["a"])))
        with pytest.raises(ConfigurationError):
            await ledger.run("leaf", lambda tx: tx.append_leaf(b"{}"))
        return await ledger.read("size", Tx.log_size)

    assert play(url, story, orders=None) == 0
