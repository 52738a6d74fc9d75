"""One secure sum in memory: every message of the protocol between real nodes and a real hub.

The vectors are made by the node's own code under the masks of this attempt; what comes out is the
sum with the masks taken off, in the packed form that the outer step reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocols.canonical import sha256_hex
from protocols.identifiers import NodeId
from protocols.secagg import coordinator as hub
from protocols.secagg import node as side
from protocols.secagg.attempts import NO_CHECKPOINT
from protocols.secagg.checks import (
    check_bundle,
    check_commit,
    check_deal_ok,
    check_header,
    check_ready,
    check_reveal,
    check_start,
    check_survivors,
)
from protocols.secagg.context import Attempt
from protocols.secagg.messages import DealBundle
from protocols.secagg.unmask import mask_remover
from protocols.tensors.layout import VectorLayout
from protocols.tensors.planar import LaneAdder, accumulate
from protocols.tensors.ring import Ring
from protocols.tensors.units import blob_digest


def identity(name: str) -> Ed25519PrivateKey:
    """The key of a node of the benchmark; it protects nothing."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


class SecureSum:
    """One attempt in which nobody is lost."""

    def __init__(self, attempt: Attempt, nodes: Sequence[str], ring: Ring, *, seed: bytes) -> None:
        self._attempt = attempt
        self._ring = ring
        self._keys = {NodeId(name): identity(name) for name in nodes}
        self._states: dict[NodeId, Any] = {}
        readys = {}
        for node in self._keys:
            (signed,) = self._do(
                node,
                side.ready(
                    None,
                    attempt,
                    node,
                    self._keys[node],
                    seed=hashlib.sha256(seed + node.encode()).digest(),
                    seen_size=0,
                    seen_root=sha256_hex(b""),
                    certificate=None,
                ),
            )
            check_ready(signed, attempt)
            readys[node] = signed
        self._start = hub.make_start(readys)
        started = check_start(self._start, attempt)
        bundles: dict[NodeId, DealBundle] = {}
        for node, key in self._keys.items():
            (bundle,) = self._do(node, side.deal(self._states[node], self._start, key))
            check_bundle(bundle, started)
            bundles[node] = bundle
        self._agreed, deliveries = hub.make_deliveries(bundles, started, NO_CHECKPOINT)
        oks = {}
        for node, delivery in deliveries.items():
            state, key = self._states[node], self._keys[node]
            move = side.acknowledge(state, delivery, key, checkpoint=NO_CHECKPOINT)
            (oks[node],) = self._do(node, move)
            check_deal_ok(oks[node], self._agreed)
        go = hub.make_go(oks)
        for node in self._keys:
            self._do(node, side.go(self._states[node], go))

    def _do(self, node: NodeId, move: Any) -> Sequence[Any]:
        self._states[node] = move.state
        sent: Sequence[Any] = move.send
        return sent

    def adder(self, node: str) -> LaneAdder:
        """What adds a node's masks to its integers."""
        return side.mask_adder(self._states[NodeId(node)], self._ring)

    def opened(self, vectors: Mapping[str, bytes], layout: VectorLayout) -> bytes:
        """The sum of masked vectors, packed, without their masks.

        Args:
            vectors: of every node of the attempt, packed.
            layout: of the round.
        """
        headers = {}
        for node, key in self._keys.items():
            data = vectors[node]
            move = side.upload(
                self._states[node], key, upload_root=blob_digest(data), length=len(data)
            )
            (headers[node],) = self._do(node, move)
            check_header(headers[node], self._agreed)
        survivors = hub.make_survivors(headers)
        listed = check_survivors(survivors, self._agreed)
        commits = {}
        for node, key in self._keys.items():
            (commits[node],) = self._do(node, side.commit(self._states[node], survivors, key))
            check_commit(commits[node], listed)
        certificate = hub.make_commit_certificate(commits, listed)
        reveals = []
        for node, key in self._keys.items():
            (signed,) = self._do(node, side.reveal(self._states[node], certificate, key))
            reveals.append(check_reveal(signed, listed))
        found = hub.reconstruct(reveals, listed)
        remover = mask_remover(
            listed.agreed.ctx,
            self._ring,
            roster=self._attempt.roster,
            deals=listed.agreed.deals,
            opened=found.opened,
        )
        readers = [_reader(vectors[node]) for node in self._keys]
        return b"".join(accumulate(readers, layout, self._ring, adjust=remover))


def plain_sum(vectors: Mapping[str, bytes], layout: VectorLayout, ring: Ring) -> bytes:
    """The sum of vectors that carry no masks, packed."""
    return b"".join(accumulate([_reader(data) for data in vectors.values()], layout, ring))


def _reader(data: bytes) -> Any:
    return lambda offset, length: data[offset : offset + length]
