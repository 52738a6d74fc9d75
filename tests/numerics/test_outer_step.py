"""The outer step: algebraic identities, the plain reading of the specification, refusals."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from protocols.errors import (
    IntegrityError,
    ManifestMismatchError,
    NonFiniteUpdateError,
    PlanRefusedError,
    WrappedSumError,
)
from protocols.outer_step import next_snapshot, optimizer_for
from protocols.plan import Outer, Scale
from protocols.tensors import (
    CHUNK,
    PackedVector,
    Ring,
    Scales,
    Snapshot,
    VectorLayout,
    accumulate,
    blob_digest,
    encode_metrics,
    first_scales,
    fixed_scales,
    metric_names,
    pack,
    packed_offset,
    unpack,
)
from tests.support import tensors_reference as reference
from tests.support.tensors import (
    METRICS,
    encode,
    manifest_of,
    outer_step,
    reader_of,
    site_metrics,
)

RING = Ring(20)
NESTEROV = Outer(optimizer="nesterov", lr=0.7, momentum=0.9)
# Tensors that begin and end inside chunks, blocks and units; two units of theta.
WIDE = manifest_of(embed=(3, 100_000), norm=(7,), head=(CHUNK + 500,), tail=(600_000,), bias=())
SMALL = manifest_of(w=(5, 4), rest=(3,), b=(7,))


def normal(size: int, *, seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def total(vectors: list[bytes], layout: VectorLayout, ring: Ring = RING) -> bytes:
    return b"".join(accumulate([reader_of(data) for data in vectors], layout, ring))


def sum_vector(
    values: list[int], layout: VectorLayout, ring: Ring, *, sites: int, limb: int = 0, **metrics
) -> bytes:
    """A packed sum of given model integers, and the metrics of ``sites`` sites of weight 1.

    ``limb`` is added to the last limb.
    """
    wanted = site_metrics(layout) | {"weight": 65536 * sites, "nodes": sites} | metrics
    limbs = encode_metrics(wanted, layout.metrics)
    limbs[-1] += limb
    lanes = np.concatenate([np.array(values, np.int32), limbs])
    return b"".join(pack(lanes[at : at + CHUNK], ring) for at in range(0, lanes.size, CHUNK))


def one_site(manifest, select, delta_scale=0.01, *, ring=RING, roster=1, **options):
    """One site's round; what a round of one site returns, and theta, delta and scales."""
    layout = VectorLayout.of(manifest, select, METRICS)
    theta = normal(manifest.coordinates, seed=1)
    delta = normal(layout.model_coordinates, seed=2, scale=delta_scale)
    scales = first_scales(manifest, bound=6 * delta_scale, ring=ring, nodes=roster)
    packed = encode(delta, layout, scales, ring, roster=roster)
    result, files = outer_step(
        packed, manifest=manifest, layout=layout, theta=theta, scales=scales, ring=ring,
        nodes=1, roster=roster, **options,
    )  # fmt: skip
    return layout, theta, delta, scales, result, files


# -- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_one_site_with_rate_1_gives_plain_local_training(bits):
    """theta + delta, to one step of the ring and the rounding of float32."""
    ring = Ring(bits)
    _, theta, delta, scales, result, files = one_site(WIDE, "all", ring=ring)
    step = 2.0 ** -int(scales.exponents[0])
    error = np.abs(files["theta"].astype(np.float64) - (theta.astype(np.float64) + delta))

    assert error.max() < step + 2.0**-22  # |theta| < 8, so float32 rounds by at most 2**-22
    assert error.max() > step / 4, "the bound is not far from the truth"
    assert result.norm == pytest.approx(np.linalg.norm(delta.astype(np.float64)), rel=1e-3)
    assert result.metrics["nodes"] == 1
    assert result.counters == {"steps": 1}


def test_the_identity_convicts_an_update_that_is_counted_twice():
    """A planted mistake: the same vector added twice, its weight once."""
    layout, theta, delta, scales, *_ = one_site(SMALL, "all")
    packed = encode(delta, layout, scales, RING, roster=2)
    # The metric ``nodes`` is 2 in that sum; the survivors' list says 1.
    with pytest.raises(IntegrityError, match="counts 2 nodes, but 1 survived"):
        outer_step(
            total([packed, packed], layout), manifest=SMALL, layout=layout, theta=theta,
            scales=scales, ring=RING, nodes=1, roster=2,
        )  # fmt: skip


