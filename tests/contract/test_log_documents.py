"""A plan that is too large for its leaf lies beside the log before the leaf is shown; readers far
away find it. And a leaf's proof, asked for over gRPC, verifies with nothing but the log's key."""

from __future__ import annotations

import asyncio
import hashlib
import time

import grpc
import pytest

from coordinator.clock import SystemClock
from coordinator.leaves import MAX_INLINE
from coordinator.ledger import Ledger, Sequencer, model_root_of
from coordinator.log_files import LogFiles, Ratchet
from coordinator.log_hub import LogHub
from coordinator.log_writer import LogWriter
from coordinator.rounds import OpenRound, open_next
from coordinator.static_http import StaticServer
from infra.audit.folder import read_log as read_folder
from infra.audit.folder import read_trust_policy
from infra.audit.loading import DocumentFolder
from policies.audit.replay import witness_policy
from policies.audit.verify import audit
from protocols.canonical import sha256_hex
from protocols.crypto.signatures import BadSignatureError
from protocols.gen import log_pb2, log_pb2_grpc
from protocols.identifiers import Digest
from protocols.tlog.kinds import Heartbeat
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.proof_file import verify_proof_file
from protocols.tlog.proofs import BadProofError
from tests.support.audit_disk import minga
from tests.support.door import served
from tests.support.leaves import FEDERATION, ORIGIN, World, key, log_signer
from tests.support.ledgers import START, enrol, make_plan, snapshot_bytes
from tests.support.log_dir import read_log

MEMBERS = tuple(f"{place:02}-instituto-de-lenguas-y-datos-de-los-andes" for place in range(33))


def large_plan():
    """33 nodes with their keys, and the tensors that are trained by name."""
    keys = {name: hashlib.sha256(name.encode()).hexdigest() for name in MEMBERS}
    plan = make_plan(
        roster=MEMBERS,
        min_participants=25,
        federation=FEDERATION,
        mode="aggregate-only",
        trainable=[f"model.layers.{n}.self_attn.q_proj.lora_A.weight" for n in range(128)],
        secagg={"threshold": 25, "colluders": 8, "min_surviving": 25, "keys": keys},
    )
    assert len(plan.to_bytes()) > MAX_INLINE
    return plan


async def write_plan(folder):
    """A log whose last leaf opens a round under the large plan; published."""
    plan, snapshot = large_plan(), snapshot_bytes()
    world = World(witnesses=False).begin()
    request = world.request(
        run=plan.run,
        plan_sha256=sha256_hex(plan.to_bytes()),
        model_root=model_root_of(snapshot),
    )
    hub = LogHub(log_signer().verifier)
    order = Sequencer(key=key("coordinator"), origin=ORIGIN, seen=hub.seen)
    files = LogFiles(folder / "log")
    url = f"sqlite:///{folder}/ledger.sqlite"
    async with Ledger(url, clock=SystemClock(), sequencer=order) as ledger:

        def begin(tx):
            for entry in world.entries:
                tx.append_leaf(entry)
            enrol(tx, plan.roster)
            body = request.model_dump_json().encode()
            tx.add_run(plan, snapshot, START, request=body)
            decision = OpenRound(number=0, index=0, start_snapshot=snapshot, why="the first")
            open_next(tx, plan, decision, START)

        await ledger.run("begin", begin)
        writer = LogWriter(
            ledger=ledger,
            clock=SystemClock(),
            hub=hub,
            files=files,
            ratchet=Ratchet(folder / "ratchet"),
            signer=log_signer(),
        )
        task = asyncio.create_task(writer.run())
        while not task.done():
            head = files.published()
            if head is not None and head.size == len(world.entries) + 1:
                break
            await asyncio.sleep(0.01)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended
    return plan


def plans_of(log):
    """What an auditor knows of the plans of a log."""
    policy = read_trust_policy(log / "trust-policy.txt")
    documents = DocumentFolder(log, None).get
    now = int(SystemClock().now().timestamp())
    found = audit(read_folder(log), policy, now=now, anchored=False, documents=documents)
    assert found.first is None, found.first
    return found.evidence.plans


def test_a_large_plan_lies_beside_the_log_and_is_mirrored(tmp_path):
    plan = asyncio.run(write_plan(tmp_path))
    log, name = tmp_path / "log", Digest(sha256_hex(plan.to_bytes()))
    (leaf,) = read_log(log).replay().rounds.values()
    assert leaf.plan.plan is None
    assert leaf.plan_sha256 == name
    assert (log / "blobs/sha256" / name).read_bytes() == plan.to_bytes()
    assert plans_of(log) == {name: plan}

    server = StaticServer("127.0.0.1:0", {"log": log})
    server.start()
    try:
        mine, url = tmp_path / "mine", f"http://127.0.0.1:{server.port}/log"
        done = minga("audit", "mirror", url, mine, "--blobs")
    finally:
        server.stop()
    assert done.status == 0, done.error
    assert plans_of(mine) == {name: plan}
    (mine / "blobs/sha256" / name).write_bytes(plan.to_bytes().replace(b"25", b"24", 1))
    assert plans_of(mine) == {}  # another plan is none


def beat(tx):
    """Another leaf, so that a proof has hashes."""
    said = Heartbeat(interval_s=3600)
    tx.append_own(said, subject="log/heartbeat", digest=Digest("0" * 64))


def prove(door, stub, name):
    """Ask until the leaf is under a witnessed head."""
    for _ in range(200):
        try:
            return stub.Prove(log_pb2.ProveRequest(leaf_hash=name), timeout=20)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise
            time.sleep(0.02)
    raise AssertionError("not proved in time")


def test_a_proof_over_grpc_verifies_with_the_key_alone(tmp_path):
    with served(tmp_path, log=True) as door:
        stub = log_pb2_grpc.LogStub(door.operator().channel)
        for _ in range(4):
            door.ledger(beat)
        entries = [row.entry for row in door.ledger(lambda tx: tx.leaves(0, 5))]
        said = prove(door, stub, leaf_hash(entries[3]))
        with pytest.raises(grpc.RpcError) as refused:
            prove(door, stub, b"\0" * 32)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        policy = witness_policy(door.parts.log.signer.verifier, {})
    now = int(time.time())
    assert said.entry == entries[3]
    index, accepted = verify_proof_file(said.proof, said.entry, policy, now=now)
    assert index == 3
    assert accepted.opened.checkpoint.size > 3
    with pytest.raises(BadProofError):
        verify_proof_file(said.proof, entries[2], policy, now=now)
    stranger = witness_policy(log_signer().verifier, {})
    with pytest.raises(BadSignatureError):
        verify_proof_file(said.proof, said.entry, stranger, now=now)
