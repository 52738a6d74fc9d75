"""The log writer under SIGKILL at each write: a restart finds or makes a consistent tree.

And what a crash does not excuse: a ledger from an old backup, beside a ratchet, a directory or
witnesses that know better, stops the writer before it signs.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.clock import SystemClock
from coordinator.ledger import Ledger, Sequencer, Tx
from coordinator.log_files import LogFiles, Ratchet
from coordinator.log_hub import LogHub, describe_waiting
from coordinator.log_writer import LogWriter
from protocols.errors import StorageFullError
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.merkle import leaf_hash, tree_root
from protocols.tlog.note import Note
from protocols.tlog.ratchet import ForkError
from tests.support.leaves import NODES, ORIGIN, World, key, log_signer, witness_signer
from tests.support.log_crash import INSTANTS
from tests.support.log_dir import read_log

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_at_every_write(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.log_crash", "--dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["killed"] == len(INSTANTS)
    assert said["size"] > 256
    assert said["leftovers"] == []


class Bench:
    """A ledger and a writer in this process."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self.world = world
        self.hub = LogHub(log_signer().verifier)

    async def play(self, entries, story):
        order = Sequencer(key=key("coordinator"), origin=ORIGIN, seen=self.hub.seen)
        url = f"sqlite:///{self.folder}/ledger.sqlite"
        async with Ledger(url, clock=SystemClock(), sequencer=order) as ledger:
            size = await ledger.read("size", Tx.log_size)
            for entry in entries[size:]:
                await ledger.run("leaf", lambda tx, entry=entry: tx.append_leaf(entry))
            writer = LogWriter(
                ledger=ledger,
                clock=SystemClock(),
                hub=self.hub,
                files=LogFiles(self.folder / "log"),
                ratchet=Ratchet(self.folder / "ratchet"),
                signer=log_signer(),
            )
            task = asyncio.create_task(writer.run())
            try:
                return await story(task)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def published(self, size, task):
        for _ in range(1000):
            found = LogFiles(self.folder / "log").published()
            if found is not None and found.size >= size:
                return found
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
        raise AssertionError("not published in time")


def write_all(folder, world):
    """A log of everything that the world said, whole on the disk."""
    bench = Bench(folder, world)

    async def story(task):
        return await bench.published(len(world.entries), task)

    return asyncio.run(bench.play(world.entries, story))


async def fails(task):
    done, _ = await asyncio.wait({task}, timeout=20)
    assert done, "the writer went on"
    return task.exception()


def restored(folder, world, keep):
    """The ledger as an old backup had it: only the first leaves."""
    (folder / "ledger.sqlite").unlink()
    for extra in folder.glob("ledger.sqlite-*"):
        extra.unlink()
    bench = Bench(folder, world)
    return asyncio.run(bench.play(world.entries[:keep], fails))


def test_a_log_is_written_and_read_from_outside(tmp_path):
    world = World(witnesses=False).begin().round()
    head = write_all(tmp_path, world)
    read = read_log(tmp_path / "log")
    assert read.head == head
    assert list(read.entries) == world.entries
    assert read.replay().rounds


def test_a_database_from_an_old_backup_is_detected_by_the_ratchet(tmp_path):
    world = World(witnesses=False).begin().round()
    write_all(tmp_path, world)
    shutil.rmtree(tmp_path / "log")
    error = restored(tmp_path, world, len(world.entries) - 3)
    assert isinstance(error, ForkError)
    assert not (tmp_path / "log/checkpoint").exists()


def test_and_by_the_directory_when_the_ratchet_is_lost(tmp_path):
    world = World(witnesses=False).begin().round()
    write_all(tmp_path, world)
    (tmp_path / "ratchet").unlink()
    assert isinstance(restored(tmp_path, world, len(world.entries) - 3), ForkError)


