"""Whether draws follow a law: two oracles with power, for fixed seeds.

Both accept at 6 standard deviations: a right sampler fails once in 5e8 seeds, and the seeds are
fixed. ``test_noise_scale`` shows that both convict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

SIGMAS = 6.0


def fits_scale(draws: np.ndarray, variance: float) -> bool:
    """Mean zero and that variance. A Gaussian's squares have variance 2 * variance**2."""
    n, x = draws.size, draws.astype(np.float64)
    mean = x.mean() / math.sqrt(variance / n)
    spread = (np.mean(x * x) / variance - 1) / math.sqrt(2 / n)
    return bool(abs(mean) < SIGMAS and abs(spread) < SIGMAS)


def fits_law(draws: np.ndarray, pmf: Mapping[int, float]) -> bool:
    """Pearson's chi-squared over outcomes expected at least 20 times; the rest are one more."""
    n = draws.size
    values, counts = np.unique(draws, return_counts=True)
    seen = dict(zip(values.tolist(), counts.tolist(), strict=True))
    common = {x: n * p for x, p in pmf.items() if n * p >= 20}
    statistic = sum((seen.get(x, 0) - e) ** 2 / e for x, e in common.items())
    rest = n - sum(common.values())
    freedom = len(common) - 1
    if rest > 1:
        others = n - sum(seen.get(x, 0) for x in common)
        statistic, freedom = statistic + (others - rest) ** 2 / rest, freedom + 1
    return bool(abs(statistic - freedom) < SIGMAS * math.sqrt(2 * freedom))


def gaussian_pmf(variance: float) -> dict[int, float]:
    """The discrete Gaussian in floats, from its definition."""
    reach = math.ceil(12 * math.sqrt(variance))
    weights = {x: math.exp(-x * x / (2 * variance)) for x in range(-reach, reach + 1)}
    total = math.fsum(weights.values())
    return {x: w / total for x, w in weights.items()}
