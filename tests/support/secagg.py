"""A secure sum in memory: members, a coordinator that can be told to misbehave, and their vectors.

Everything that crosses between the two sides goes through bytes, and every state a node reaches is
written and read back before its message is handed over, as a real node does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.crypto.signatures import public_bytes
from protocols.identifiers import Digest, FederationId, NodeId, RoundId
from protocols.secagg import coordinator as hub
from protocols.secagg import node as side
from protocols.secagg.checks import (
    Agreed,
    Listed,
    Started,
    check_abort,
    check_bundle,
    check_commit,
    check_deal_ok,
    check_header,
    check_ready,
    check_reveal,
    check_start,
    check_survivors,
)
from protocols.secagg.context import Attempt, Member, Roster
from protocols.secagg.messages import (
    Abort,
    AbortCertificate,
    Commit,
    CommitCertificate,
    DealBundle,
    DealOk,
    Delivery,
    Go,
    Ready,
    Reveal,
    Signed,
    Start,
    Survivors,
    Transcript,
    Upload,
    signed_from_bytes,
)
from protocols.secagg.states import NodeState, state_from_bytes
from protocols.secagg.threshold import SecaggTerms
from protocols.tensors.planar import PlanarSum, pack, unpack
from protocols.tensors.ring import Ring, packed_offset
from protocols.tensors.sizes import CHUNK
from protocols.tensors.units import blob_digest

FEDERATION = FederationId("andes")
CHECKPOINT = b"log.minga.example/rounds/2026\n17\n" + b"A" * 43 + b"=\n"
MODEL = Digest(hashlib.sha256(b"model").hexdigest())
PLAN = Digest(hashlib.sha256(b"plan").hexdigest())
SEEN = Digest(hashlib.sha256(b"seen").hexdigest())


def seed_of(*parts: object) -> bytes:
    """32 bytes that depend on ``parts``: what a real node draws from its operating system."""
    return hashlib.sha256(repr(parts).encode()).digest()


def node_name(index: int) -> NodeId:
    return NodeId(f"inst-{index:02d}")


def identity(index: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed_of("identity", index))


def make_roster(n: int) -> Roster:
    return Roster(
        tuple(Member(node=node_name(i), key=public_bytes(identity(i))) for i in range(1, n + 1))
    )


def make_attempt(
    n: int,
    *,
    number: int = 1,
    round_: int = 4,
    model: Digest = MODEL,
    terms: SecaggTerms | None = None,
    roster: Roster | None = None,
) -> Attempt:
    return Attempt(
        federation=FEDERATION,
        round=RoundId.parse(f"run-1/{round_}"),
        number=number,
        roster=roster or make_roster(n),
        terms=terms or SecaggTerms.for_roster(n),
        model_root=model,
        plan_digest=PLAN,
    )


@dataclass
class Site:
    """One node: its identity key, its durable record, its vector."""

    index: int
    vector: np.ndarray  # int32 [d]
    ring: Ring
    record: bytes | None = None
    spool: bytes = b""
    sent: list[bytes] = field(default_factory=list)

    @property
    def node(self) -> NodeId:
        return node_name(self.index)

    @property
    def key(self) -> Ed25519PrivateKey:
        return identity(self.index)

    @property
    def state(self) -> NodeState | None:
        return None if self.record is None else state_from_bytes(self.record)

    def do(self, move: side.Move) -> list[bytes]:
        """Persist, then send; what was sent must be sent again, the same, after a restart."""
        self.record = move.state.to_bytes()
        assert state_from_bytes(self.record) == move.state
        out = [message.to_bytes() for message in move.send]
        self.sent.extend(out)
        return out

    def ready(self, attempt: Attempt, certificate: AbortCertificate | None = None) -> list[bytes]:
        return self.do(
            side.ready(
                self.state,
                attempt,
                self.node,
                self.key,
                seed=seed_of("attempt", self.index, str(attempt)),
                seen_size=9,
                seen_root=SEEN,
                certificate=certificate,
            )
        )

    def deal(self, start: bytes) -> list[bytes]:
        return self.do(side.deal(self.state, Start.from_bytes(start), self.key))

    def acknowledge(self, delivery: bytes) -> list[bytes]:
        return self.do(
            side.acknowledge(
                self.state, Delivery.from_bytes(delivery), self.key, checkpoint=CHECKPOINT
            )
        )

    def go(self, message: bytes) -> list[bytes]:
        return self.do(side.go(self.state, Go.from_bytes(message)))

    def mask(self) -> bytes:
        """The packed masked vector."""
        adder = side.mask_adder(self.state, self.ring)
        out = b""
        for chunk, start in enumerate(range(0, self.vector.size, CHUNK)):
            lanes = self.vector[start : start + CHUNK].copy().view(np.uint32)
            adder(chunk, start, lanes)
            out += pack(lanes, self.ring)
        return out

    def upload(self) -> list[bytes]:
        self.spool = self.mask()
        return self.do(
            side.upload(
                self.state,
                self.key,
                upload_root=blob_digest(self.spool),
                length=len(self.spool),
            )
        )

    def commit(self, survivors: bytes) -> list[bytes]:
        return self.do(side.commit(self.state, Survivors.from_bytes(survivors), self.key))

    def abort(self, reason: str = "test.abort") -> list[bytes]:
        return self.do(side.abort(self.state, reason, self.key))

    def reveal(self, certificate: bytes) -> list[bytes]:
        return self.do(side.reveal(self.state, CommitCertificate.from_bytes(certificate), self.key))


@dataclass
class World:
    """An honest coordinator's view, phase by phase; tests reach in to change what is relayed."""

    attempt: Attempt
    members: dict[NodeId, Site]
    ring: Ring
    start: Start | None = None
    started: Started | None = None
    bundles: dict[NodeId, DealBundle] = field(default_factory=dict)
    agreed: Agreed | None = None
    deliveries: dict[NodeId, Delivery] = field(default_factory=dict)
    oks: dict[NodeId, Signed[DealOk]] = field(default_factory=dict)
    headers: dict[NodeId, Signed[Upload]] = field(default_factory=dict)
    spools: dict[NodeId, bytes] = field(default_factory=dict)
    survivors: Survivors | None = None
    listed: Listed | None = None
    commits: dict[NodeId, Signed[Commit]] = field(default_factory=dict)
    aborts: dict[NodeId, Signed[Abort]] = field(default_factory=dict)
    certificate: CommitCertificate | None = None
    reveals: dict[NodeId, Signed[Reveal]] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        n: int,
        *,
        d: int = 64,
        bits: int = 20,
        attempt: Attempt | None = None,
        vectors: Callable[[int], np.ndarray] | None = None,
    ) -> World:
        ring = Ring(bits)
        rng = np.random.default_rng([n, d, bits])
        limit = ring.clamp_limit(n)
        make = vectors or (lambda _: rng.integers(-limit, limit + 1, d, dtype=np.int32))
        members = {node_name(i): Site(index=i, vector=make(i), ring=ring) for i in range(1, n + 1)}
        return cls(attempt=attempt or make_attempt(n), members=members, ring=ring)

    # -- one phase each ------------------------------------------------------------------------

    def do_ready(
        self, nodes: Collection[NodeId], certificate: AbortCertificate | None = None
    ) -> None:
        readys = {}
        for node in nodes:
            (data,) = self.members[node].ready(self.attempt, certificate)
            signed = signed_from_bytes(Ready, data)
            check_ready(signed, self.attempt)
            readys[node] = signed
        self.start = hub.make_start(readys)
        self.started = check_start(self.start, self.attempt)

    def do_deal(self, nodes: Collection[NodeId] | None = None) -> None:
        for node in self.start.nodes if nodes is None else nodes:
            (data,) = self.members[node].deal(self.start.to_bytes())
            bundle = DealBundle.from_bytes(data)
            check_bundle(bundle, self.started)
            self.bundles[node] = bundle

    def do_deliver(self) -> None:
        self.agreed, self.deliveries = hub.make_deliveries(self.bundles, self.started, CHECKPOINT)

    def do_acknowledge(self) -> None:
        for node, delivery in self.deliveries.items():
            (data,) = self.members[node].acknowledge(delivery.to_bytes())
            signed = signed_from_bytes(DealOk, data)
            check_deal_ok(signed, self.agreed)
            self.oks[node] = signed

    def do_go(self) -> None:
        go = hub.make_go(self.oks).to_bytes()
        for node in self.oks:
            assert self.members[node].go(go) == []

    def do_upload(self, nodes: Collection[NodeId] | None = None) -> None:
        for node in self.oks if nodes is None else nodes:
            (data,) = self.members[node].upload()
            signed = signed_from_bytes(Upload, data)
            check_header(signed, self.agreed)
            self.headers[node] = signed
            self.spools[node] = self.members[node].spool

    def do_survivors(self) -> None:
        self.survivors = hub.make_survivors(self.headers)
        self.listed = check_survivors(self.survivors, self.agreed)

    def do_commit(self, nodes: Collection[NodeId] | None = None) -> None:
        for node in self.headers if nodes is None else nodes:
            (data,) = self.members[node].commit(self.survivors.to_bytes())
            signed = signed_from_bytes(Commit, data)
            check_commit(signed, self.listed)
            self.commits[node] = signed

    def do_abort(self, nodes: Collection[NodeId]) -> None:
        for node in nodes:
            *_, data = self.members[node].abort()
            signed = signed_from_bytes(Abort, data)
            check_abort(signed, self.attempt)
            self.aborts[node] = signed

    def do_reveal(self, nodes: Collection[NodeId] | None = None) -> None:
        self.certificate = hub.make_commit_certificate(self.commits, self.listed)
        for node in self.commits if nodes is None else nodes:
            (data,) = self.members[node].reveal(self.certificate.to_bytes())
            signed = signed_from_bytes(Reveal, data)
            check_reveal(signed, self.listed)
            self.reveals[node] = signed

    def do_open(self) -> Transcript:
        found = hub.reconstruct((signed.body for signed in self.reveals.values()), self.listed)
        return Transcript.from_bytes(
            hub.make_transcript(
                start=self.start,
                bundles=self.bundles,
                checkpoint=CHECKPOINT,
                go=hub.make_go(self.oks),
                survivors=self.survivors,
                certificate=self.certificate,
                reveals=self.reveals,
                opened=found.opened,
            ).to_bytes()
        )

    # -- several phases ------------------------------------------------------------------------

    def up_to_go(self, nodes: Collection[NodeId] | None = None) -> World:
        self.do_ready(self.members if nodes is None else nodes)
        self.do_deal()
        self.do_deliver()
        self.do_acknowledge()
        self.do_go()
        return self

    def up_to_survivors(self, lost: Collection[NodeId] = ()) -> World:
        self.up_to_go()
        self.do_upload([node for node in self.oks if node not in lost])
        self.do_survivors()
        return self

    def up_to_open(self, lost: Collection[NodeId] = ()) -> Transcript:
        self.up_to_survivors(lost)
        self.do_commit()
        self.do_reveal()
        return self.do_open()

    # -- sums ----------------------------------------------------------------------------------

    @property
    def coordinates(self) -> int:
        return next(iter(self.members.values())).vector.size

    def masked_sum(self, nodes: Collection[NodeId]) -> Callable[[int], np.ndarray]:
        return lambda chunk: sum_chunk(self.spools, nodes, chunk, self.coordinates, self.ring)

    def plain_sum(self, nodes: Collection[NodeId]) -> np.ndarray:
        """uint32 [d]: the plain integer sum in the ring, by numpy alone."""
        total = sum(self.members[node].vector.astype(np.int64) for node in nodes)
        return (total % self.ring.modulus).astype(np.uint32)


def sum_chunk(
    spools: Mapping[NodeId, bytes], nodes: Collection[NodeId], chunk: int, d: int, ring: Ring
) -> np.ndarray:
    m = min(CHUNK, d - chunk * CHUNK)
    offset, length = packed_offset(chunk, ring), ring.bytes_per_chunk(m)
    total = PlanarSum(m, ring)
    for node in nodes:
        total.add(spools[node][offset : offset + length])
    return total.result()


def unpack_all(packed: bytes, d: int, ring: Ring) -> np.ndarray:
    """uint32 [d] of a packed vector."""
    chunks = []
    for chunk, start in enumerate(range(0, d, CHUNK)):
        m = min(CHUNK, d - start)
        offset = packed_offset(chunk, ring)
        chunks.append(unpack(packed[offset : offset + ring.bytes_per_chunk(m)], m, ring))
    return np.concatenate(chunks)
