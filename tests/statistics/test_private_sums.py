"""Sums as they are opened in the private modes: the noise that is charged is there.

Vectors are made by the node's own code, with masks that are zero; then any subset can be summed,
as after lost nodes. Noise of the smallest sum that may be opened, without the colluders' shares, is
accepted at the scale that is charged and rejected at 2/3 and 3/2 of it.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent.contribution import LocalWork, Terms, make_contribution
from policies.privacy.terms import noise_terms
from protocols.errors import MalformedMessageError, PlanRefusedError, WrappedSumError
from protocols.identifiers import NodeId, RoundId
from protocols.noise.rounding import MOST_DRAWS
from protocols.outer_step import apply_outer_step
from protocols.round_vector import round_layout, round_ring
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.metrics import decode_metrics
from protocols.tensors.planar import PackedVector, accumulate
from protocols.tensors.scales import fixed_scales, initial_scales
from tests.statistics.evidence import fits_scale
from tests.support.node import RUN
from tests.support.private_plans import private_plan

N, THRESHOLD, COLLUDERS = 7, 5, 2
D = 30_000
MANIFEST = Manifest((TensorSpec("vector", (D,)),))
NAMES = [f"n{i}" for i in range(N)]
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SECAGG = {
    "threshold": THRESHOLD,
    "colluders": 1,
    "min_surviving": THRESHOLD,
    "keys": {name: f"{i + 1:x}" * 64 for i, name in enumerate(NAMES)},
}
OFF = [Fraction(2, 3), Fraction(3, 2)]
SHARED = ("record-distributed", "institution")
EXPONENT = {"record-distributed": 14, "institution": 9}


def the_plan(mode, **changes):
    return private_plan(
        mode,
        {
            "roster": NAMES,
            "min_participants": THRESHOLD,
            "secagg": SECAGG,
            "privacy.colluders": COLLUDERS,
            "vector": {"ring_bits": 20, "scale": {"mode": "fixed", "exponent": EXPONENT[mode]}},
            "model.manifest": MANIFEST.digest,
            **changes,
        },
    )


def no_masks(_chunk, _start, _lanes) -> None:
    """A secure sum's masks cancel: none at all gives the same sum."""


def send(tmp_path, plan, node, delta, *, attempt=1, scales=None, seed=None):
    """One site's packed vector, by the node's own code."""
    uploads = tmp_path / node
    uploads.mkdir(exist_ok=True)
    secret = seed or hashlib.sha256(f"{node} {attempt}".encode()).digest()
    record = make_contribution(
        LocalWork(
            delta=delta,
            tokens=12345,
            records=99,
            steps=7,
            loss_nats=3.5,
            seconds=2.0,
            evaluation={},
        ),
        terms=Terms(
            plan=plan,
            node=NodeId(node),
            round=RoundId(RUN, 0),
            index=0,
            attempt=attempt,
            model_root=plan.model.initial,
        ),
        manifest=MANIFEST,
        scales=scales or initial_scales(MANIFEST, plan.vector.scale, round_ring(plan), N),
        seed=hashlib.sha256(b"dither" + secret).digest(),
        noise_seed=hashlib.sha256(b"noise" + secret).digest(),
        masks=no_masks,
        signing_key=KEY,
        uploads=uploads,
    )
    return (uploads / record.file).read_bytes()


def summed(plan, vectors):
    """Model integers and metrics of a sum."""
    layout, ring = round_layout(plan, 0, MANIFEST), round_ring(plan)
    readers = [lambda o, size, v=v: v[o : o + size] for v in vectors]
    packed = b"".join(accumulate(readers, layout, ring))
    out = np.empty(layout.coordinates, np.int32)
    PackedVector(packed, layout.coordinates, ring).read_centred(0, layout.coordinates, out)
    metrics = decode_metrics(out[D:], layout.metrics, nodes=len(vectors))
    return out[:D], metrics, packed


def zeros():
    return np.zeros(D, np.float32)


@pytest.mark.parametrize("mode", SHARED)
def test_the_smallest_sum_without_its_colluders_has_the_noise_that_is_charged(tmp_path, mode):
    """n_eff = 5 - 2 honest shares: two nodes were lost, two survivors tell what they added."""
    plan = the_plan(mode)
    terms = noise_terms(plan, D)
    assert terms.shares == THRESHOLD - COLLUDERS
    vectors = [send(tmp_path, plan, name, zeros()) for name in NAMES[: terms.shares]]
    noise, _, _ = summed(plan, vectors)

    charged = float(terms.shares * terms.share_variance)
    assert charged >= plan.privacy.noise_multiplier**2 * terms.sensitivity.l2_squared
    assert fits_scale(noise, charged)
    for factor in OFF:
        assert not fits_scale(noise, charged * float(factor**2))


@pytest.mark.parametrize("mode", SHARED)
def test_full_attendance_has_more_noise_and_is_charged_no_less(tmp_path, mode):
    plan = the_plan(mode)
    variance = float(noise_terms(plan, D).share_variance)
    noise, _, _ = summed(plan, [send(tmp_path, plan, name, zeros()) for name in NAMES])
    assert fits_scale(noise, N * variance)
    assert not fits_scale(noise, noise_terms(plan, D).shares * variance)


