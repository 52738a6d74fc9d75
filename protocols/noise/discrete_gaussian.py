"""The discrete Gaussian, drawn exactly: slow, and short enough to check against the paper.

    P(x) = exp(-x**2 / (2 * variance)) / Z     for every whole number x

No float takes part, so there is no rounding to attack (Mironov, CCS 2012). This is the reference
that the fast table, ``noise_table``, is tested against; some thousand draws per second.

Source: Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS
2020 (arXiv 2004.00010), algorithms 1 to 3.
"""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

from protocols.noise.streams import Uniform

_ONE = Fraction(1)


def bernoulli_exp(gamma: Fraction, uniform: Uniform) -> bool:
    """True with probability exp(-gamma), exactly; gamma >= 0. Algorithm 1."""
    if gamma < 0:
        raise ValueError("gamma must not be negative")
    while gamma > 1:
        if not _bernoulli_exp_unit(_ONE, uniform):
            return False
        gamma -= 1
    return _bernoulli_exp_unit(gamma, uniform)


def _bernoulli_exp_unit(gamma: Fraction, uniform: Uniform) -> bool:
    """The case 0 <= gamma <= 1: how long a run of Bernoulli(gamma / k) lasts, odd or even."""
    k = 1
    while uniform.below(gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1


def discrete_laplace(scale: int, uniform: Uniform) -> int:
    """One draw of P(x) proportional to exp(-abs(x) / scale); scale >= 1. Algorithm 2, s = 1."""
    if scale < 1:
        raise ValueError("the scale must be at least 1")
    while True:
        u = uniform.below(scale)
        if not bernoulli_exp(Fraction(u, scale), uniform):
            continue
        v = 0
        while _bernoulli_exp_unit(_ONE, uniform):
            v += 1
        size, negative = u + scale * v, uniform.below(2) == 1
        if size or not negative:  # else zero would be counted twice
            return -size if negative else size


def discrete_gaussian(variance: Fraction, uniform: Uniform) -> int:
    """One draw of the discrete Gaussian with parameter ``variance`` (sigma**2). Algorithm 3.

    Args:
        variance: sigma squared, in squared grid steps; above 0. Above 1 the variance of the law
            equals it to eight digits; below it is smaller.
        uniform: of a fresh seed.

    Raises:
        ValueError: the variance is not above 0.
    """
    if variance <= 0:
        raise ValueError("the variance must be above 0")
    t = isqrt(variance.numerator // variance.denominator) + 1  # floor(sigma) + 1
    while True:
        y = discrete_laplace(t, uniform)
        if bernoulli_exp((abs(y) - variance / t) ** 2 / (2 * variance), uniform):
            return y