def test_identical_sites_are_one_site():
    """A mean of equal updates is the update, whatever the number of sites."""
    layout = VectorLayout.of(SMALL, "all", METRICS)
    theta, delta = normal(SMALL.coordinates, seed=1), normal(SMALL.coordinates, seed=2, scale=0.01)
    models = []
    for nodes in (1, 2, 4, 8):
        scales = fixed_scales(SMALL, 12)
        vectors = [encode(delta, layout, scales, RING, roster=8) for _ in range(nodes)]
        _, files = outer_step(
            total(vectors, layout), manifest=SMALL, layout=layout, theta=theta, scales=scales,
            ring=RING, nodes=nodes, roster=8,
        )  # fmt: skip
        models.append(files["theta"].tobytes())

    assert len(set(models)) == 1


def test_weights_weigh():
    """Two sites at +1 and -1 with weights 1 and 1/2: the mean is (1 - 1/2) / (3/2) = 1/3."""
    layout = VectorLayout.of(SMALL, "all", METRICS)
    scales, ones = fixed_scales(SMALL, 10), np.ones(SMALL.coordinates, np.float32)
    vectors = [
        encode(ones, layout, scales, RING, roster=2),
        encode(-ones, layout, scales, RING, roster=2, weight=32768),
    ]
    result, files = outer_step(
        total(vectors, layout), manifest=SMALL, layout=layout, theta=np.zeros_like(ones),
        scales=scales, ring=RING, nodes=2,
    )  # fmt: skip

    assert result.weight_sum_units == 65536 + 32768
    assert np.allclose(files["theta"], 1 / 3, rtol=1e-6)


def test_the_order_of_the_sites_does_not_matter_bit_for_bit():
    layout = VectorLayout.of(WIDE, "all", METRICS)
    theta = normal(WIDE.coordinates, seed=1)
    scales = first_scales(WIDE, bound=0.05, ring=RING, nodes=3)
    vectors = [
        encode(normal(layout.model_coordinates, seed=s, scale=0.01), layout, scales, RING, roster=3)
        for s in (10, 11, 12)
    ]
    roots = set()
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        result, _ = outer_step(
            total([vectors[i] for i in order], layout), manifest=WIDE, layout=layout, theta=theta,
            scales=scales, ring=RING, nodes=3, outer=NESTEROV,
        )  # fmt: skip
        roots.add((result.theta_root, result.buffer_roots["momentum"], result.next_scales))

    assert len(roots) == 1


@pytest.mark.parametrize("outer", [Outer(), Outer(lr=0.5), NESTEROV], ids=lambda o: o.optimizer)
def test_threads_and_kinds_of_reader_do_not_matter(outer, tmp_path):
    layout, theta, delta, scales, first, files = one_site(WIDE, "all", outer=outer)
    packed = encode(delta, layout, scales, RING, roster=1)
    theta.tofile(tmp_path / "theta.f32")
    mapped = np.memmap(tmp_path / "theta.f32", "<f4", "r")
    read = reader_of(theta.tobytes())

    def chunk(index):
        start, stop = layout.chunk(index)
        offset, size = packed_offset(index, RING), RING.bytes_per_chunk(stop - start)
        return unpack(packed[offset : offset + size], stop - start, RING)

    for source, options in (
        (packed, {"theta": mapped, "threads": 3}),
        (chunk, {"theta": mapped}),
        (chunk, {"theta": read, "threads": 2}),
        (PackedVector(packed, layout.coordinates, RING), {"theta": read}),
        (PackedVector(reader_of(packed), layout.coordinates, RING), {"theta": read, "threads": 2}),
    ):
        result, again = outer_step(
            source, manifest=WIDE, layout=layout, scales=scales, ring=RING,
            nodes=1, outer=outer, **options,
        )  # fmt: skip
        assert result == first
        assert np.array_equal(again["theta"].view("u4"), files["theta"].view("u4"))


@pytest.mark.parametrize("outer", [Outer(), NESTEROV], ids=lambda o: o.optimizer)
def test_what_was_not_exchanged_stays_bit_for_bit(outer):
    buffers = {"momentum": normal(WIDE.coordinates, seed=5)} if outer is NESTEROV else {}
    layout, theta, _, scales, result, files = one_site(
        WIDE, ["norm", "tail"], outer=outer, buffers=buffers
    )
    rests = np.ones(WIDE.coordinates, bool)
    for segment in layout.segments:
        rests[segment.start : segment.stop] = False

    for name, before in (("theta", theta), *buffers.items()):
        after = files[name]
        assert np.array_equal(after[rests].view("u4"), before[rests].view("u4")), name
        assert (after[~rests] != before[~rests]).mean() > 0.99, "the rest did move"
    touched = {block.number for block in layout.blocks()}
    for number, (old, new) in enumerate(
        zip(scales.exponents, result.next_scales.exponents, strict=True)
    ):
        assert (old == new) or number in touched
    assert (result.next_scales.exponents != scales.exponents).any()