def test_and_another_history_of_the_same_size(tmp_path):
    world = World(witnesses=False).begin().round()
    write_all(tmp_path, world)
    other = World(witnesses=False).begin().round(upto="round.confirm")
    other.say("coordinator", other.plan(1), **other.subject(1))
    (tmp_path / "ledger.sqlite").unlink()
    for extra in tmp_path.glob("ledger.sqlite-*"):
        extra.unlink()
    bench = Bench(tmp_path, other)
    assert isinstance(asyncio.run(bench.play(other.entries, fails)), ForkError)


def turned(folder, world):
    """The ratchet as it was after the first leaf."""
    root = leaf_hash(world.entries[0])
    Ratchet(folder / "ratchet").turn(Checkpoint(origin=ORIGIN, size=1, root=root))


def _cosigned(world, size, node, *, at=1_790_000_000):
    root = tree_root([leaf_hash(entry) for entry in world.entries[:size]])
    note = sign_checkpoint(Checkpoint(origin=ORIGIN, size=size, root=root), log_signer())
    line = cosign(note.text, signer=witness_signer(node), time=at)
    return Note(text=note.text, signatures=(*note.signatures, line)).to_bytes()


def test_after_a_start_nothing_is_signed_before_a_quorum_of_witnesses_was_asked(tmp_path):
    """Ratchet and directory restored from the same old backup: only the witnesses know better."""
    world = World().begin()
    early = len(world.entries)
    world.round()
    bench = Bench(tmp_path, world)
    Ratchet(tmp_path / "ratchet").turn(
        Checkpoint(
            origin=ORIGIN,
            size=1,
            root=__import__("hashlib").sha256(b"\0" + world.entries[0]).digest(),
        )
    )

    async def story(task):
        await asyncio.sleep(0.5)
        assert bench.hub.signed is None  # waits
        bench.hub.greet(NODES[0], b"")
        bench.hub.greet(NODES[1], b"")
        await asyncio.sleep(0.4)
        assert bench.hub.signed is None  # two of three needed
        ahead = _cosigned(world, len(world.entries), NODES[2])
        bench.hub.greet(NODES[2], ahead)
        return await fails(task)

    assert isinstance(asyncio.run(bench.play(world.entries[:early], story)), ForkError)


@pytest.mark.parametrize("ahead_s", [0, 2**40], ids=["right", "clock-was-ahead"])
def test_witnesses_that_know_no_more_let_it_go_on(tmp_path, ahead_s, monkeypatch, caplog):
    """Also one whose clock was ahead when it cosigned, and is right now: it is not left out."""
    monkeypatch.setattr("coordinator.log_writer.PATIENCE_S", 0.0)
    world = World().begin()
    bench = Bench(tmp_path, world)
    Ratchet(tmp_path / "ratchet").turn(
        Checkpoint(
            origin=ORIGIN,
            size=1,
            root=__import__("hashlib").sha256(b"\0" + world.entries[0]).digest(),
        )
    )

    async def story(task):
        for _ in range(500):
            if bench.hub.silent:
                break
            await asyncio.sleep(0.01)
        assert bench.hub.waits_for() == NODES
        said = describe_waiting(bench.hub)
        assert said == f"a new writer of the log waits for what {', '.join(NODES)} cosigned last"
        await asyncio.sleep(0.3)  # it looks again several times, and complains once
        complaints = [line for line in caplog.messages if line.startswith("nothing is signed")]
        assert len(complaints) == 1
        assert ", ".join(NODES) in complaints[0]
        for node in NODES[:3]:
            bench.hub.keys[node] = witness_signer(node).verifier
            bench.hub.greet(node, _cosigned(world, 3, node, at=1_790_000_000 + ahead_s))
        for _ in range(500):
            if bench.hub.signed is not None:
                break
            await asyncio.sleep(0.01)
        head = bench.hub.signed
        assert head is not None
        assert not task.done()
        assert bench.hub.silent == ()
        assert bench.hub.waits_for() == NODES
        assert bench.hub.witnessed is None
        for node in NODES[:3]:
            found, _ = bench.hub.request_for(node)
            line = cosign(found.note.text, signer=witness_signer(node), time=1_790_000_001)
            body = line.to_text().encode()
            assert bench.hub.answer(node, found, 200, body, now=1_790_000_001)
        await bench.published(len(world.entries), task)

    asyncio.run(bench.play(world.entries, story))
    read = read_log(tmp_path / "log")
    assert len(read.opened.cosignatures) == 3


