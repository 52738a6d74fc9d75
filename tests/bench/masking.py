"""Masking and unmasking: ours, the bare keystream, and Flower's SecAgg+, one after another.

The floor is what no implementation can do without: for every mask an AES-256-CTR keystream of four
bytes a coordinate, and one integer addition of it. Flower's part is its own client code (quantize,
one mask from ``pseudo_rand_gen`` for itself and each peer, the additions, the final modulus), at a
size at which it is bearable; it is compared per parameter and peer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.secagg.masks import MaskAdder, MaskKey
from protocols.tensors.ordered import ordered_map
from protocols.tensors.ring import Ring, packed_size
from protocols.tensors.sizes import CHUNK
from tests.bench.rows import OURS, Row, Spread, millions

KEYSTREAM = "floor: AES-CTR keystream + integer add"
SECAGG_PLUS = "Flower SecAgg+ (flwr 1.41.0)"
_FLOOR_BLOCK = 2**18  # bytes of keystream at a time: stays in the cache
_RING = Ring(20)


def _keys(count: int) -> list[MaskKey]:
    return [MaskKey(key=os.urandom(32), sign=1 if number % 2 else -1) for number in range(count)]


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _all_chunks(d: int, each: Callable[[int, np.ndarray], None], threads: int) -> None:
    def work(chunk: int, lanes: np.ndarray) -> None:
        each(chunk, lanes[: min(CHUNK, d - chunk * CHUNK)])

    for _ in ordered_map(work, -(-d // CHUNK), lambda: np.zeros(CHUNK, np.uint32), threads=threads):
        pass


def mask_once(masks: list[MaskKey], d: int, threads: int) -> float:
    """Seconds to add all masks to a vector of d coordinates."""
    adder = MaskAdder(masks, _RING)
    return _timed(lambda: _all_chunks(d, adder.add, threads))


def keystream_once(masks: list[MaskKey], d: int, threads: int) -> float:
    """Seconds for the bare keystreams of as many masks, each added once."""
    zeros = bytes(_FLOOR_BLOCK)

    def each(chunk: int, lanes: np.ndarray) -> None:
        stream = bytearray(_FLOOR_BLOCK + 16)
        nonce = chunk.to_bytes(16, "big")
        ciphers = [Cipher(algorithms.AES256(m.key), modes.CTR(nonce)).encryptor() for m in masks]
        for start in range(0, lanes.size, _FLOOR_BLOCK // 4):
            part = lanes[start : start + _FLOOR_BLOCK // 4]
            for cipher in ciphers:
                cipher.update_into(memoryview(zeros)[: part.nbytes], stream)
                np.add(part, np.frombuffer(stream, "<u4", part.size), out=part)

    return _timed(lambda: _all_chunks(d, each, threads))


def secagg_plus_once(d: int, peers: int) -> float:
    """Seconds for Flower's client to quantize and mask a vector, for itself and its peers."""
    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        parameters_addition,
        parameters_mod,
        parameters_multiply,
    )
    from flwr.common.secure_aggregation.quantization import quantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    modulus = 1 << 32
    vector = [np.full(d, 0.001, np.float32)]
    seeds = [os.urandom(32) for _ in range(peers + 1)]

    def work() -> None:
        values = quantize(parameters_multiply(vector, 1.0), 8.0, 1 << 22)
        for seed in seeds:
            values = parameters_addition(values, pseudo_rand_gen(seed, modulus, [(d,)]))
        parameters_mod(values, modulus)

    return _timed(work)


def rows(*, d: int, nodes: int, repetitions: int, threads: int = 2) -> Iterator[Row]:
    """Rows of the design's table of numbers, each beside its floor in the same minute."""
    for what, count in _works(nodes):
        ours, floor = [], []
        for _ in range(repetitions):  # in turns: what else goes on meets both
            masks = _keys(count)
            floor.append(keystream_once(masks, d, threads))
            ours.append(mask_once(masks, d, threads))
        name = f"{what}, n={nodes}, {millions(d)} coordinates, {threads} threads"
        common = {"what": name, "params": d, "nodes": nodes}
        yield Row(
            system=KEYSTREAM, seconds_per_round=Spread.of(floor), note=f"{count} streams", **common
        )
        size = {"up": packed_size(d, _RING)} if what == "masking" else None
        yield Row(
            system=f"{OURS}, 20 bits",
            seconds_per_round=Spread.of(ours),
            bytes_per_node=size,
            note=f"{count} streams",
            **common,
        )
    yield from _beside_flower(repetitions)


def _works(nodes: int) -> list[tuple[str, int]]:
    lost = {0: nodes, 3: (nodes - 3) * 4, 11: (nodes - 11) * 12}
    return [("masking", nodes)] + [
        (f"unmasking, {gone} lost", streams) for gone, streams in lost.items()
    ]


def _beside_flower(repetitions: int) -> Iterator[Row]:
    d, peers = 1_000_000, 7
    ours, theirs = [], []
    for _ in range(repetitions):
        theirs.append(secagg_plus_once(d, peers))
        ours.append(mask_once(_keys(peers + 1), d, 1))
    name = f"masking for {peers} peers, {millions(d)} coordinates, 1 thread"
    common = {"what": name, "params": d, "nodes": peers + 1}
    yield Row(
        system=SECAGG_PLUS,
        seconds_per_round=Spread.of(theirs),
        bytes_per_node={"up": 8 * d},
        note=f"{1e9 * min(theirs) / d / peers:.1f} ns per parameter and peer; int64 on the wire",
        **common,
    )
    yield Row(
        system=f"{OURS}, 20 bits",
        seconds_per_round=Spread.of(ours),
        bytes_per_node={"up": packed_size(d, _RING)},
        note=f"{1e9 * min(ours) / d / peers:.2f} ns per parameter and peer",
        **common,
    )
