"""Layouts, rounding, scales and whole vectors, for any shapes and values."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocols.tensors import (
    BLOCK,
    CHUNK,
    Manifest,
    Ring,
    TensorSpec,
    VectorLayout,
    accumulate,
    check_finite,
    dither_stream,
    first_scales,
    stochastic_round,
)
from protocols.tensors.scales import largest_exponent, next_exponent
from tests.support import tensors_reference as reference
from tests.support.tensors import METRICS, encode, reader_of, site_metrics

rings = st.sampled_from([Ring(16), Ring(20), Ring(24)])
# Sizes around the block and the chunk are as likely as small ones.
tensor_sizes = st.one_of(
    st.integers(1, 9),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1]),
)


@st.composite
def layouts(draw, sizes=tensor_sizes, metrics=("weight", "nodes")):
    manifest = Manifest(
        tuple(
            TensorSpec(f"t{index}", (size,))
            for index, size in enumerate(draw(st.lists(sizes, min_size=1, max_size=6)))
        )
    )
    names = draw(st.sets(st.sampled_from([tensor.name for tensor in manifest.tensors])))
    return manifest, VectorLayout.of(manifest, sorted(names), metrics)


def owners(layout: VectorLayout, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """By brute force: theta coordinate and tensor of every model coordinate of the vector."""
    theta, tensor = [], []
    for segment in layout.segments:
        theta.append(np.arange(segment.start, segment.stop))
        tensor.append(np.full(segment.coordinates, manifest.segments.index(segment)))
    empty = [np.empty(0, np.int64)]
    return np.concatenate(theta or empty), np.concatenate(tensor or empty)


# -- layout --------------------------------------------------------------------------------------


@given(layouts())
def test_blocks_cover_the_model_once_and_never_span_tensors(case):
    manifest, layout = case
    theta, tensor = owners(layout, manifest)
    at, seen = 0, set()
    for block in layout.blocks():
        assert block.start == at, "blocks follow each other without a gap"
        assert 1 <= block.stop - block.start <= BLOCK
        assert len(set(tensor[block.start : block.stop].tolist())) == 1
        assert theta[block.start] == block.theta_start
        segment = manifest.segments[tensor[block.start]]
        assert block.number == segment.first_block + (block.theta_start - segment.start) // BLOCK
        seen.add(block.number)
        at = block.stop
    assert at == layout.model_coordinates
    assert len(seen) == layout.block_count
    assert seen <= set(range(manifest.blocks))


def test_the_brute_force_convicts_a_block_that_spans_two_tensors():
    manifest = Manifest((TensorSpec("t0", (3,)), TensorSpec("t1", (3,))))
    _, tensor = owners(VectorLayout.of(manifest, "all", ()), manifest)

    assert len(set(tensor[2:4].tolist())) == 2


@given(layouts(), st.data())
def test_pieces_and_runs_are_the_parts_of_any_range(case, data):
    manifest, layout = case
    theta, _ = owners(layout, manifest)
    bounds = st.integers(0, layout.coordinates)
    start, stop = sorted((data.draw(bounds), data.draw(bounds)))
    covered = [c for p in layout.pieces(start, stop) for c in (p.start, p.stop)]
    end = min(stop, layout.model_coordinates)
    assert covered[:1] + covered[-1:] == ([start, end] if start < end else [])
    assert covered[1:-1:2] == covered[2:-1:2], "pieces follow each other"

    bounds = st.integers(0, manifest.coordinates)
    low, high = sorted((data.draw(bounds), data.draw(bounds)))
    wanted = np.flatnonzero((theta >= low) & (theta < high))
    runs = list(layout.runs(low, high))
    found = [np.arange(r.start, r.start + r.theta_stop - r.theta_start) for r in runs]
    assert np.array_equal(np.concatenate([*found, np.empty(0, int)]), wanted)
    for run in runs:
        assert theta[run.start] == run.theta_start
    assert all(a.theta_stop < b.theta_start for a, b in pairwise(runs))


@given(layouts())
def test_chunks_cut_the_vector(case):
    _, layout = case
    chunks = list(layout.chunks())

    assert [stop for _, _, stop in chunks[:-1]] == [start for _, start, _ in chunks[1:]]
    assert chunks[0][1] == 0
    assert chunks[-1][2] == layout.coordinates
    assert all(stop - start == CHUNK for _, start, stop in chunks[:-1])


# -- rounding ------------------------------------------------------------------------------------

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
near = st.floats(-300, 300, width=32)


@settings(max_examples=400)
@given(
    st.one_of(floats, near), st.integers(-30, 30), st.integers(0, 65535), st.integers(1, 2**23 - 1)
)
def test_rounding_one_value(value, exponent, dither, limit):
    scaled = value * 2.0**exponent
    assume(scaled == 0 or 2.0**-126 <= abs(scaled) < 2.0**127)  # exact in float32
    rounded, clamped = stochastic_round(
        np.array([value], np.float32), exponent, dither.to_bytes(2, "little"), limit
    )

    assert (int(rounded[0]), bool(clamped)) == reference.round_one(scaled, dither, limit)
    assert abs(int(rounded[0])) <= limit
    if abs(scaled) <= limit:
        assert abs(Fraction(int(rounded[0])) - Fraction(scaled)) < 1 or scaled == int(scaled)


@given(near)
def test_the_mean_over_all_dithers_is_the_value(value):
    dithers = np.arange(65536, dtype="<u2").tobytes()
    rounded, _ = stochastic_round(np.full(65536, value, np.float32), 0, dithers, 1000)
    bias = Fraction(int(rounded.sum(dtype=np.int64)), 65536) - Fraction(value)

    # Below: the fraction of a negative value next to 0 is rounded to float32.
    assert -Fraction(1, 2**24) <= bias < Fraction(1, 65536)


# -- scales --------------------------------------------------------------------------------------

positive = st.floats(1e-30, 1e30, allow_nan=False)


@given(st.integers(1, 2**23 - 1), positive)
def test_first_exponents_against_trying_them_all(limit, bound):
    tried = [e for e in range(-100, 101) if reference.two_to(e) * Fraction(bound) <= limit]

    assert largest_exponent(limit, Fraction(bound)) == max(tried, default=-100)


@settings(max_examples=300)
@given(
    st.lists(st.integers(-(2**23), 2**23), min_size=1, max_size=20),
    st.integers(-100, 100),
    st.integers(1, 64 * 65536),
    st.integers(1, 10**6),
    st.floats(1e-12, 1e12),
    st.integers(1, 2**23 - 1),
)
def test_next_exponents_against_trying_them_all(sums, old, weight, k_permille, floor, limit):
    assert next_exponent(
        sum_squares=sum(s * s for s in sums),
        coordinates=len(sums),
        old=old,
        weight_sum_units=weight,
        k_permille=k_permille,
        floor=Fraction(floor),
        limit=limit,
    ) == reference.next_exponent(
        sums, old=old, weight_units=weight, k_permille=k_permille, floor=floor, limit=limit
    )


def by_floats(s: int, limit: int) -> int:
    """A planted mistake: the decision in float64."""
    return math.floor(math.log2(limit / math.sqrt(float(s * s + 1))))


def test_trying_them_all_convicts_a_decision_in_floats():
    """rms is a hair above 2**27: floats cannot see the hair, the reference can."""
    s, limit = 2**27, 2**10
    sums = [s, 1]
    exact = reference.next_exponent(
        [s] * 1, old=0, weight_units=65536, k_permille=1000, floor=1e-12, limit=limit
    )
    hair = next_exponent(
        sum_squares=s * s + 1,
        coordinates=1,
        old=0,
        weight_sum_units=65536,
        k_permille=1000,
        floor=Fraction(1, 10**12),
        limit=limit,
    )

    assert sum(v * v for v in sums) == s * s + 1
    assert exact == by_floats(s, limit) == -17
    assert hair == -18


# -- whole vectors -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layouts(st.integers(1, 40), METRICS), rings, st.binary(min_size=32, max_size=32), st.data())
def test_any_vector_is_what_the_specification_says(case, ring, seed, data):
    manifest, layout = case
    size, nodes = layout.model_coordinates, data.draw(st.integers(1, 64))
    delta = data.draw(arrays.arrays(np.float32, size, elements=st.floats(-2, 2, width=32)))
    weight, factor = data.draw(st.integers(1, 65536)), data.draw(st.floats(0.01, 1.0))
    scales = first_scales(manifest, bound=1.0, ring=ring, nodes=nodes)
    limit = ring.clamp_limit(nodes)
    packed = encode(
        delta, layout, scales, ring, roster=nodes, seed=seed, weight=weight, clip_factor=factor
    )

    dither = np.frombuffer(dither_stream(seed, 0, size), "<u2").tolist()
    multiplier = reference.f32(weight / 65536 * factor)
    step = 2.0 ** int(scales.exponents[0])
    rounded = [
        reference.round_one(reference.f32(float(x) * multiplier * step), u, limit)
        for x, u in zip(delta, dither, strict=True)
    ]
    metrics = site_metrics(layout, weight=weight) | {"clamped": sum(c for _, c in rounded)}
    limbs = [limb for name in layout.metrics for limb in reference.limbs(metrics[name])]
    assert packed == reference.pack_vector([q for q, _ in rounded] + limbs, ring.bits)


@settings(max_examples=20, deadline=None)
@given(rings, st.lists(st.integers(0, 2**31), min_size=2, max_size=6), st.randoms())
def test_the_sum_does_not_depend_on_the_order(ring, seeds, shuffler):
    manifest = Manifest((TensorSpec("w", (300,)),))
    layout = VectorLayout.of(manifest, "all", METRICS)
    scales = first_scales(manifest, bound=0.03, ring=ring, nodes=len(seeds))
    vectors = []
    for seed in seeds:
        delta = (np.random.default_rng(seed).standard_normal(300) * 0.01).astype(np.float32)
        assert check_finite(delta, layout) > 0
        vectors.append(encode(delta, layout, scales, ring, roster=len(seeds)))
    shuffled = list(vectors)
    shuffler.shuffle(shuffled)

    def total(packed):
        return b"".join(accumulate([reader_of(data) for data in packed], layout, ring))

    assert total(vectors) == total(shuffled)
    if len(set(seeds)) > 1:
        assert total(vectors) != total([vectors[0]] * len(vectors)), "the sum can tell"


def test_float_addition_would_depend_on_the_order():
    """Why sums are integers: the property above fails for float32."""
    values = np.array([1e8, 1.0, -1e8], np.float32)

    assert (values[0] + values[1]) + values[2] != (values[0] + values[2]) + values[1]