def test_a_checkpoint_does_not_go_back_when_a_slow_writer_wakes_up(tmp_path):
    world = World(witnesses=False).begin().round()
    head = write_all(tmp_path, world)
    files = LogFiles(tmp_path / "log")
    newest = (tmp_path / "log/checkpoint").read_bytes()
    early = Checkpoint(origin=ORIGIN, size=1, root=leaf_hash(world.entries[0]))

    files.publish(sign_checkpoint(early, log_signer()).to_bytes(), 1)

    assert (tmp_path / "log/checkpoint").read_bytes() == newest
    assert files.published() == head


def test_who_does_not_write_shows_what_was_published_and_takes_over(tmp_path):
    """Two processes over one ledger: one leads, the other follows, then leads."""
    world = World(witnesses=False).begin().round()
    order = Sequencer(
        key=key("coordinator"), origin=ORIGIN, seen=LogHub(log_signer().verifier).seen
    )

    async def play():
        url = f"sqlite:///{tmp_path}/ledger.sqlite"
        async with Ledger(url, clock=SystemClock(), sequencer=order) as ledger:
            for entry in world.entries:
                await ledger.run("leaf", lambda tx, entry=entry: tx.append_leaf(entry))
            hubs = [LogHub(log_signer().verifier) for _ in range(2)]
            tasks, kept = [], [Watched(tmp_path / "log") for _ in hubs]
            for number, hub in enumerate(hubs):
                writer = LogWriter(
                    ledger=ledger,
                    clock=SystemClock(),
                    hub=hub,
                    files=kept[number],
                    ratchet=Ratchet(tmp_path / f"ratchet-{number}"),
                    signer=log_signer(),
                )
                tasks.append(asyncio.create_task(writer.run()))
                await until(lambda: sum(hub.leads for hub in hubs) == 1)

            await until(lambda: all(hub.witnessed is not None for hub in hubs))
            await until(lambda: {hub.witnessed.size for hub in hubs} == {len(world.entries)})
            assert hubs[0].prove(0) == hubs[1].prove(0)
            await asyncio.sleep(0.3)
            assert kept[0].written
            assert not kept[1].written
            assert [hub.leads for hub in hubs] == [True, False]
            tasks[0].cancel()
            await until(lambda: hubs[1].leads)
            assert not tasks[1].done()
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(play())


class Watched(LogFiles):
    """Counts what is written, and has no room as often as it is told."""

    def __init__(self, root, full=0):
        super().__init__(root)
        self.written, self.full = 0, full

    def _write(self, path, data):
        if path == "checkpoint" and self.full:
            self.full -= 1
            raise StorageFullError("no room")
        self.written += 1
        super()._write(path, data)


def test_the_writer_goes_on_when_a_full_disk_has_room_again(tmp_path):
    world = World(witnesses=False).begin().round()
    hub, files = LogHub(log_signer().verifier), Watched(tmp_path / "log", full=2)
    order = Sequencer(key=key("coordinator"), origin=ORIGIN, seen=hub.seen)

    async def play():
        url = f"sqlite:///{tmp_path}/ledger.sqlite"
        async with Ledger(url, clock=SystemClock(), sequencer=order) as ledger:
            for entry in world.entries:
                await ledger.run("leaf", lambda tx, entry=entry: tx.append_leaf(entry))
            writer = LogWriter(
                ledger=ledger,
                clock=SystemClock(),
                hub=hub,
                files=files,
                ratchet=Ratchet(tmp_path / "ratchet"),
                signer=log_signer(),
            )
            task = asyncio.create_task(writer.run())
            await until((tmp_path / "log/checkpoint").exists)
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(play())
    assert files.full == 0
    assert files.published().size == len(world.entries)


async def until(what):
    for _ in range(3000):
        if what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("in vain")