@pytest.mark.parametrize("rests", ["w", "rest", "b"])  # at the beginning, in the middle, at the end
def test_signs_of_zero_and_odd_bits_of_resting_tensors_survive(rests):
    """A copy, not an addition of 0: -0.0 and subnormals come through."""
    theta = np.zeros(SMALL.coordinates, np.float32)
    segment = SMALL.segment(rests)
    theta[segment.start :][:3] = [-0.0, 1e-45, -1e-45]
    layout = VectorLayout.of(SMALL, {"w", "rest", "b"} - {rests}, METRICS)
    _, files = outer_step(
        sum_vector([0] * layout.model_coordinates, layout, RING, sites=1), manifest=SMALL,
        layout=layout, theta=theta, scales=fixed_scales(SMALL, 5), ring=RING, nodes=1,
    )  # fmt: skip
    kept = slice(segment.start, segment.stop)

    assert files["theta"][kept].tobytes() == theta[kept].tobytes()


# -- against the plain reading -------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 20, 24])
@pytest.mark.parametrize("outer", [Outer(), Outer(lr=0.3), NESTEROV], ids=str)
def test_two_rounds_are_what_the_specification_says(bits, outer):
    ring, nodes, rng = Ring(bits), 3, np.random.default_rng(bits)
    layout = VectorLayout.of(SMALL, ["w", "b"], METRICS)
    theta, momentum = normal(SMALL.coordinates, seed=1), np.zeros(SMALL.coordinates, np.float32)
    scales = first_scales(SMALL, bound=0.05, ring=ring, nodes=nodes)
    rule = Scale(k_permille=9000, floor=1e-6)
    limit = ring.clamp_limit(nodes)
    for steps in (0, 1):
        sums = rng.integers(-nodes * limit, nodes * limit + 1, layout.model_coordinates).tolist()
        weight = int(rng.integers(nodes, nodes * 65536))
        result, files = outer_step(
            sum_vector(sums, layout, ring, sites=nodes, weight=weight),
            manifest=SMALL, layout=layout, theta=theta, scales=scales, ring=ring, nodes=nodes,
            outer=outer, buffers={"momentum": momentum}, steps=steps, rule=rule,
        )  # fmt: skip
        new_theta, new_momentum, exponents = theta.copy(), momentum.copy(), []
        squares = 0.0
        for block in layout.blocks():
            part = sums[block.start : block.stop]
            e = int(scales.exponents[block.number])
            for offset, s in enumerate(part):
                at = block.theta_start + offset
                mean = reference.mean_of(s, exponent=e, weight_units=weight)
                squares += (s * 2.0**-e * 65536 / weight) ** 2
                if outer.optimizer == "average":
                    new_theta[at] = reference.average(float(theta[at]), mean, outer.lr)
                else:
                    new_theta[at], new_momentum[at] = reference.nesterov(
                        float(theta[at]), float(momentum[at]), mean, outer.lr, outer.momentum
                    )
            exponents.append(
                reference.next_exponent(
                    part, old=e, weight_units=weight, k_permille=9000, floor=1e-6, limit=limit
                )
            )

        assert np.array_equal(files["theta"].view("u4"), new_theta.view("u4"))
        assert result.theta_root == reference.blob_name(new_theta.tobytes())
        if outer is NESTEROV:
            assert np.array_equal(files["momentum"].view("u4"), new_momentum.view("u4"))
            assert result.buffer_roots == {"momentum": reference.blob_name(new_momentum.tobytes())}
        assert result.next_scales.exponents[[0, 2]].tolist() == exponents
        assert result.next_scales.exponents[1] == scales.exponents[1]
        assert result.norm == pytest.approx(math.sqrt(squares), rel=1e-12)
        assert result.max_abs == max(abs(s) for s in sums)
        theta, momentum, scales = new_theta, new_momentum, result.next_scales


