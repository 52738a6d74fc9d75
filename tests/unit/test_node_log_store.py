"""A node's own leaves: one for an act, the same bytes again, a chain without holes; and what a
coordinator says it waits for."""

from __future__ import annotations

import pytest

from coordinator.log_hub import LogHub, describe_waiting
from node_agent.log import enrol_leaf
from node_agent.log_store import LogStore
from node_agent.log_verifier import LogVerifier
from policies.audit.replay import LeafRefusedError, witness_policy
from protocols.errors import CorruptStateError, IntegrityError
from protocols.identifiers import Digest, NodeId
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.note import Note
from tests.support.leaves import NODES, ORIGIN, World, key, log_signer, witness_signer

NOW = 1_790_000_000


def asked(store, csr=b"csr"):
    return enrol_leaf(
        store,
        key=key(NODES[0]),
        node=NodeId(NODES[0]),
        csr=csr,
        spki=Digest("0" * 64),
        witness=witness_signer(NODES[0]).verifier,
    )


def test_the_same_act_gives_the_same_bytes_over_a_restart(tmp_path):
    store = LogStore(tmp_path / "log.sqlite")
    first = asked(store)
    assert asked(store).entry == first.entry
    store.close()
    store = LogStore(tmp_path / "log.sqlite")
    assert asked(store).entry == first.entry
    second = asked(store, b"another")
    assert second.seq == 2
    assert [leaf.seq for leaf in store.untaken(3)] == [1, 2]
    store.taken([1], NOW)
    assert [leaf.seq for leaf in store.untaken(3)] == [2]
    assert store.missing() == {first.leaf_hash: NOW}
    assert (tmp_path / "log.sqlite").stat().st_mode & 0o077 == 0


def witnessed(world, size, *nodes):
    copy = World()
    copy.entries = world.entries[:size]
    root = copy.replay().root
    note = sign_checkpoint(Checkpoint(origin=ORIGIN, size=size, root=root), log_signer())
    lines = [cosign(note.text, signer=witness_signer(node), time=NOW) for node in nodes]
    return Note(text=note.text, signatures=(*note.signatures, *lines)).to_bytes()


def verifier(store):
    return LogVerifier(store, log_signer().verifier, now=lambda: NOW)


def test_what_was_verified_is_there_after_a_restart_and_never_goes_back(tmp_path):
    world = World().begin().round()
    store = LogStore(tmp_path / "log.sqlite")
    reader = verifier(store)
    half = 12
    assert not reader.take(0, world.entries[:5], b"")
    assert reader.take(5, world.entries[5:half], witnessed(world, half, *NODES[:3]))
    store.close()
    store = LogStore(tmp_path / "log.sqlite")
    reader = verifier(store)
    assert (reader.size, reader.seen.size) == (half, half)
    with pytest.raises(IntegrityError):  # two of four
        reader.take(half, world.entries[half:], witnessed(world, len(world.entries), *NODES[:2]))
    assert reader.size == half
    assert reader.take(half, world.entries[half:], witnessed(world, len(world.entries), *NODES[1:]))
    assert reader.known().alarm is None
    with pytest.raises(CorruptStateError):
        store.accept(half, [b"x"], half + 1, b"note", [])


def test_a_leaf_that_may_not_stand_is_an_alarm_for_good(tmp_path):
    world = World().begin().round(upto="round.start")
    good = len(world.entries)
    world.say("coordinator", world.start(), **world.subject())
    store = LogStore(tmp_path / "log.sqlite")
    reader = verifier(store)
    bad = sign_checkpoint(
        Checkpoint(origin=ORIGIN, size=good + 1, root=b"\1" * 32), log_signer()
    ).to_bytes()
    assert reader.take(0, world.entries[:good], witnessed_prefix(world, good))
    with pytest.raises(LeafRefusedError):
        reader.take(good, world.entries[good:], bad)
    store.close()
    store = LogStore(tmp_path / "log.sqlite")
    assert verifier(store).known().alarm.rule == "log.second_start"


def witnessed_prefix(world, size):
    copy = World()
    copy.entries = world.entries[:size]
    return witnessed(copy, size, *NODES)


def test_what_is_waited_for_is_said_by_name():
    world = World().begin()
    hub = LogHub(log_signer().verifier)
    assert describe_waiting(None) == describe_waiting(hub) == ""
    state = world.replay()
    policy = witness_policy(log_signer().verifier, state.witnesses)
    head = Checkpoint(origin=ORIGIN, size=state.size, root=state.root)
    hub.keys = dict(policy.witnesses)
    hub.offer(sign_checkpoint(head, log_signer()), head, [policy])
    hub.trouble[NODES[1]] = "answered 422: no"
    said = describe_waiting(hub)
    assert f"waits for cosignatures of {NODES[0]}, {NODES[1]} (answered 422: no)" in said
