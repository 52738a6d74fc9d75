"""Conditional rounding and the sensitivity it makes true."""

from __future__ import annotations

import hashlib
import hmac
import math
from fractions import Fraction

import numpy as np
import pytest

from policies.privacy.sensitivity import (
    IntegerSensitivity,
    Relation,
    Unit,
    institution_update,
    record_in_sum,
    scaled_clip,
)
from protocols.errors import CorruptStateError, MalformedMessageError, PlanRefusedError
from protocols.noise import rounding
from protocols.noise.noise_table import NoiseShare, NoiseTable
from protocols.noise.rounding import MOST_DRAWS, AcceptedDraw, draw_seed, encode_bounded, find_draw
from protocols.tensors import Ring, VectorLayout, encode_vector, fixed_scales, packed_offset, unpack
from tests.support.tensors import METRICS, manifest_of, site_metrics

ROOT = bytes(range(32))
RING = Ring(20)
D = 3000
MANIFEST = manifest_of(w=(D,))
LAYOUT = VectorLayout.of(MANIFEST, "all", METRICS)
EXPONENT = 4
SCALES = fixed_scales(MANIFEST, EXPONENT)
CLIP = 2.0
BOUND = institution_update(scaled_clip(Fraction(CLIP), EXPONENT), D).l2_squared


def update(norm=CLIP * (1 - 2**-20)) -> np.ndarray:
    x = np.random.default_rng(3).normal(size=D)
    return (x * norm / np.linalg.norm(x)).astype(np.float32)


def nothing(chunk, start, lanes) -> None:
    """Neither noise nor masks: the integers show."""


def send(delta=None, *, root=ROOT, max_squares=BOUND, noise=nothing, sink=None, **more):
    chunks: list[bytes] = []
    report = encode_bounded(
        update() if delta is None else delta,
        LAYOUT,
        SCALES,
        root=root,
        max_squares=max_squares,
        clip_factor=1.0,
        metrics=site_metrics(LAYOUT),
        ring=RING,
        limit=RING.clamp_limit(4),
        sink=sink or chunks.append,
        noise=noise,
        mask_adder=nothing,
        **more,
    )
    return report, chunks


def integers(chunks) -> np.ndarray:
    packed, parts = b"".join(chunks), []
    for index, start, stop in LAYOUT.chunks():
        at, size = packed_offset(index, RING), RING.bytes_per_chunk(stop - start)
        parts.append(RING.centre(unpack(packed[at : at + size], stop - start, RING)))
    return np.concatenate(parts)[:D].astype(object)


def send_with(seed: bytes) -> int:
    """The squared norm under one dither, whatever the bound."""
    report = encode_vector(
        update(),
        LAYOUT,
        SCALES,
        weight_units=65536,
        clip_factor=1.0,
        metrics=site_metrics(LAYOUT),
        seed=seed,
        ring=RING,
        limit=RING.clamp_limit(4),
        sink=lambda _: None,
        measure_squares=True,
    )
    return report.sum_squares


# -- the check -----------------------------------------------------------------------------------


def test_what_is_sent_is_within_the_bound_exactly():
    report, chunks = send()
    sent = integers(chunks)

    assert 0 < (sent * sent).sum() <= BOUND
    assert report.sum_squares is None  # private: it is not handed on


def test_a_draw_that_is_too_long_is_never_sent():
    """The bound is set between the first draws: the first that fits is the one that is sent."""
    norms = [send_with(draw_seed(ROOT, j)) for j in range(8)]
    bound = min(norms[1:])  # at least the first draw fails
    first = next(j for j, norm in enumerate(norms) if norm <= bound)
    assert norms[0] > bound  # else nothing was tested
    assert first > 0

    assert (integers(send(max_squares=bound)[1]) ** 2).sum() == bound
    assert find_draw(ROOT, bound, send_with).draw == first


def test_equal_to_the_bound_is_within_one_more_is_not():
    tried = []

    def measure(seed):
        tried.append(seed)
        return 101 if len(tried) < 3 else 100

    assert find_draw(ROOT, 100, measure).draw == 2
    assert tried == [draw_seed(ROOT, j) for j in range(3)]


def test_the_same_root_sends_the_same_bytes():
    assert send()[1] == send()[1] != send(root=bytes(32))[1]
    assert send(threads=2)[1] == send()[1]


def test_no_draw_fits_and_nothing_is_sent():
    sent = []
    with pytest.raises(MalformedMessageError, match=f"{MOST_DRAWS} draws"):
        send(max_squares=10, sink=sent.append)

    assert sent == []