def test_the_reference_convicts_another_order_of_operations():
    """A planted mistake, S * 65536 / W * lr / 2**e in one go, differs in some last bits."""
    differ = 0
    for s in range(1, 400):
        right = reference.average(1e-3, reference.mean_of(s, exponent=13, weight_units=99_991), 0.3)
        wrong = reference.f32(1e-3 + reference.f32(s * 65536 / 99_991 * 0.3 / 2**13))
        differ += right != wrong

    assert differ > 0


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_nesterov_is_torchs(momentum):
    """Same pseudo-gradient, 20 steps: equal to 1e-6, as SGD(nesterov=True) defines it."""
    manifest = manifest_of(w=(1000,))
    layout = VectorLayout.of(manifest, "all", METRICS)
    theta = normal(1000, seed=1)
    weights = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = torch.optim.SGD([weights], lr=0.4, momentum=momentum, nesterov=True)
    scales, buffers = fixed_scales(manifest, 16), {}
    outer = Outer(optimizer="nesterov", lr=0.4, momentum=momentum)
    for step in range(20):
        sums = np.random.default_rng(step).integers(-2000, 2000, 1000)
        _, files = outer_step(
            sum_vector(sums.tolist(), layout, RING, sites=1), manifest=manifest, layout=layout,
            theta=theta, scales=scales, ring=RING, nodes=1, outer=outer, buffers=buffers,
            steps=step, rule=Scale(mode="fixed", exponent=16),
        )  # fmt: skip
        weights.grad = torch.from_numpy((-sums / 2**16).astype(np.float32))
        optimizer.step()
        theta, buffers = files["theta"].copy(), {"momentum": files["momentum"].copy()}

    moved = np.abs(theta - normal(1000, seed=1)).max()
    assert np.abs(theta - weights.detach().numpy()).max() < 1e-6
    assert moved > 1e-2


def test_torch_convicts_momentum_without_nesterov():
    """The comparison above can fail: plain momentum is another thing."""
    gradient, v, w = 1.0, 0.0, 0.0
    nesterov, _ = reference.nesterov(w, v, -gradient, 0.4, 0.9)

    assert abs(nesterov - (w - 0.4 * (0.9 * v + gradient))) > 0.1


# -- snapshots and rounds without tensors ---------------------------------------------------------


def test_the_next_snapshot_names_what_was_written():
    _, theta, _, scales, result, files = one_site(SMALL, "all", outer=NESTEROV)
    start = Snapshot.initial(SMALL, blob_digest(theta.tobytes()), scales)
    after = next_snapshot(start, result)

    assert after.round == 1
    assert after.theta == blob_digest(files["theta"].tobytes())
    assert after.buffers == {"momentum": blob_digest(files["momentum"].tobytes())}
    assert after.scales == blob_digest(result.next_scales.to_bytes())
    assert after.counters == {"steps": 1}
    assert after.manifest == SMALL.digest
    assert after.model_root != start.model_root


def test_units_are_hashed_as_they_are_written():
    *_, result, files = one_site(WIDE, "all")
    data = files["theta"].tobytes()
    units = [data[at : at + 4 * 2**20] for at in range(0, len(data), 4 * 2**20)]

    assert len(units) == 2
    assert result.unit_hashes["theta"] == tuple(
        hashlib.sha256(b"\0" + unit).digest() for unit in units
    )


def test_a_round_of_metrics_leaves_the_model_alone():
    names = metric_names(["es"])
    layout = VectorLayout.of(SMALL, "none", names)
    scales = fixed_scales(SMALL, 3)
    metrics = [
        site_metrics(layout, tokens=7, **{"nll_millinats/es": 10**13 + k, "bytes/es": 5})
        for k in range(3)
    ]
    vectors = [
        encode(np.zeros(0, np.float32), layout, scales, RING, roster=3, metrics=m) for m in metrics
    ]
    theta = normal(SMALL.coordinates, seed=1)
    result, files = outer_step(
        total(vectors, layout), manifest=SMALL, layout=layout, theta=theta, scales=scales,
        ring=RING, nodes=3, outer=NESTEROV,
    )  # fmt: skip
    start = Snapshot.initial(SMALL, blob_digest(theta.tobytes()), scales)
    after = next_snapshot(start, result)

    assert files.data == {}
    assert result.theta_root is None
    assert (result.metrics["tokens"], result.metrics["bytes/es"]) == (21, 15)
    assert result.metrics["nll_millinats/es"] == 3 * 10**13 + 3
    assert (after.round, after.theta, after.scales, after.counters) == (
        1, start.theta, start.scales, start.counters,
    )  # fmt: skip


def test_fixed_scales_stay():
    *_, scales, result, _ = one_site(SMALL, "all", rule=Scale(mode="fixed", exponent=3))

    assert result.next_scales == scales


def test_missing_buffers_are_zeros():
    layout, theta, delta, scales, first, _ = one_site(SMALL, "all", outer=NESTEROV)
    second, _ = outer_step(
        encode(delta, layout, scales, RING, roster=1), manifest=SMALL, layout=layout, theta=theta,
        scales=scales, ring=RING, nodes=1, outer=NESTEROV,
        buffers={"momentum": np.zeros(SMALL.coordinates, np.float32)},
    )  # fmt: skip

    assert first == second


