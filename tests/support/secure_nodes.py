"""Nodes of a secure round that speak the real protocol over gRPC, without the rest of an agent.

Each is a thin loop around the pure state machine of ``protocols.secagg.node``: it makes the durable
state, sends, and waits. Tests take it step by step, and attackers override single steps.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import numpy as np

from coordinator.drivers.rounds import RoundDriver
from coordinator.secure_sum import Sum
from protocols.gen import bulk_pb2, rounds_pb2, secure_sum_pb2, secure_sum_pb2_grpc
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.secagg import node as machine
from protocols.secagg.attempts import NO_CHECKPOINT, attempt_of
from protocols.secagg.codec import from_bytes
from protocols.secagg.messages import CommitCertificate, DealBundle, Delivery, Go, Start, Survivors
from protocols.tensors.encode import encode_vector
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.ring import Ring
from protocols.tensors.scales import initial_scales
from protocols.tensors.units import UnitHasher
from protocols.upload import UploadHeader, sign_header
from protocols.wire import round_ref
from tests.support.door import Client, Door

KINDS = {
    "Ready": "ready",
    "DealOk": "deal_ok",
    "Complaint": "complaint",
    "Upload": "upload",
    "Commit": "commit",
    "Abort": "abort",
    "Reveal": "reveal",
}
LISTS = {
    "start": Start,
    "delivery": Delivery,
    "go": Go,
    "survivors": Survivors,
    "commits": CommitCertificate,
}


def secure_changes(door: Door, names: list[str], **changes: Any) -> dict[str, Any]:
    """What makes a plan of the tests a secure one over these nodes."""
    n = len(names)
    keys = {name: door.signing_key(name).public_key().public_bytes_raw().hex() for name in names}
    threshold = changes.pop("threshold", max(-(-2 * n // 3), n // 2 + 1 + n % 2))
    colluders = changes.pop("colluders", min(2 * threshold - n - 1, threshold - 2))
    return {
        "mode": "aggregate-only",
        "roster": names,
        "min_participants": changes.pop("min_participants", max(3, threshold)),
        "secagg": {
            "threshold": threshold,
            "colluders": colluders,
            "min_surviving": changes.pop("min_surviving", threshold),
            "keys": keys,
        },
        **changes,
    }


class SecureNode:
    """One honest node of one round."""

    def __init__(self, door: Door, name: str, plan: Plan, round_: RoundId, client: Client) -> None:
        self.name = NodeId(name)
        self.plan = plan
        self.round = round_
        self.client = client
        self.key = door.signing_key(name)
        self.model = door.snapshots[plan.run].model_root
        coordinates = door.coordinates[plan.run]
        self.manifest = Manifest((TensorSpec("vector", (coordinates,)),))
        self.ring: Ring = round_ring(plan)
        self.layout = round_layout(plan, 0, self.manifest)
        self.scales = initial_scales(self.manifest, plan.vector.scale, self.ring, len(plan.roster))
        self.stub = secure_sum_pb2_grpc.SecureSumStub(client.channel)
        self.state: Any = None
        self.number = 1
        self.vector = b""
        self.delta = np.full(coordinates, 2.0**-6 * (1 + plan.roster.index(name)), np.float32)
        self.dither = hashlib.sha256(name.encode()).digest()

    # -- the wire ----------------------------------------------------------------------------

    def post(self, kind: str, body: bytes) -> rounds_pb2.RoundReply:
        """Hand a message in."""
        request = secure_sum_pb2.PostRequest(round=round_ref(self.round), kind=kind, body=body)
        return self.stub.Post(request, timeout=20)

    def get(self, kind: str) -> Any:
        """Ask for a list."""
        request = secure_sum_pb2.GetRequest(
            round=round_ref(self.round), attempt=self.number, kind=kind
        )
        return from_bytes(LISTS[kind], self.stub.Get(request, timeout=20).body)

    def send(self, move: machine.Move) -> None:
        """Make the state durable (here: keep it), then send."""
        self.state = move.state
        for message in move.send:
            if isinstance(message, DealBundle):
                self.post("deal", message.to_bytes())
            else:
                self.post(KINDS[type(message.body).__name__], message.to_bytes())

    # -- the steps ---------------------------------------------------------------------------

    def join(self) -> None:
        """Take part in the round."""
        self.client.rounds.Join(
            rounds_pb2.JoinRequest(
                round=round_ref(self.round), plan_digest=self.plan.digest, model_root=self.model
            ),
            timeout=20,
        )

    def attempt(self) -> Any:
        """The attempt as this node derives it."""
        return attempt_of(self.plan, self.round, self.number, self.model)

    def seed(self) -> bytes:
        """Fresh for every attempt; here reproducible."""
        return hashlib.sha256(f"{self.name}/{self.round}/{self.number}".encode()).digest()

    def ready(self) -> None:
        """READY of the current attempt."""
        self.send(
            machine.ready(
                self.state,
                self.attempt(),
                self.name,
                self.key,
                seed=self.seed(),
                seen_size=0,
                seen_root=Digest("0" * 64),
            )
        )

    def deal(self) -> None:
        """DEAL, after START."""
        self.send(machine.deal(self.state, self.get("start"), self.key))

    def acknowledge(self) -> None:
        """DEAL_OK or a complaint, after the delivery."""
        delivery = self.get("delivery")
        self.send(machine.acknowledge(self.state, delivery, self.key, checkpoint=NO_CHECKPOINT))

    def encode(self) -> bytes:
        """The masked vector, packed."""
        parts: list[bytes] = []
        encode_vector(
            self.delta,
            self.layout,
            self.scales,
            weight_units=65_536,
            clip_factor=1.0,
            metrics=self.metrics(),
            seed=self.dither,
            ring=self.ring,
            limit=self.ring.clamp_limit(len(self.plan.roster)),
            sink=parts.append,
            mask_adder=self.masks(),
        )
        return b"".join(parts)

    def masks(self) -> Any:
        """What is added to every chunk."""
        return machine.mask_adder(self.state, self.ring)

    def metrics(self) -> dict[str, int]:
        """Metrics of this node."""
        values = dict.fromkeys(self.layout.metrics, 0)
        return values | {"weight": 65_536, "nodes": 1, "steps": 1}

    def mask(self) -> None:
        """GO, then mask and fix the vector."""
        self.state = machine.go(self.state, self.get("go")).state
        self.vector = self.encode()
        hasher = UnitHasher()
        hasher.update(self.vector)
        self.send(
            machine.upload(
                self.state, self.key, upload_root=hasher.digest(), length=len(self.vector)
            )
        )

    def header(self) -> tuple[UploadHeader, tuple[bytes, ...]]:
        """The transport header of the vector."""
        hasher = UnitHasher()
        hasher.update(self.vector)
        header = UploadHeader(
            federation=self.plan.federation_id,
            run=self.plan.run_id,
            round=self.round.number,
            attempt=self.number,
            node=self.name,
            plan=self.plan.digest,
            model=self.model,
            coordinates=self.layout.coordinates,
            ring=self.ring.bits,
            size=len(self.vector),
            root=hasher.digest(),
        )
        return header, hasher.hashes()

    def begin_upload(self) -> bulk_pb2.UploadState:
        """Announce the vector."""
        header, hashes = self.header()
        request = bulk_pb2.BeginUploadRequest(
            header=header.to_bytes(),
            signature=sign_header(self.key, header),
            unit_hashes=hashes,
        )
        return self.client.bulk.BeginUpload(request, timeout=20)

    def upload(self) -> None:
        """Send the vector and hand it in."""
        state = self.begin_upload()
        size = 2**20
        self.client.append(
            state.upload_id,
            state.durable,
            [self.vector[i : i + size] for i in range(state.durable, len(self.vector), size)],
        )
        request = bulk_pb2.FinishUploadRequest(upload_id=state.upload_id)
        self.client.bulk.FinishUpload(request, timeout=20)

    def commit(self) -> None:
        """COMMIT to the survivor list."""
        self.send(machine.commit(self.state, self.get("survivors"), self.key))

    def abort(self, reason: str = "test.abort") -> None:
        """ABORT the attempt."""
        self.send(machine.abort(self.state, reason, self.key))

    def reveal(self) -> None:
        """Shares, after the commits."""
        self.send(machine.reveal(self.state, self.get("commits"), self.key))

    def next_attempt(self) -> None:
        """Give the attempt up and join the next."""
        self.abort("secagg.restart")
        self.number += 1
        self.ready()


STEPS = ("join", "ready", "deal", "acknowledge", "mask", "upload", "commit", "reveal")


class SecureRound:
    """A secure round on a served coordinator, with its nodes."""

    def __init__(
        self,
        door: Door,
        n: int = 5,
        coordinates: int = 3000,
        run: str = "s1",
        node_type: Callable[..., SecureNode] = SecureNode,
        **changes: Any,
    ) -> None:
        names = [f"n{i:02d}" for i in range(n)]
        self.door = door
        clients = {name: door.enrol(name) for name in names}
        terms = secure_changes(door, names, **changes)
        self.plan = door.make_run(run, coordinates, **terms)
        self.driver = RoundDriver(
            ledger=door.parts.ledger,
            clock=door.parts.clock,
            blobs=door.parts.blobs,
            layouts=door.parts.layouts,
            spool=door.config.spool,
        )
        self.round = RoundId(self.plan.run_id, 0)
        self.drive()
        self.nodes = {
            name: node_type(door, name, self.plan, self.round, clients[name]) for name in names
        }

    def drive(self) -> None:
        """One pass of the driver, and the end of what it began."""

        async def once() -> None:
            await self.driver.pass_once()
            await self.driver.settle()

        self.door.call(once())

    @property
    def row(self) -> Any:
        """The round in the ledger."""
        return self.door.ledger(lambda tx: tx.round(self.round))

    @property
    def phase(self) -> Any:
        """The phase in the ledger."""
        return self.row.phase

    def all(self, *steps: str, but: tuple[str, ...] = ()) -> None:
        """Let every node do these steps, one step at a time."""
        for step in steps:
            for name, node in self.nodes.items():
                if name not in but:
                    getattr(node, step)()

    def expire(self) -> None:
        """Let the phase's deadline pass, and the driver see it."""
        from dataclasses import replace

        from protocols.rounds import deadline

        def shorten(tx: Any) -> None:
            row = tx.lock_round(self.round)
            past = self.door.parts.clock.now() - timedelta(seconds=1)
            if deadline(row.phase) is not None:
                tx.set_phase(self.round, replace(row.phase, closes_at=past), "test", now=past)

        self.door.ledger(shorten)
        self.drive()

    def until_open(self, tries: int = 50) -> Any:
        """Drive until the sum is open; the round's row."""
        for _ in range(tries):
            self.drive()
            if getattr(self.phase, "opened", None) is not None:
                break
            time.sleep(0.02)
        return self.row

    def plain_sum(self, names: list[str]) -> bytes:
        """What the packed sum of exactly these nodes must be, from their unmasked vectors."""
        from protocols.tensors.planar import accumulate

        vectors = []
        for name in names:
            node = self.nodes[name]
            parts: list[bytes] = []
            encode_vector(
                node.delta,
                node.layout,
                node.scales,
                weight_units=65_536,
                clip_factor=1.0,
                metrics=node.metrics(),
                seed=node.dither,
                ring=node.ring,
                limit=node.ring.clamp_limit(len(node.plan.roster)),
                sink=parts.append,
            )
            vectors.append(b"".join(parts))
        readers = [lambda o, length, v=v: v[o : o + length] for v in vectors]
        first = next(iter(self.nodes.values()))
        return b"".join(accumulate(readers, first.layout, first.ring))

    def opened_sum(self) -> bytes:
        """The published sum."""
        blobs = self.door.parts.blobs
        return blobs.open(self.phase.opened.sum).path.read_bytes()

    def summed(self, number: int = 1) -> Any:
        """The coordinator's own view of the messages; for hostile coordinators."""
        return lambda tx: Sum.of(tx, tx.round(self.round), self.plan, number)


__all__ = ["STEPS", "SecureNode", "SecureRound", "grpc"]