def test_an_update_that_was_not_clipped_is_refused():
    with pytest.raises(MalformedMessageError):
        send(update(norm=3 * CLIP))


def test_a_file_that_changes_between_the_passes_is_caught(monkeypatch):
    delta, passes = update(), []

    def strike(given, *args, **options):
        report = encode_vector(given, *args, **options)
        passes.append(report.sum_squares)
        given[:] = 0  # after the look ahead, before the pass that sends
        return report

    monkeypatch.setattr(rounding, "encode_vector", strike)
    with pytest.raises(CorruptStateError, match="changed"):
        send(delta)

    assert len(passes) == 2  # else nothing was tested
    assert passes[0] > passes[1] == 0


def test_noise_is_on_top_of_what_was_checked():
    share = NoiseShare(NoiseTable.build(Fraction(100)), bytes(32))
    plain, noisy = integers(send()[1]), integers(send(noise=share)[1])

    assert (noisy - plain).tolist() == share.draw(0, D).tolist()


def test_no_seed_is_shown():
    found = find_draw(ROOT, BOUND, send_with)

    assert isinstance(found, AcceptedDraw)
    assert repr(found) == f"AcceptedDraw(max_squares={BOUND})"


def test_draws_have_their_own_seeds():
    seeds = {draw_seed(root, j) for root in (ROOT, bytes(32)) for j in range(100)}

    assert len(seeds) == 200
    assert ROOT not in seeds
    # HKDF-Expand, RFC 5869, one block: HMAC(root, info || 0x01)
    info = b"minga/conditional-rounding/1" + bytes(4)
    assert draw_seed(ROOT, 0) == hmac.digest(ROOT, info + b"\x01", hashlib.sha256)
    with pytest.raises(ValueError, match="32 bytes"):
        draw_seed(bytes(16), 0)


# -- sensitivity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaled", "d", "inflation"),
    [
        (3608, 10**6, 1.0097),
        (58_100, 10**8, 1.0037),
        (3283, 10**7, 1.110),
        (56_120, 10**9, 1.039),
    ],
)
def test_the_bound_as_in_the_table_of_norms(scaled, d, inflation):
    found = institution_update(Fraction(scaled), d)

    assert math.sqrt(found.l2_squared) / scaled == pytest.approx(inflation, rel=1e-3)


@pytest.mark.parametrize(("scaled", "d"), [(1, 1), (32, 3000), (1, 10**6), (1000, 4)])
def test_the_bound_is_the_theorems(scaled, d):
    def theorem(log):
        return min(
            (scaled + math.sqrt(d)) ** 2,
            scaled**2 + d / 4 + math.sqrt(2 * log) * (scaled + math.sqrt(d) / 2),
        )

    checked = institution_update(Fraction(scaled), d)
    unchecked = record_in_sum(Fraction(scaled), d, unit=Unit.DOCUMENT)

    assert checked.l2_squared == math.floor(theorem(0.5) + 1e-9)
    assert unchecked.l2_squared == math.ceil(theorem(math.log(1e12)) - 1e-9)
    assert (checked.failure, unchecked.failure) == (0, Fraction(1, 10**12))
    assert checked.relation is Relation.REPLACE_SPECIAL
    assert unchecked.unit is Unit.DOCUMENT


def test_d1_follows_from_d2():
    def l1(l2_squared, d):
        return IntegerSensitivity(
            l2_squared=l2_squared,
            coordinates=d,
            relation=Relation.REPLACE_SPECIAL,
            unit=Unit.DOCUMENT,
        ).l1

    assert [l1(4, 100), l1(100, 4), l1(100, 5), l1(1, 1)] == [4, 20, 22, 1]


def test_noise_is_made_for_the_sensitivity_and_never_less():
    sensitivity = institution_update(Fraction(58_300), 10**6)
    for z in (Fraction(1), Fraction("1.3"), Fraction(1, 3)):
        variance = sensitivity.share_variance(z, 20)
        want = z**2 * sensitivity.l2_squared
        assert want <= 20 * variance < want + Fraction(20, 256)


def test_shares_too_small_to_add_up_are_refused():
    small = institution_update(Fraction(10), 100)

    with pytest.raises(PlanRefusedError) as caught:
        small.share_variance(Fraction(1), 20)

    assert caught.value.rule == "privacy.share_too_small"
    assert small.share_variance(Fraction(2), 20) >= 16


def test_the_scaled_clip_is_exact():
    assert scaled_clip(Fraction(1, 3), 6) == Fraction(64, 3)
    assert scaled_clip(Fraction(3), -2) == Fraction(3, 4)
    with pytest.raises(ValueError, match="above 0"):
        scaled_clip(Fraction(0), 1)
