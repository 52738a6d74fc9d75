"""Ring, planar packing, sums and metrics at their edges."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from protocols.errors import MalformedMessageError, WrappedSumError
from protocols.tensors import (
    CHUNK,
    MAX_NODES,
    METRIC_BOUND,
    PackedVector,
    PlanarSum,
    Ring,
    accumulate,
    decode_metrics,
    encode_metrics,
    metric_names,
    pack,
    packed_offset,
    packed_size,
    unpack,
)
from protocols.tensors.ordered import ordered_map
from protocols.tensors.sizes import MAX_ADDENDS
from tests.support import tensors_reference as reference
from tests.support.tensors import reader_of

RINGS = [Ring(16), Ring(20), Ring(24)]
BOUNDARIES = [0, 1, 255, 256, 257, CHUNK - 1, CHUNK]
all_rings = pytest.mark.parametrize("ring", RINGS, ids=lambda ring: f"{ring.bits} bits")


def lanes_of(m: int, ring: Ring, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ring.modulus, m, dtype=np.uint32)


# -- ring ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 8, 15, 17, 32])
def test_other_rings_do_not_exist(bits):
    with pytest.raises(ValueError, match="16, 20 or 24"):
        Ring(bits)


def test_the_clamp_limits_of_33_nodes():
    """The figures that the design states for n = 33."""
    assert [ring.clamp_limit(33) for ring in RINGS] == [992, 15_887, 254_200]


@all_rings
def test_as_many_clamped_vectors_as_there_are_nodes_cannot_wrap(ring):
    for nodes in range(1, MAX_NODES + 1):
        limit = ring.clamp_limit(nodes)
        assert nodes * limit < 2 ** (ring.bits - 1) <= nodes * (limit + 1) + nodes
    for nodes in (0, MAX_NODES + 1):
        with pytest.raises(ValueError, match="1 to 64"):
            ring.clamp_limit(nodes)


@all_rings
def test_centring_at_the_edges(ring):
    half = ring.modulus // 2
    given = np.array([0, 1, half - 1, half, ring.modulus - 1, ring.modulus, 2**32 - 1], np.uint32)

    assert ring.centre(given).tolist() == [0, 1, half - 1, -half, -1, 0, -1]
    assert ring.reduce(np.array([-1, -half, half], np.int32)).tolist() == [
        ring.modulus - 1, half, half,
    ]  # fmt: skip


@all_rings
def test_noise_leaves_a_tenth_of_the_ring(ring):
    assert ring.noisy_limit() == int(0.9 * 2 ** (ring.bits - 1))


# -- packing -------------------------------------------------------------------------------------


@all_rings
@pytest.mark.parametrize("m", BOUNDARIES)
def test_packing_at_the_boundaries(ring, m):
    lanes = lanes_of(m, ring)
    packed = pack(lanes, ring)

    assert len(packed) == ring.bytes_per_chunk(m)
    assert packed == reference.pack_chunk(lanes.tolist(), ring.bits)
    assert np.array_equal(unpack(packed, m, ring), lanes)


@all_rings
@pytest.mark.parametrize("d", [*BOUNDARIES, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
def test_sizes_and_offsets_of_vectors(ring, d):
    sizes = [ring.bytes_per_chunk(min(CHUNK, d - at)) for at in range(0, d, CHUNK)]

    assert packed_size(d, ring) == sum(sizes)
    assert [packed_offset(i, ring) for i in range(len(sizes))] == [
        sum(sizes[:i]) for i in range(len(sizes))
    ]


def test_bytes_per_coordinate():
    assert [ring.bytes_per_chunk() / CHUNK for ring in RINGS] == [2.0, 2.5, 3.0]


@all_rings
def test_packing_drops_what_is_above_the_ring(ring):
    values = np.array([-1, ring.modulus, ring.modulus + 5, -ring.modulus + 7], np.int32)

    assert unpack(pack(values, ring), 4, ring).tolist() == [ring.modulus - 1, 0, 5, 7]


@all_rings
@pytest.mark.parametrize("change", [-1, 1])
def test_a_chunk_of_another_length_is_refused(ring, change):
    size = ring.bytes_per_chunk(10) + change

    with pytest.raises(MalformedMessageError, match=f"{size} bytes; expected"):
        unpack(bytes(size), 10, ring)
    with pytest.raises(MalformedMessageError):
        PlanarSum(10, ring).add(bytes(size))
    with pytest.raises(MalformedMessageError):
        PackedVector(bytes(size), 10, ring)


def test_an_odd_chunk_has_one_packed_form():
    """The unused half byte must be zero in a sum; in an upload it cannot spoil one."""
    ring = Ring(20)
    good = pack(np.array([1, 2, 3], np.uint32), ring)
    spoilt = good[:-1] + bytes([good[-1] | 0x70])

    with pytest.raises(MalformedMessageError, match="half byte"):
        unpack(spoilt, 3, ring)
    total = PlanarSum(3, ring)
    total.add(spoilt)
    total.add(good)
    assert total.result().tolist() == [2, 4, 6]


# -- sums ----------------------------------------------------------------------------------------


@all_rings
@pytest.mark.parametrize("m", [1, 2, 255, 256, 257])
@pytest.mark.parametrize("addends", [1, 2, 64, 300])
def test_a_sum_of_largest_values(ring, m, addends):
    top = np.full(m, ring.modulus - 1, np.uint32)
    total = PlanarSum(m, ring)
    for _ in range(addends):
        total.add(pack(top, ring))

    assert np.array_equal(total.result(), np.full(m, -addends % ring.modulus, np.uint32))
    assert np.array_equal(total.result(), total.result()), "asking does not change the sum"


@all_rings
def test_4096_addends_are_exact_and_one_more_is_refused(ring):
    total, packed = PlanarSum(3, ring), pack(np.full(3, ring.modulus - 1, np.uint32), ring)
    for _ in range(MAX_ADDENDS):
        total.add(packed)

    assert total.result().tolist() == [-MAX_ADDENDS % ring.modulus] * 3
    with pytest.raises(ValueError, match="at most 4096"):
        total.add(packed)
    total.clear()
    assert total.result().tolist() == [0, 0, 0]


@all_rings
@pytest.mark.parametrize("d", [1, 257, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_streaming_sums_of_whole_vectors(ring, d):
    vectors = [lanes_of(d, ring, seed=seed) for seed in range(5)]
    inputs = [reader_of(reference_pack(lanes, ring)) for lanes in vectors]
    expected = sum(v.astype(np.int64) for v in vectors) % ring.modulus

    one = list(accumulate(inputs, d, ring))
    two = list(accumulate(inputs[::-1], d, ring, threads=2))

    assert b"".join(one) == reference_pack(expected.astype(np.uint32), ring)
    assert one == two, "neither the order nor the threads matter"


def reference_pack(lanes: np.ndarray, ring: Ring) -> bytes:
    return b"".join(pack(lanes[at : at + CHUNK], ring) for at in range(0, lanes.size, CHUNK))


@all_rings
def test_adjusting_takes_masks_off(ring):
    d = CHUNK + 100
    values, masks = lanes_of(d, ring, seed=1), lanes_of(d, ring, seed=2)
    seen = []

    def unmask(chunk, start, lanes):
        seen.append((chunk, start, lanes.size))
        lanes -= masks[start : start + lanes.size]

    masked = reference_pack(values + masks, ring)
    out = b"".join(accumulate([reader_of(masked)], d, ring, adjust=unmask))

    assert out == reference_pack(values, ring)
    assert seen == [(0, 0, CHUNK), (1, CHUNK, 100)]


def test_a_short_reader_is_refused():
    ring = Ring(20)
    data = reference_pack(lanes_of(CHUNK + 5, ring), ring)

    with pytest.raises(MalformedMessageError):
        list(accumulate([reader_of(data), reader_of(data[:-1])], CHUNK + 5, ring))


@all_rings
def test_ranges_of_a_packed_vector(ring):
    d = CHUNK + 301
    lanes = lanes_of(d, ring)
    vector = PackedVector(reference_pack(lanes, ring), d, ring)
    expected = ring.centre(lanes)

    half = CHUNK // 2
    for start, stop in [
        (0, 0), (0, 1), (half - 3, half + 2), (CHUNK - 1, CHUNK), (CHUNK - 70_000, CHUNK + 200),
        (CHUNK + 149, CHUNK + 153), (d - 1, d), (0, d),
    ]:  # fmt: skip
        out = np.empty(stop - start, np.int32)
        vector.read_centred(start, stop, out)
        assert np.array_equal(out, expected[start:stop])
    with pytest.raises(IndexError):
        vector.read_centred(0, d + 1, np.empty(d + 1, np.int32))


# -- metrics -------------------------------------------------------------------------------------

NAMES = ("weight", "loss")


def test_a_metric_is_six_limbs_of_eight_bits():
    limbs = encode_metrics({"weight": 65536, "loss": METRIC_BOUND - 1}, NAMES)

    assert limbs.tolist() == [0, 0, 1, 0, 0, 0] + [255] * 6
    assert limbs.tolist() == reference.limbs(65536) + reference.limbs(METRIC_BOUND - 1)


@all_rings
def test_metrics_survive_64_nodes_at_the_maximum(ring):
    limbs = encode_metrics({"weight": METRIC_BOUND - 1, "loss": METRIC_BOUND - 1}, NAMES)
    total = PlanarSum(12, ring)
    for _ in range(MAX_NODES):
        total.add(pack(limbs, ring))
    sums = ring.centre(total.result())

    assert decode_metrics(sums, NAMES) == dict.fromkeys(NAMES, MAX_NODES * (METRIC_BOUND - 1))
    with pytest.raises(WrappedSumError):  # one node fewer could not have sent that
        decode_metrics(sums, NAMES, nodes=MAX_NODES - 1)


@pytest.mark.parametrize(
    ("clause", "values"),
    [
        ("6.1 missing", {"weight": 1}),
        ("6.1 unknown", {"weight": 1, "loss": 1, "more": 1}),
        ("6.1 negative", {"weight": 1, "loss": -1}),
        ("6.1 too large", {"weight": 1, "loss": METRIC_BOUND}),
        ("6.1 a fraction", {"weight": 1, "loss": 1.5}),
        ("6.1 a truth value", {"weight": 1, "loss": True}),
    ],
)
def test_a_metric_is_refused(clause, values):
    with pytest.raises(MalformedMessageError, match="metric"):
        encode_metrics(values, NAMES)


@pytest.mark.parametrize("limb", [-1, 511])
def test_a_limb_that_no_two_nodes_can_send(limb):
    with pytest.raises(WrappedSumError, match="metric loss"):
        decode_metrics([0] * 11 + [limb], NAMES, nodes=2)


def test_a_wrong_number_of_limbs_is_a_mistake():
    with pytest.raises(ValueError, match="12 limbs"):
        decode_metrics([0] * 11, NAMES)


def test_the_metrics_of_a_round():
    assert metric_names(["es", "pt"])[-4:] == (
        "documents/es", "nll_millinats/pt", "bytes/pt", "documents/pt",
    )  # fmt: skip
    assert metric_names(())[:2] == ("weight", "nodes")
    assert len(set(metric_names(["es"]))) == 11


# -- ordered work --------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_scratch_is_never_shared(threads):
    in_use, guard, made = set(), threading.Lock(), []

    def make():
        made.append(object())
        return made[-1]

    def work(index, scratch):
        with guard:
            assert scratch not in in_use
            in_use.add(scratch)
        with guard:
            in_use.remove(scratch)
        return index

    assert list(ordered_map(work, 50, make, threads=threads)) == list(range(50))
    assert len(made) == threads


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_piece_is_raised_and_stops_the_rest(threads):
    done = []

    def work(index, _):
        if index == 3:
            raise KeyError(index)
        done.append(index)

    with pytest.raises(KeyError):
        list(ordered_map(work, 10_000, lambda: None, threads=threads))
    assert len(done) < 100
