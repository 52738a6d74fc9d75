"""A coordinator that shows two histories gets neither a second quorum nor past the nodes.

Real services and a real log writer over mutual TLS, four nodes that follow and cosign. The fork is
a copy of the coordinator's folder, keys and all, from before the last leaf: what a restored backup
is by accident, and what a liar makes on purpose.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.ledger import Tx
from coordinator.log_writer import LogWriter
from node_agent.log import now_unix
from policies.audit.gate import PlanShown, Stops, Waits, gate
from protocols.errors import IntegrityError
from protocols.identifiers import Digest, RoundId, RunId
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.kinds import Heartbeat
from protocols.tlog.note import Note
from protocols.tlog.ratchet import ForkError
from protocols.tlog.trust_policy import QuorumError
from protocols.tlog.witness import write_request
from tests.support.door import Door
from tests.support.node_log import close_log, enrolled_log

NODES = ("ar-univ-1", "br-univ-1", "cl-univ-1", "mx-univ-1")
ROUND = RoundId(RunId("r1"), 0)
PATIENCE_S = 30.0


def say(tx: Tx, seconds: int) -> None:
    said = Heartbeat(interval_s=seconds)
    tx.append_own(said, subject="log/heartbeat", digest=Digest("0" * 64))


async def until(what, *, seconds=PATIENCE_S):
    for _ in range(int(seconds / 0.02)):
        found = what()
        if found:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("did not happen in time")


@asynccontextmanager
async def household(folder: Path, door: Door):
    """Four enrolled nodes that follow and cosign."""
    logs = [await enrolled_log(folder / node, door, node) for node in NODES]
    tasks = [asyncio.create_task(log.follow()) for log in logs]
    tasks += [asyncio.create_task(log.cosign()) for log in logs]
    try:
        yield logs
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for log in logs:
            await close_log(log)


async def stop(door):
    await asyncio.to_thread(door.stop)


async def start(door):
    await asyncio.to_thread(door.start)


async def forked(tmp_path, door, logs):
    """A twin of the coordinator from before the last leaf that everybody has accepted."""
    size = 2 + 2 * len(NODES)
    await until(lambda: all(log.verifier.size == size for log in logs))
    await stop(door)
    shutil.copytree(door.folder, tmp_path / "twin")
    await start(door)
    await asyncio.to_thread(door.ledger, lambda tx: say(tx, 100))
    await until(lambda: all(log.verifier.size == size + 1 for log in logs))
    await stop(door)
    return Door(tmp_path / "twin", again=True), size + 1


async def story_of_a_restored_backup(tmp_path):
    door = await asyncio.to_thread(Door, tmp_path / "fed", log=True)
    await start(door)
    async with household(tmp_path, door) as logs:
        twin, size = await forked(tmp_path, door, logs)
        await start(twin)
        try:
            await asyncio.to_thread(twin.ledger, lambda tx: say(tx, 200))
            (writer,) = twin.drivers
            await until(writer.done)
            assert isinstance(writer.exception(), ForkError)
            assert twin.parts.log.hub.signed is None
            assert {log.verifier.size for log in logs} == {size}
        finally:
            await stop(twin)


def test_a_restored_backup_is_told_by_its_witnesses_and_signs_nothing(tmp_path):
    asyncio.run(story_of_a_restored_backup(tmp_path))


async def story_of_a_liar(tmp_path):
    door = await asyncio.to_thread(Door, tmp_path / "fed", log=True)
    await start(door)
    async with household(tmp_path, door) as logs:
        twin, size = await forked(tmp_path, door, logs)
        await start(twin)
        try:
            await asyncio.to_thread(twin.ledger, lambda tx: say(tx, 200))
            await asyncio.to_thread(twin.ledger, lambda tx: say(tx, 300))
            hub = twin.parts.log.hub
            await until(lambda: hub.signed is not None and hub.signed.size == size + 1)
            await until(lambda: set(hub.trouble) == set(NODES))
            assert hub.witnessed is None  # no second quorum
            assert not hub.signed.lines
            assert {log.verifier.size for log in logs} == {size}
            await _not_past_the_nodes(twin, logs, size)
        finally:
            await stop(twin)


async def _not_past_the_nodes(twin, logs, size):
    """Pages of the other branch, with all the cosignatures that liars can get."""
    hub, victim = twin.parts.log.hub, logs[0]
    rows = await asyncio.to_thread(twin.ledger, lambda tx: tx.leaves(0, 1000))
    note = hub.signed.note
    liars = [cosign(note.text, signer=log.witness.signer, time=now_unix()) for log in logs[1:3]]
    under = Note(text=note.text, signatures=(*note.signatures, *liars)).to_bytes()

    # What the log alone signed over other leaves than it showed before is evidence.
    with pytest.raises(IntegrityError):
        victim.verifier.take(size, [rows[size].entry], under)
    shown = PlanShown(plan_sha256=Digest("0" * 64), model_in=Digest("0" * 64))
    found = gate(victim.verifier.known(), ROUND, shown, now=now_unix())
    assert isinstance(found, Stops)
    assert victim.verifier.size == size

    # A branch that does extend what was seen still needs the quorum: two of four are none.
    other = logs[3]
    state = other.verifier.log.copy()
    good = await asyncio.to_thread(_extension, twin, state)
    head = Checkpoint(origin=note.text.split("\n")[0], size=state.size, root=state.root)
    signed = sign_checkpoint(head, twin.parts.log.signer)
    two = [cosign(signed.text, signer=log.witness.signer, time=now_unix()) for log in logs[1:3]]
    lacking = Note(text=signed.text, signatures=(*signed.signatures, *two)).to_bytes()
    with pytest.raises(QuorumError):
        other.verifier.take(size, [good], lacking)
    assert isinstance(gate(other.verifier.known(), ROUND, shown, now=now_unix()), Waits)

    # And each witness, asked straight away, refuses the branch.
    for log in logs:
        for old in (size, 0):
            body = write_request(old=old, proof=(), checkpoint=note.to_bytes())
            assert log.witness.add(body).status in (409, 422)


def _extension(twin, state):
    """One more leaf by the coordinator's own key, behind what the nodes have accepted."""
    from coordinator.ledger import OwnLeaf

    order = twin.parts.ledger._sequencer
    said = Heartbeat(interval_s=400)
    leaf = OwnLeaf(said=said, subject="log/x", digest=Digest("0" * 64), now=twin.parts.clock.now())
    entry = order._sign(state, leaf, said).entry
    state.take(entry)
    return entry


def test_a_liar_with_the_logs_own_key_gets_no_quorum_and_not_past_a_node(tmp_path, monkeypatch):
    monkeypatch.setattr(LogWriter, "_compare", _without_asking)
    asyncio.run(story_of_a_liar(tmp_path))


def _without_asking(self) -> bool:
    self._compared = True
    return True
