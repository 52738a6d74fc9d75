"""Verifying a log of 33 institutions from its files, beside the bare signatures and hashes.

What is timed is `minga audit verify` without printing: reading, the tree and its checkpoints, every
leaf in turn, every question. The floor is what no verifier can do without: one Ed25519 verification
and one leaf hash for each leaf. One process, one thread.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from infra.audit.loading import Loaded, Places, load
from infra.audit.proving import make_proof
from policies.audit.replay import policy_text
from protocols.canonical import canonical_bytes, parse_json, sha256_hex
from protocols.identifiers import RoundId, RunId
from protocols.plan import Plan
from protocols.tlog import kinds
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.leaf import PAYLOAD_TYPE, pae
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.note import Note
from protocols.tlog.proofs import root_of, stored
from protocols.tlog.text import decode_base64
from tests.bench.rows import OURS, Row, Spread
from tests.support.audit_run import write_log
from tests.support.leaves import FEDERATION, ORIGIN, TIME, World, log_signer, witness_signer
from tests.support.plans import plan_value

NODES = tuple(f"inst-{n:02d}" for n in range(33))
NOW = int((TIME + timedelta(days=1)).timestamp())


class LargeWorld(World):
    """Rounds of 33 nodes under a real plan, each from the model before."""

    def __init__(self) -> None:
        super().__init__(nodes=NODES, secure=False)
        value = plan_value(
            federation=FEDERATION,
            roster=list(NODES),
            rounds=1000,
            model={"family": "vector", "manifest": "1" * 64, "initial": self.model(0)},
        )
        self.real = Plan.from_value(value)
        self.bytes = self.real.to_bytes()

    @property
    def plan_sha256(self) -> str:
        return sha256_hex(self.bytes)

    def model(self, number: int) -> str:
        """The model that a round starts from."""
        return hashlib.sha256(f"model {number}".encode()).hexdigest()

    def whole_round(self, number: int) -> None:
        """104 leaves: everybody joins, commits and confirms."""
        about = {
            "subject": kinds.round_subject(FEDERATION, RoundId(RunId("r1"), number)),
            "digest": self.plan_sha256,
        }
        plan = self.plan(
            number,
            plan=parse_json(self.bytes),
            plan_digest=self.real.digest,
            model_in=self.model(number),
            request=self.request(model_root=self.model(0)),
        )
        self.say("coordinator", plan, **about)
        for node in NODES:
            self.say(node, self.join(node, model_in=self.model(number)), **about)
        self.say("coordinator", self.start(*NODES), **about)
        at = {}
        for node in NODES:
            at[node] = len(self.entries)
            self.say(node, self.commit(node), **about)
        listed = self.survivors(at)
        self.say("coordinator", listed, **about)
        out = self.model(number + 1)
        self.say("coordinator", self.aggregate(listed, model_out=out), **about)
        for node in NODES:
            confirm = kinds.RoundConfirm(
                attempt=1, node=node, model_out=out, commit=self.hashes[at[node]]
            )
            self.say(node, confirm, **about)
        closed = kinds.RoundClosed(attempt=1, confirmations=NODES, objections=())
        self.say("coordinator", closed, **about)


def write(folder: Path, rounds: int) -> Path:
    """A log of so many rounds, cosigned by all 33."""
    world = LargeWorld()
    world.begin()
    for number in range(rounds):
        world.whole_round(number)
    log = folder / "log"
    write_log(log, world.entries)
    size = len(world.entries)
    root = root_of(stored([leaf_hash(entry) for entry in world.entries]), size)
    signed = sign_checkpoint(Checkpoint(origin=ORIGIN, size=size, root=root), log_signer())
    lines = tuple(cosign(signed.text, signer=witness_signer(node), time=NOW - 60) for node in NODES)
    note = Note(text=signed.text, signatures=(*signed.signatures, *lines))
    (log / "checkpoint").write_bytes(note.to_bytes())
    witnesses = {node: witness_signer(node).verifier for node in NODES}
    policy = policy_text(log_signer().verifier, witnesses)
    (log / "trust-policy.txt").write_bytes(policy)
    return log


def bare(entries: list[bytes], keys: dict[str, bytes]) -> Callable[[], None]:
    """One verification and one hash for each leaf; everything else was made ready before."""
    ready = []
    for entry in entries:
        envelope = parse_json(entry)
        (signature,) = envelope["signatures"]
        payload = decode_base64(envelope["payload"], "payload")
        key = Ed25519PublicKey.from_public_bytes(keys[signature["keyid"]])
        ready.append((entry, key, decode_base64(signature["sig"], "sig"), payload))

    def work() -> None:
        for entry, key, signature, payload in ready:
            leaf_hash(entry)
            key.verify(signature, pae(PAYLOAD_TYPE, payload))

    return work


def rows(*, rounds: int, repetitions: int) -> Iterator[Row]:
    """Ours and the floor, in turns, and the size of a proof."""
    with tempfile.TemporaryDirectory() as name:
        log = write(Path(name), rounds)
        loaded = _load(log)
        found = loaded.audit
        if found.first is not None or len(found.evidence.taken) != found.evidence.tree.size:
            raise AssertionError(f"the log of the benchmark does not hold: {found.first}")
        leaves = found.evidence.tree.size
        keys = {key: holder.public_key for key, holder in found.evidence.replay.holders.items()}
        floor_work = bare(list(loaded.files.entries), keys)
        ours, floor = [], []
        for _ in range(repetitions):
            floor.append(_timed(floor_work))
            ours.append(_timed(lambda: _load(log)))
        proof = len(make_proof(loaded, leaves // 2))
        bundle = len(canonical_bytes(parse_json(loaded.files.entries[leaves // 2])))
    what = f"audit of a log, {leaves} leaves, {len(NODES)} institutions, 1 thread"
    yield Row(
        what=what,
        system="floor: Ed25519 verify + leaf hash",
        seconds_per_round=Spread.of(floor),
        leaves_per_s=leaves / min(floor),
    )
    yield Row(
        what=what,
        system=f"{OURS}, minga audit verify",
        seconds_per_round=Spread.of(ours),
        leaves_per_s=leaves / min(ours),
        note=f"a leaf of {bundle} bytes has a proof file of {proof} bytes, of which the checkpoint"
        f" and its {len(NODES)} cosignatures are most",
    )


def _load(log: Path) -> Loaded:
    return load(Places(log=log), now=NOW)


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
