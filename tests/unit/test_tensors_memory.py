"""Memory is O(chunk): three times the model takes no more."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from protocols.outer_step import apply_outer_step
from protocols.plan import Outer, Scale
from protocols.tensors import (
    PackedVector,
    Ring,
    VectorLayout,
    accumulate,
    check_finite,
    encode_metrics,
    encode_vector,
    first_scales,
    pack,
)
from tests.support.tensors import METRICS, manifest_of, site_metrics

RING = Ring(20)
SMALL, LARGE = 2 * 2**20, 6 * 2**20  # coordinates
MEBIBYTE = 2**20


def encoding(size: int, threads: int) -> None:
    manifest = manifest_of(w=(size,))
    layout = VectorLayout.of(manifest, "all", METRICS)
    delta = np.broadcast_to(np.float32(0.01), (size,))
    check_finite(delta, layout)
    encode_vector(
        delta,
        layout,
        first_scales(manifest, bound=0.05, ring=RING, nodes=4),
        weight_units=65536,
        clip_factor=1.0,
        metrics=site_metrics(layout),
        seed=bytes(32),
        ring=RING,
        limit=RING.clamp_limit(4),
        sink=lambda _: None,
        threads=threads,
    )


def summing(size: int, threads: int) -> None:
    for _ in accumulate([lambda _, length: bytes(length)] * 3, size, RING, threads=threads):
        pass


def stepping(size: int, threads: int) -> None:
    manifest = manifest_of(w=(size,))
    layout = VectorLayout.of(manifest, "all", METRICS)
    limbs = encode_metrics(site_metrics(layout), METRICS).tolist()
    last, lanes = layout.chunk(layout.chunk_count - 1), np.zeros(48, np.uint32)
    lanes[:] = limbs
    assert last == (size, size + 48), "the metrics are alone in the last chunk"

    def read(offset: int, length: int) -> bytes:
        if offset < layout.packed_size(RING) - RING.bytes_per_chunk(48):
            return bytes(length)
        return pack(lanes, RING)

    result = apply_outer_step(
        outer=Outer(optimizer="nesterov", momentum=0.9),
        scale_rule=Scale(),
        layout=layout,
        manifest=manifest,
        snapshot_counters={},
        theta=lambda _, length: bytes(length),
        buffers={"momentum": lambda _, length: bytes(length)},
        scales=first_scales(manifest, bound=0.05, ring=RING, nodes=1),
        sum_reader=PackedVector(read, layout.coordinates, RING),
        ring=RING,
        nodes=1,
        roster=1,
        writer=lambda *_: None,
        threads=threads,
    )
    assert len(result.unit_hashes["momentum"]) == -(-size // 2**20)


def keeping(size: int, threads: int) -> None:
    """A planted mistake: all chunks of the sum are held at once."""
    list(accumulate([lambda _, length: bytes(length)], size, RING, threads=threads))


def peak(work: Callable[[int, int], None], size: int, threads: int) -> int:
    """Largest number of bytes allocated at once; numpy reports its arrays to tracemalloc."""
    work(2**18, 1)  # imports and caches
    tracemalloc.start()
    try:
        work(size, threads)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("work", [encoding, summing, stepping])
def test_memory_does_not_grow_with_the_model(work):
    one = peak(work, SMALL, 1)

    assert one < 20 * MEBIBYTE
    assert peak(work, LARGE, 1) < one + MEBIBYTE / 10
    # Twice the scratch, and at most three results (0.7 MB each) that wait for their turn.
    assert peak(work, LARGE, 2) < 2 * one + 3 * MEBIBYTE


def test_the_measure_convicts_a_sum_that_is_held_in_memory():
    assert peak(keeping, LARGE, 1) > peak(keeping, SMALL, 1) + 9 * MEBIBYTE
