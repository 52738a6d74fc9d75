"""A node's own leaves: one for an act, the same bytes again, a chain without holes; and what a
coordinator says it waits for."""

from __future__ import annotations

import pytest

from coordinator.log_hub import LogHub, describe_waiting
from node_agent.cli.alarms import alarm_facts, clear_alarms
from node_agent.config import DataConfig, WorkerConfig, render_config
from node_agent.keys import KeyStore
from node_agent.log import LogPaths, enrol_leaf
from node_agent.log_store import LogStore
from node_agent.log_verifier import LogVerifier
from policies.audit.committee import counted
from policies.audit.replay import LeafRefusedError, peek, witness_policy
from protocols.canonical import sha256_hex
from protocols.errors import (
    CorruptStateError,
    IntegrityError,
    MalformedMessageError,
    NotFoundError,
)
from protocols.identifiers import Digest, FederationId, NodeId
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.note import Note
from tests.support.leaves import NODES, ORIGIN, World, key, log_signer, witness_signer
from tests.support.node import node_folder

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


# -- whose cosignatures count ----------------------------------------------------------------------


def test_witnesses_of_those_who_left_count_no_more(tmp_path):
    """Of four, two fall silent for good: once the admins said so, the other two are enough."""
    world = World().begin().round()
    half, end = 12, len(world.entries)
    members: list = [None]
    store = LogStore(tmp_path / "log.sqlite")
    reader = verifier(store)
    reader.members = lambda: members[0]
    assert reader.take(0, world.entries[:half], witnessed(world, half, *NODES[:3]))
    assert reader.demanded() == 3
    two = witnessed(world, end, *NODES[:2])
    with pytest.raises(IntegrityError):
        reader.take(half, world.entries[half:], two)
    members[0] = frozenset(NODES[:2])
    assert reader.demanded() == 2
    assert reader.take(half, world.entries[half:], two)


def test_a_witness_that_no_membership_knows_does_not_count(tmp_path):
    """A coordinator certifies four strangers of its own: their cosignatures make no quorum."""
    strangers = [f"xx-made-up-{number}" for number in range(4)]
    world = World().begin()
    for name in strangers:
        world.enrol(name)
    size = len(world.entries)
    store = LogStore(tmp_path / "log.sqlite")
    reader = verifier(store)
    reader.members = lambda: frozenset(NODES)
    with pytest.raises(IntegrityError):
        reader.take(0, world.entries, witnessed(world, size, *strangers, NODES[0], NODES[1]))
    reader.members = lambda: None  # the oracle: without a membership they are taken
    assert reader.take(0, world.entries, witnessed(world, size, *strangers, *NODES[:2]))


def test_a_list_that_leaves_nobody_makes_no_log_without_witnesses():
    keys = World().begin().replay().witnesses
    assert counted(keys, frozenset({"nobody"})) == dict(keys)
    assert counted(keys, None) == dict(keys)
    assert set(counted(keys, frozenset({NODES[1], "nobody"}))) == {NODES[1]}


# -- alarms ----------------------------------------------------------------------------------------


def site(tmp_path, monkeypatch):
    """A node's folder whose log was caught lying."""
    folder = node_folder(tmp_path)
    folder.make()
    folder.config.write_text(
        render_config(
            institution=NodeId(NODES[0]),
            federation=FederationId("andes"),
            coordinator="c.example:443",
            enrolment="c.example:444",
            data=DataConfig(train=("/x",)),
            worker=WorkerConfig(),
        )
    )
    folder.keys.mkdir(exist_ok=True)
    paths = LogPaths(folder.root)
    paths.vkey.write_text(log_signer().verifier.to_text() + "\n")
    monkeypatch.setattr(KeyStore, "signing_key", lambda self: key(NODES[0]))
    store = LogStore(paths.store)
    world = World().begin()
    size = len(world.entries)
    assert verifier(store).take(0, world.entries, witnessed(world, size, *NODES))
    store.raise_alarm("log.split", "two trees", b"evidence", NOW)
    store.raise_alarm("log.certificate", "not asked for", b"other", NOW)
    store.close()
    return folder, paths


def test_an_alarm_is_cleared_by_a_person_and_in_public(tmp_path, monkeypatch):
    folder, paths = site(tmp_path, monkeypatch)
    assert [line["code"] for line in alarm_facts(folder.root)] == [None, None]
    for code, by in (("Not a code", "ana"), ("restored-backup", "")):
        with pytest.raises(MalformedMessageError):
            clear_alarms(folder.root, code=code, by=by)
    facts = clear_alarms(folder.root, code="restored-backup", by="ana")
    assert {(line["code"], line["by"]) for line in facts} == {("restored-backup", "ana")}

    store = LogStore(paths.store)
    assert store.alarm() is None
    assert verifier(store).known().alarm is None
    # The node says it in the log: one leaf for each, with the digest of its evidence.
    leaves = store.untaken(10)
    said = [peek(leaf.entry)[1] for leaf in leaves]
    assert [(item.klass, item.code) for item in said] == [("node.alarm", "restored-backup")] * 2
    assert [item.evidence_sha256 for item in said] == [
        sha256_hex(b"evidence"),
        sha256_hex(b"other"),
    ]
    assert [leaf.seq for leaf in leaves] == [1, 2]
    # What is found later is an alarm again.
    store.raise_alarm("log.split", "again", b"more", NOW)
    assert store.alarm() == ("log.split", "again")
    store.close()
    clear_alarms(folder.root, code="drill", by="bruno")
    with pytest.raises(NotFoundError):
        clear_alarms(folder.root, code="drill", by="bruno")
