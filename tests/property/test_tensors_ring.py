"""Packing and summing, for any values: the oracle is plain Python arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocols.tensors import (
    METRIC_BOUND,
    PlanarSum,
    Ring,
    decode_metrics,
    encode_metrics,
    pack,
    unpack,
)
from tests.support import tensors_reference as reference

rings = st.sampled_from([Ring(16), Ring(20), Ring(24)])
sizes = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257]))
# Extremes are as likely as anything else: carries and signs live there.
words = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 0xFFFF, 0x10000, 0x7FFFF, 0x80000, 0xFFFFF, 0xFFFFFF, 2**32 - 1]),
)


def lanes(size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.uint32, size, elements=words)


@given(rings, sizes.flatmap(lanes))
def test_what_is_packed_comes_back(ring, values):
    packed = pack(values, ring)

    assert packed == reference.pack_chunk(values.tolist(), ring.bits)
    assert np.array_equal(unpack(packed, values.size, ring), values % np.uint32(ring.modulus))


@st.composite
def sums(draw):
    ring, size = draw(rings), draw(sizes)
    distinct = draw(st.lists(lanes(size), min_size=1, max_size=4))
    # Repeats reach many addends without drawing many arrays; 64 nodes at the top are among them.
    order = draw(st.lists(st.integers(0, len(distinct) - 1), min_size=1, max_size=90))
    return ring, [distinct[index] for index in order]


def plain_sum(ring: Ring, addends: list[np.ndarray]) -> list[int]:
    return [
        sum(column) % ring.modulus for column in zip(*(a.tolist() for a in addends), strict=True)
    ]


@settings(deadline=None)
@given(sums(), st.randoms(use_true_random=False))
def test_a_planar_sum_is_the_sum(case, shuffler):
    ring, addends = case
    forward, shuffled = PlanarSum(addends[0].size, ring), PlanarSum(addends[0].size, ring)
    for values in addends:
        forward.add(pack(values, ring))
    mixed = list(addends)
    shuffler.shuffle(mixed)
    for values in mixed:
        shuffled.add(pack(values, ring))

    assert forward.result().tolist() == plain_sum(ring, addends)
    assert np.array_equal(forward.result(), shuffled.result())


@given(rings, arrays.arrays(np.uint32, 9, elements=words))
def test_centring_is_the_representative_nearest_zero(ring, values):
    assert ring.centre(values).tolist() == [
        reference.centred(value, ring.bits) for value in values.tolist()
    ]


@given(
    rings,
    st.lists(
        st.tuples(st.integers(0, METRIC_BOUND - 1), st.integers(0, METRIC_BOUND - 1)),
        min_size=1,
        max_size=64,
    ),
)
def test_metrics_add_up(ring, sites):
    names = ("loss", "tokens")
    total = PlanarSum(12, ring)
    for loss, tokens in sites:
        total.add(pack(encode_metrics({"tokens": tokens, "loss": loss}, names), ring))

    assert decode_metrics(ring.centre(total.result()), names, nodes=len(sites)) == {
        "loss": sum(loss for loss, _ in sites),
        "tokens": sum(tokens for _, tokens in sites),
    }


# -- the oracles can convict ---------------------------------------------------------------------


def forgets_the_carry(ring: Ring, addends: list[np.ndarray]) -> list[int]:
    """A planted mistake: planes are added, but low planes never carry into high ones."""
    low = sum(a.astype(np.int64) & 0xFFFF for a in addends) & 0xFFFF
    high = sum(a.astype(np.int64) >> 16 for a in addends) << 16
    return ((low + high) % ring.modulus).tolist()


@pytest.mark.parametrize("bits", [20, 24])
def test_the_plain_sum_convicts_a_lost_carry(bits):
    ring, addends = Ring(bits), [np.array([0xFFFF], np.uint32)] * 2

    assert forgets_the_carry(ring, addends) != plain_sum(ring, addends)


def test_the_packing_oracle_convicts_interleaved_half_bytes():
    """A planted mistake: neighbours share a byte, instead of coordinates half a chunk apart."""
    ring, values = Ring(20), [0x10000, 0x20000, 0x30000, 0x40000]
    low = b"".join((v & 0xFFFF).to_bytes(2, "little") for v in values)
    interleaved = low + bytes([0x21, 0x43])

    assert reference.pack_chunk(values, 20) == pack(np.array(values, np.uint32), ring)
    assert reference.pack_chunk(values, 20) != interleaved
