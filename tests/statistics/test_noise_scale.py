"""Noise has its scale and its law: accepted there, rejected at 2/3 and 3/2 of it."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from protocols.noise.discrete_gaussian import discrete_gaussian, discrete_laplace
from protocols.noise.noise_table import NoiseShare, NoiseTable
from protocols.noise.streams import Uniform
from tests.statistics.evidence import fits_law, fits_scale, gaussian_pmf

N = 200_000
OFF = [Fraction(2, 3), Fraction(3, 2)]  # of the scale; of the variance its square


def seed(*name) -> bytes:
    return hashlib.sha256(repr(name).encode()).digest()


@cache
def table(variance: Fraction) -> NoiseTable:
    return NoiseTable.build(variance)


def fast(variance, count=N, *name) -> np.ndarray:
    return NoiseShare(table(Fraction(variance)), seed("fast", variance, *name)).draw(0, count)


@cache
def exact(variance: Fraction, count: int) -> np.ndarray:
    uniform = Uniform(seed("exact", variance))
    return np.array([discrete_gaussian(variance, uniform) for _ in range(count)])


@pytest.mark.parametrize("variance", [1, 4, Fraction(33, 2), 10_000])
def test_the_table_has_its_scale_and_no_other(variance):
    draws = fast(variance)

    assert fits_scale(draws, float(variance))
    for factor in OFF:
        assert not fits_scale(draws, float(variance * factor**2))


@pytest.mark.parametrize("variance", [1, 4, Fraction(33, 2)])
def test_the_table_has_its_law_and_no_other(variance):
    draws = fast(variance)

    assert fits_law(draws, gaussian_pmf(float(variance)))
    for factor in OFF:
        assert not fits_law(draws, gaussian_pmf(float(variance * factor**2)))


@pytest.mark.parametrize("variance", [Fraction(1), Fraction(1, 4), Fraction(33, 2)])
def test_the_reference_has_its_law_and_no_other(variance):
    draws = exact(variance, 10_000)

    assert fits_law(draws, gaussian_pmf(float(variance)))
    for factor in OFF:
        assert not fits_law(draws, gaussian_pmf(float(variance * factor**2)))
        if variance >= 1:
            assert not fits_scale(draws, float(variance * factor**2))


@pytest.mark.parametrize("shares", [3, 20])
def test_the_sum_of_shares_has_its_scale_and_no_other(shares):
    """What the sum carries is shares * sigma_i^2; one share alone is far too little."""
    total = sum(fast(16, N, "share", i) for i in range(shares))

    assert fits_scale(total, 16.0 * shares)
    assert fits_law(total, gaussian_pmf(16.0 * shares))  # tau is 1e-68: the sum is one too
    for factor in OFF:
        assert not fits_scale(total, float(16 * shares * factor**2))
    assert not fits_scale(fast(16, N, "share", 0), 16.0 * shares)


def test_shares_from_one_seed_are_convicted():
    assert not fits_scale(3 * fast(16), 48.0)


def test_rounded_normals_are_convicted():
    """The usual mistake: variance 1 + 1/12 instead of 1."""
    rounded = np.rint(np.random.default_rng(7).normal(size=N))

    assert not fits_law(rounded, gaussian_pmf(1.0))
    assert not fits_scale(rounded, 1.0)


def test_a_zero_counted_twice_is_convicted():
    """Algorithm 2 without its last line: the sampler that forgets that -0 is 0."""
    draws = fast(4).copy()
    extra = np.flatnonzero(draws == 0)[: N // 50]
    draws[: extra.size] = 0

    assert not fits_law(draws, gaussian_pmf(4.0))


def test_the_laplace_inside_has_its_law():
    scale, uniform = 3, Uniform(seed("laplace"))
    draws = np.array([discrete_laplace(scale, uniform) for _ in range(10_000)])
    weights = {x: np.exp(-abs(x) / scale) for x in range(-150, 151)}
    total = sum(weights.values())

    assert fits_law(draws, {x: w / total for x, w in weights.items()})
    assert not fits_law(draws, gaussian_pmf(float(np.var(draws))))


def test_neighbours_and_halves_of_the_stream_are_not_alike():
    """Correlation of draws at distance 1 and of two seeds, each 1 / sqrt(N) by chance."""
    a, b = fast(4), fast(4, N, "other")

    for one, two in ((a[1:], a[:-1]), (a, b)):
        assert abs(np.corrcoef(one, two)[0, 1]) < 6 / np.sqrt(N)