# -- refusals ------------------------------------------------------------------------------------

LAYOUT = VectorLayout.of(SMALL, "all", METRICS)
LIMIT = RING.clamp_limit(4)


def given_sum(top: int = 1, **metrics: int) -> bytes:
    return sum_vector([0] * 29 + [top], LAYOUT, RING, sites=3, **metrics)


def attempt(packed: bytes, **changes):
    arguments = {
        "manifest": SMALL,
        "layout": LAYOUT,
        "theta": normal(SMALL.coordinates, seed=1),
        "scales": fixed_scales(SMALL, 5),
        "ring": RING,
        "nodes": 3,
        "roster": 4,
    } | changes
    return outer_step(packed, **arguments)


@pytest.mark.parametrize(
    ("clause", "packed", "changes", "error"),
    [
        ("8.2 a node too many", given_sum(nodes=4), {}, IntegrityError),
        ("8.2 a node too few", given_sum(nodes=2), {}, IntegrityError),
        ("8.2 no weight", given_sum(weight=0), {}, WrappedSumError),
        ("8.2 less weight than nodes", given_sum(weight=2), {}, WrappedSumError),
        ("8.2 more weight than nodes", given_sum(weight=3 * 65536 + 1), {}, WrappedSumError),
        ("8.2 a limb too large", given_sum(limb=3 * 255 + 1), {}, WrappedSumError),
        ("8.2 a negative limb", given_sum(limb=-1), {}, WrappedSumError),
        ("8.3 above the clamp", given_sum(3 * LIMIT + 1), {}, WrappedSumError),
        ("8.3 below the clamp", given_sum(-3 * LIMIT - 1), {}, WrappedSumError),
        ("8.3 noise", given_sum(RING.noisy_limit() + 1), {"noisy": True}, WrappedSumError),
        ("8.1 a short sum", given_sum()[:-1], {}, ValueError),
        ("8.1 scales", given_sum(), {"scales": Scales(np.ones(1))},
         ManifestMismatchError),
        ("8.1 theta", given_sum(), {"theta": np.zeros(5, np.float32)}, ManifestMismatchError),
        ("8.1 a short file of theta", given_sum(), {"theta": reader_of(bytes(4 * 29))},
         ManifestMismatchError),
        ("8.1 a short file of a buffer", given_sum(),
         {"outer": NESTEROV, "buffers": {"momentum": reader_of(bytes(4 * 29))}},
         ManifestMismatchError),
        ("8.1 float64", given_sum(), {"theta": np.zeros(30)}, ManifestMismatchError),
        ("8.1 a buffer", given_sum(),
         {"outer": NESTEROV, "buffers": {"momentum": np.zeros(5, np.float32)}},
         ManifestMismatchError),
        ("8.5 overflow", given_sum(),
         {"scales": fixed_scales(SMALL, -100), "outer": Outer(lr=1e12)},
         NonFiniteUpdateError),
        ("8.5 theta is NaN", given_sum(), {"theta": np.full(30, np.nan, np.float32)},
         NonFiniteUpdateError),
    ],
)  # fmt: skip
def test_refused(clause, packed, changes, error):
    with pytest.raises(error):
        attempt(packed, **changes)


@pytest.mark.parametrize(
    ("top", "noisy"), [(3 * LIMIT, False), (-3 * LIMIT, False), (RING.noisy_limit(), True)]
)
def test_the_limit_itself_is_not_refused(top, noisy):
    result, _ = attempt(given_sum(top), noisy=noisy)

    assert result.max_abs == abs(top)


def test_all_sites_at_the_clamp_are_no_wrap():
    """An honest round in which every site clamps everywhere is at the edge, and is released."""
    scales = fixed_scales(SMALL, 30)
    vectors = [
        encode(np.full(30, sign, np.float32), LAYOUT, scales, RING, roster=3) for sign in (1, 1, 1)
    ]
    result, _ = attempt(total(vectors, LAYOUT), scales=scales, roster=3)

    assert result.max_abs == 3 * RING.clamp_limit(3) > RING.noisy_limit()
    assert result.metrics["clamped"] == 90


def test_other_optimizers_do_not_exist():
    with pytest.raises(PlanRefusedError) as caught:
        optimizer_for(Outer.model_construct(optimizer="adam"))

    assert caught.value.rule == "outer.optimizer.unknown"


def test_a_layout_without_the_weight_is_a_mistake():
    layout = VectorLayout.of(SMALL, "all", ("tokens",))
    packed = pack(np.zeros(36, np.int32), RING)

    with pytest.raises(ValueError, match="metric weight"):
        attempt(packed, layout=layout)
