"""From an update to packed integers: rounding, clamping, clipping, masks, noise, threads."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.errors import (
    MalformedMessageError,
    ManifestMismatchError,
    NonFiniteUpdateError,
)
from protocols.tensors import (
    CHUNK,
    Ring,
    VectorLayout,
    check_finite,
    clip_factor,
    decode_metrics,
    dither_stream,
    encode_vector,
    first_scales,
    fixed_scales,
    packed_offset,
    stochastic_round,
    unpack,
    weight_units,
)
from tests.support import tensors_reference as reference
from tests.support.tensors import METRICS, encode, manifest_of, site_metrics

SEED = bytes(range(32))
RING = Ring(20)
ALL_DITHERS = np.arange(65536, dtype="<u2").tobytes()


def integers(packed: bytes, layout: VectorLayout, ring: Ring) -> np.ndarray:
    """The centred integers of a packed vector."""
    parts = []
    for index, start, stop in layout.chunks():
        offset, size = packed_offset(index, ring), ring.bytes_per_chunk(stop - start)
        parts.append(ring.centre(unpack(packed[offset : offset + size], stop - start, ring)))
    return np.concatenate(parts)


# -- dither --------------------------------------------------------------------------------------


def test_the_dither_is_a_plain_counter_mode_key_stream():
    size = 2 * (2 * CHUNK + 8)
    whole = Cipher(algorithms.AES(SEED), modes.CTR(bytes(16))).encryptor().update(bytes(size))

    assert dither_stream(SEED, 0, 2000) == whole[:4000]
    for start in (0, 1, 7, 8, 9, 255, 256, 257, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7):
        assert dither_stream(SEED, start, 1) == whole[2 * start : 2 * start + 2]


def test_a_seed_has_32_bytes():
    with pytest.raises(ValueError, match="32 bytes"):
        dither_stream(bytes(16), 0, 1)


# -- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [0.5, -0.5, 0.25, 1 / 3, -1 / 3, 2 / 3, 0.999, 1e-5, -1e-5, 100.7, -100.7, 7e4, 2**22 + 0.5],
)  # fmt: skip
def test_rounding_is_unbiased_over_all_dithers(value):
    """Exhaustive, so the tolerance is exact: the share that rounds up is the fraction, rounded up
    to a multiple of 2**-16."""
    value = float(np.float32(value))
    rounded, clamped = stochastic_round(
        np.full(65536, value, np.float32), 0, ALL_DITHERS, 2**23 - 1
    )
    bias = Fraction(int(rounded.astype(np.int64).sum()), 65536) - Fraction(value)

    assert clamped == 0
    assert set(rounded.tolist()) <= {math.floor(value), math.floor(value) + 1}
    assert 0 <= bias < Fraction(1, 65536)


def test_the_bias_convicts_rounding_to_the_nearest():
    """The measure above can fail: the planted mistake is off by a fifth of a step."""
    bias = Fraction(65536 * round(0.3), 65536) - Fraction(0.3)

    assert not 0 <= bias < Fraction(1, 65536)


@pytest.mark.parametrize("value", [0, 1, -1, 255, -256, 2**22, -(2**22), 2**23 - 1, 1 - 2**23])
def test_grid_points_are_kept_whatever_the_dither(value):
    rounded, clamped = stochastic_round(
        np.full(65536, value, np.float32), 0, ALL_DITHERS, 2**23 - 1
    )

    assert (rounded == value).all()
    assert clamped == 0


@pytest.mark.parametrize("exponent", [0, 1, -1, 20, -20, 100, -100])
def test_the_scale_is_a_power_of_two(exponent):
    x = np.array([3.0, -3.0, 0.75], np.float32) * np.float32(2.0**-exponent)
    rounded, _ = stochastic_round(x, exponent, b"\xff\xff" * 3, 1000)

    assert rounded.tolist() == [3, -3, 0]


def test_each_coordinate_may_have_its_exponent():
    rounded, _ = stochastic_round(
        np.ones(3, np.float32), np.array([0, 3, 5], np.int8), b"\xff\xff" * 3, 1000
    )

    assert rounded.tolist() == [1, 8, 32]


@pytest.mark.parametrize(
    ("value", "expected", "clamped"),
    [
        (10.0, 10, 0),
        (10.001, 10, 1),
        (-10.001, -10, 1),
        (9.99, 10, 0),
        (-9.99, -9, 0),
        (3e38, 10, 1),
        (-3e38, -10, 1),
    ],
)
def test_clamping_at_the_limit(value, expected, clamped):
    rounded, count = stochastic_round(np.array([value], np.float32), 0, b"\0\0", 10)

    assert (rounded.tolist(), count) == ([expected], clamped)


def test_a_value_beyond_float32_is_clamped():
    rounded, count = stochastic_round(np.array([1e30, -1e30], np.float32), 100, bytes(4), 7)

    assert (rounded.tolist(), count) == ([7, -7], 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_rounded(bad):
    with pytest.raises(NonFiniteUpdateError):
        stochastic_round(np.array([1.0, bad], np.float32), 0, bytes(4), 10)


def test_wrong_arguments_of_rounding():
    x = np.zeros(2, np.float32)

    with pytest.raises(ValueError, match="4 bytes of dither"):
        stochastic_round(x, 0, bytes(3), 10)
    with pytest.raises(ValueError, match="limit"):
        stochastic_round(x, 0, bytes(4), 2**23)


def test_nothing_rounds_to_nothing():
    rounded, clamped = stochastic_round(np.zeros(0, np.float32), 0, b"", 10)

    assert (rounded.size, clamped) == (0, 0)


# -- clip and weight -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "clip", "factor"),
    [
        (5.0, None, 1.0),
        (0.0, 1.0, 1.0),
        (0.5, 1.0, 1.0 - 2**-20),
        (4.0, 1.0, 0.25 * (1.0 - 2**-20)),
    ],
)
def test_the_clip_factor(norm, clip, factor):
    assert clip_factor(norm, clip) == factor


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_norm_that_is_none(norm):
    with pytest.raises(ValueError, match="norm"):
        clip_factor(norm, 1.0)


def test_a_clipped_update_is_within_the_norm_even_in_float32():
    """The slack of 2**-20 is for this."""
    rng = np.random.default_rng(5)
    for scale in (1e-2, 1.0, 1e3):
        x = (rng.standard_normal(10_001) * scale).astype(np.float32)
        factor = np.float32(clip_factor(float(np.linalg.norm(x.astype(np.float64))), 0.7))
        clipped = (x * factor).astype(np.float64)

        assert 0.7 * (1 - 2**-18) < np.linalg.norm(clipped) <= 0.7


@pytest.mark.parametrize(
    ("tokens", "cap", "units"),
    [(0, None, 65536), (5, None, 65536), (0, 100, 1), (50, 100, 32768), (100, 100, 65536),
     (101, 100, 65536), (1, 10**9, 1), (1, 3, 21845)],
)  # fmt: skip
def test_weights(tokens, cap, units):
    assert weight_units(tokens, cap) == units


def test_weights_of_nonsense():
    with pytest.raises(ValueError, match="cap"):
        weight_units(1, 0)
    with pytest.raises(ValueError, match="not negative"):
        weight_units(-1, 5)


# -- the whole vector ----------------------------------------------------------------------------

MANIFEST = manifest_of(embed=(700, 100), norm=(5,), head=(CHUNK,), bias=(9,))
LAYOUT = VectorLayout.of(MANIFEST, ["embed", "head", "bias"], METRICS)  # two chunks, no "norm"
SCALES = first_scales(MANIFEST, bound=0.05, ring=RING, nodes=4)


def update(layout: VectorLayout = LAYOUT, *, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(layout.model_coordinates) * scale).astype(np.float32)


def expected_integers(delta, layout, scales, *, limit, seed, factor=1.0) -> list[int]:
    """Every coordinate on its own, by the plain reading of the specification."""
    dither = np.frombuffer(dither_stream(seed, 0, delta.size), "<u2").tolist()
    clamped, out = 0, []
    for block in layout.blocks():
        multiplier = reference.f32(factor) * 2.0 ** int(scales.exponents[block.number])
        for at in range(block.start, block.stop):
            value = reference.f32(float(delta[at]) * multiplier)
            q, beyond = reference.round_one(value, dither[at], limit)
            out.append(q)
            clamped += beyond
    metrics = site_metrics(layout) | {"clamped": clamped}
    return out + [limb for name in layout.metrics for limb in reference.limbs(metrics[name])]


@pytest.mark.parametrize("bits", [16, 20, 24])
@pytest.mark.parametrize("scale", [0.01, 0.1])  # the second clamps
def test_a_vector_is_what_the_specification_says(bits, scale):
    ring = Ring(bits)
    manifest = manifest_of(a=(40, 10), b=(), c=(301,))
    layout = VectorLayout.of(manifest, "all", METRICS)
    scales = first_scales(manifest, bound=0.1, ring=ring, nodes=3)
    delta = update(layout, scale=scale)
    packed = encode(delta, layout, scales, ring, roster=3, seed=SEED)
    expected = expected_integers(delta, layout, scales, limit=ring.clamp_limit(3), seed=SEED)

    assert packed == reference.pack_vector(expected, bits)
    clamped = decode_metrics(integers(packed, layout, ring)[-48:], METRICS)["clamped"]
    assert (clamped > 0) == (scale == 0.1), "both cases are reached"


def test_later_chunks_go_on_where_the_first_ended():
    """Two chunks, by arithmetic on the whole vector in float64, where it is exact."""
    delta = update()
    layout, scales = LAYOUT, SCALES
    exponents = np.concatenate(
        [np.full(b.stop - b.start, scales.exponents[b.number]) for b in layout.blocks()]
    )
    value = delta.astype(np.float64) * 2.0**exponents
    dither = np.frombuffer(dither_stream(SEED, 0, delta.size), "<u2")
    expected = np.floor(value) + (dither < 65536 * (value - np.floor(value)))
    packed = encode(delta, layout, scales, RING, roster=4, seed=SEED)

    assert np.abs(value).max() < RING.clamp_limit(4)
    assert np.array_equal(integers(packed, layout, RING)[: delta.size], expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_bytes(threads):
    delta = update()

    assert encode(delta, LAYOUT, SCALES, RING, roster=4, seed=SEED) == encode(
        delta, LAYOUT, SCALES, RING, roster=4, seed=SEED, threads=threads
    )


def test_another_seed_rounds_otherwise_but_never_by_more_than_one():
    delta = update()
    one = integers(encode(delta, LAYOUT, SCALES, RING, roster=4, seed=SEED), LAYOUT, RING)
    two = integers(encode(delta, LAYOUT, SCALES, RING, roster=4, seed=bytes(32)), LAYOUT, RING)

    assert 0 < np.abs(one - two).max() <= 1


def test_a_mapped_file_and_a_constant_without_memory(tmp_path):
    delta = update()
    delta.tofile(tmp_path / "delta.f32")
    mapped = np.memmap(tmp_path / "delta.f32", "<f4", "r")
    constant = np.broadcast_to(np.float32(0.01), delta.shape)

    assert encode(mapped, LAYOUT, SCALES, RING, roster=4) == encode(
        delta, LAYOUT, SCALES, RING, roster=4
    )
    assert encode(constant, LAYOUT, SCALES, RING, roster=4) == encode(
        constant.copy(), LAYOUT, SCALES, RING, roster=4
    )


@pytest.mark.parametrize("ring", [Ring(16), Ring(20), Ring(24)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_masks_that_cancel_leave_the_sum_bit_for_bit(ring, threads):
    """Two nodes, one pairwise mask: added by the one, taken off by the other."""
    scales = first_scales(MANIFEST, bound=0.05, ring=ring, nodes=2)
    mask = np.random.default_rng(9).integers(0, 2**32, LAYOUT.coordinates, dtype=np.uint32)
    plain = [
        integers(encode(update(seed=s), LAYOUT, scales, ring, roster=2, seed=SEED), LAYOUT, ring)
        for s in (1, 2)
    ]

    def add(chunk, start, lanes):
        lanes += mask[start : start + lanes.size]

    def take(chunk, start, lanes):
        assert start == chunk * CHUNK
        lanes -= mask[start : start + lanes.size]

    masked = [
        integers(
            encode(
                update(seed=s), LAYOUT, scales, ring, roster=2, seed=SEED, mask_adder=f,
                threads=threads,
            ),
            LAYOUT,
            ring,
        )
        for s, f in ((1, add), (2, take))
    ]  # fmt: skip

    assert np.array_equal(ring.centre(sum(masked)), ring.centre(sum(plain)))
    for with_mask, without in zip(masked, plain, strict=True):
        # The limbs of metrics are masked like everything else.
        assert (with_mask != without).mean() > 0.99
        assert (with_mask[-48:] != without[-48:]).any()


def test_noise_is_added_to_the_model_and_not_to_metrics():
    seen = []

    def noise(chunk, start, lanes):
        seen.append((chunk, start, lanes.size))
        lanes += 1000

    plain = integers(encode(update(), LAYOUT, SCALES, RING, roster=4), LAYOUT, RING)
    noisy = integers(encode(update(), LAYOUT, SCALES, RING, roster=4, noise=noise), LAYOUT, RING)
    model = LAYOUT.model_coordinates

    assert (noisy[:model] - plain[:model] == 1000).all()
    assert np.array_equal(noisy[model:], plain[model:])
    assert seen == [(0, 0, CHUNK), (1, CHUNK, model - CHUNK)]


@pytest.mark.parametrize("tail", [-48, -47, -20, -1, 0, 1])
def test_metrics_that_straddle_a_chunk_count_all_that_was_clamped(tail):
    manifest = manifest_of(w=(CHUNK + tail,))
    layout = VectorLayout.of(manifest, "all", METRICS)
    scales = fixed_scales(manifest, 0)
    delta = np.full(CHUNK + tail, 1000.0, np.float32)
    chunks = []
    report = encode_vector(
        delta,
        layout,
        scales,
        weight_units=65536,
        clip_factor=1.0,
        metrics=site_metrics(layout),
        seed=SEED,
        ring=RING,
        limit=10,
        sink=chunks.append,
    )
    out = integers(b"".join(chunks), layout, RING)

    assert (out[: CHUNK + tail] == 10).all()
    assert report.clamped == CHUNK + tail == report.metrics["clamped"]
    assert decode_metrics(out[CHUNK + tail :], METRICS)["clamped"] == CHUNK + tail


def test_a_round_without_tensors_sends_its_metrics():
    layout = VectorLayout.of(MANIFEST, "none", METRICS)
    metrics = site_metrics(layout, tokens=123_456_789_012)
    packed = encode(np.zeros(0, np.float32), layout, SCALES, RING, roster=4, metrics=metrics)

    assert decode_metrics(integers(packed, layout, RING), METRICS) == metrics


def test_the_look_ahead_measures_what_will_be_sent():
    chunks = []

    def run(sink):
        return encode_vector(
            update(),
            LAYOUT,
            SCALES,
            weight_units=65536,
            clip_factor=1.0,
            metrics=site_metrics(LAYOUT),
            seed=SEED,
            ring=RING,
            limit=RING.clamp_limit(4),
            sink=sink,
            measure_squares=True,
        )

    ahead, real = run(lambda _: None), run(chunks.append)
    sent = integers(b"".join(chunks), LAYOUT, RING)[: LAYOUT.model_coordinates].astype(object)

    assert ahead == real
    assert ahead.sum_squares == (sent * sent).sum()


def test_weight_and_clip_multiply_the_update():
    layout = VectorLayout.of(manifest_of(w=(4,)), "all", METRICS)
    packed = encode(
        np.array([1.0, -1.0, 0.5, 0.25], np.float32),
        layout,
        fixed_scales(MANIFEST, 4),
        RING,
        roster=4,
        weight=32768,
        clip_factor=0.5,
        seed=bytes(32),
    )

    assert integers(packed, layout, RING)[:4].tolist() == [4, -4, 2, 1]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("at", "name"), [(0, "embed"), (69_999, "embed"), (70_000, "head"), (CHUNK + 70_008, "bias")]
)
def test_an_update_that_is_not_finite_names_its_tensor(bad, at, name):
    delta = update()
    delta[at] = bad

    with pytest.raises(NonFiniteUpdateError, match=f"tensor {name} holds NaN or infinity"):
        check_finite(delta, LAYOUT)
    with pytest.raises(NonFiniteUpdateError, match=f"tensor {name} "):
        encode(delta, LAYOUT, SCALES, RING, roster=4)


def test_a_finite_update_has_its_norm():
    delta = update()

    assert check_finite(delta, LAYOUT) == pytest.approx(
        np.linalg.norm(delta.astype(np.float64)), rel=1e-12
    )
    largest = np.full(LAYOUT.model_coordinates, np.finfo(np.float32).max)
    assert math.isfinite(check_finite(largest, LAYOUT))


@pytest.mark.parametrize(
    ("clause", "change", "error"),
    [
        ("3.1 one coordinate short", {"delta": update()[:-1]}, ManifestMismatchError),
        ("3.1 float64", {"delta": update().astype(np.float64)}, ManifestMismatchError),
        ("3.1 too few scales", {"scales": fixed_scales(LAYOUT, 3)}, ManifestMismatchError),
        ("3.2 weight 0", {"weight_units": 0}, ValueError),
        ("3.2 weight above 1", {"weight_units": 65537}, ValueError),
        ("3.2 clip factor 0", {"clip_factor": 0.0}, ValueError),
        ("3.2 clip factor NaN", {"clip_factor": math.nan}, ValueError),
        ("3.2 clip factor above 1", {"clip_factor": 1.1}, ValueError),
        ("3.4 a limit beyond half the ring", {"limit": 2**19}, ValueError),
        ("3.4 a limit of 0", {"limit": 0}, ValueError),
        ("3.3 a short seed", {"seed": bytes(31)}, ValueError),
        ("6.1 a metric is missing", {"metrics": {"weight": 1}}, MalformedMessageError),
    ],
)
def test_refused(clause, change, error):
    sent = []
    arguments = {
        "delta": update(),
        "layout": LAYOUT,
        "scales": SCALES,
        "weight_units": 65536,
        "clip_factor": 1.0,
        "metrics": site_metrics(LAYOUT),
        "seed": SEED,
        "ring": RING,
        "limit": 10,
        "sink": sent.append,
    } | change

    with pytest.raises(error):
        encode_vector(**arguments)
    assert sent == []


def test_a_seed_does_not_print():
    from protocols.tensors.encode import _Job

    names = {field for field, spec in _Job.__dataclass_fields__.items() if not spec.repr}

    assert "seed" in names