@pytest.mark.parametrize("mode", SHARED)
def test_every_attempt_has_noise_and_dither_of_its_own(tmp_path, mode):
    plan, delta = the_plan(mode), np.full(D, 1e-3, np.float32)
    first, again, second = (
        send(tmp_path, plan, "n0", delta, attempt=number) for number in (1, 1, 2)
    )
    assert first == again  # the same vector is sent again byte for byte
    (a, _, _), (b, _, _) = summed(plan, [first]), summed(plan, [second])
    variance = float(noise_terms(plan, D).share_variance)
    assert fits_scale(a - b, 2 * variance + 0.5)  # independent: variances add up


@pytest.mark.parametrize("mode", SHARED)
def test_metrics_tell_nothing_of_the_data(tmp_path, mode):
    """Tokens, losses, seconds, clamped coordinates: constants of the plan, or nothing."""
    plan = the_plan(mode)
    loud = np.full(D, 1e6, np.float32)  # every coordinate is clamped
    _, metrics, _ = summed(plan, [send(tmp_path, plan, "n0", loud)])
    steps = 1 if mode == "record-distributed" else 0
    silent = dict.fromkeys(("tokens", "records", "loss_micronats", "train_ms", "clamped"), 0)
    assert metrics == silent | {"weight": 65_536, "nodes": 1, "steps": steps}


def test_an_institution_is_as_short_as_its_noise_was_made_for(tmp_path):
    """However long the update: with the noise taken off, its integers are within D2."""
    plan = the_plan("institution")
    terms = noise_terms(plan, D)
    rng = np.random.default_rng(5)
    for scale in (1e-6, 1e-2, 1.0, 1e5):
        delta = (rng.normal(size=D) * scale).astype(np.float32)
        seed = hashlib.sha256(str(scale).encode()).digest()
        with_update, _, _ = summed(plan, [send(tmp_path, plan, "n0", delta, seed=seed)])
        noise, _, _ = summed(plan, [send(tmp_path, plan, "n0", zeros(), seed=seed)])
        squares = int(((with_update - noise).astype(np.int64) ** 2).sum())
        assert squares <= terms.sensitivity.l2_squared


def test_one_record_moves_a_sum_by_no_more_than_was_charged(tmp_path):
    """Two neighbours under the same dither and noise differ by a rounding of the record alone."""
    plan = the_plan("record-distributed")
    terms, rng = noise_terms(plan, D), np.random.default_rng(6)
    base = (rng.normal(size=D) * 0.01).astype(np.float32)
    for _ in range(3):
        record = rng.normal(size=D)
        record *= plan.privacy.clip_norm / plan.privacy.expected_batch / np.linalg.norm(record)
        pair = [
            summed(plan, [send(tmp_path, plan, "n0", delta)])[0]
            for delta in (base, (base + record).astype(np.float32))
        ]
        squares = int(((pair[1] - pair[0]).astype(np.int64) ** 2).sum())
        assert 0 < squares <= terms.sensitivity.l2_squared
        thrice = (base + 3 * record).astype(np.float32)  # and the bound is not a loose one
        more = summed(plan, [send(tmp_path, plan, "n0", thrice)])[0] - pair[0]
        assert int((more.astype(np.int64) ** 2).sum()) > terms.sensitivity.l2_squared


@pytest.mark.parametrize("mode", SHARED)
def test_noise_is_not_made_for_other_scales_than_the_plans(tmp_path, mode):
    finer = fixed_scales(MANIFEST, EXPONENT[mode] + 1)
    with pytest.raises(PlanRefusedError) as refused:
        send(tmp_path, the_plan(mode), "n0", zeros(), scales=finer)
    assert refused.value.rule == "privacy.scales"
    assert not list((tmp_path / "n0").iterdir())


def test_an_update_that_never_gets_short_enough_is_not_sent(tmp_path, monkeypatch):
    """The bound is no wish: without a draw that keeps it nothing leaves, after so many tries."""
    tries = []

    def long(*args, **named):
        tries.append(1)
        return 10**12

    monkeypatch.setattr("protocols.noise.rounding._squares", long)
    with pytest.raises(MalformedMessageError, match="nothing was sent"):
        send(tmp_path, the_plan("institution"), "n0", zeros())
    assert len(tries) == MOST_DRAWS
    assert not list((tmp_path / "n0").iterdir())


@pytest.mark.parametrize("mode", SHARED)
def test_a_sum_that_may_have_wrapped_is_refused_with_noise_too(tmp_path, mode):
    """0.9 of half the ring: clamped updates and their noise stay below, a forged sum does not."""
    plan = the_plan(mode)
    layout, ring = round_layout(plan, 0, MANIFEST), round_ring(plan)
    loud = np.full(D, 1e3, np.float32)
    _, _, packed = summed(plan, [send(tmp_path, plan, name, loud) for name in NAMES])
    common = {
        "outer": plan.outer,
        "scale_rule": plan.vector.scale,
        "layout": layout,
        "manifest": MANIFEST,
        "snapshot_counters": {},
        "theta": zeros(),
        "buffers": {},
        "scales": fixed_scales(MANIFEST, EXPONENT[mode]),
        "ring": ring,
        "roster": N,
        "writer": lambda *_: None,
        "noisy": plan.adds_noise,
    }
    result = apply_outer_step(sum_reader=packed, nodes=N, **common)
    assert result.max_abs <= ring.noisy_limit()
    forged = bytearray(packed)
    forged[0:2] = (0x7FFF).to_bytes(2, "little")  # with the nibble below: 0x77fff of 0x80000
    nibbles = 2 * min(layout.coordinates, 2**18)
    forged[nibbles] = (forged[nibbles] & 0xF0) | 0x7
    with pytest.raises(WrappedSumError):
        apply_outer_step(sum_reader=bytes(forged), nodes=N, **common)
