"""The noise of a private step: whole numbers of a grid, added once to the sum of a batch. No torch.

    sum of clipped gradients, in steps of the grid -> rounded by chance -> + discrete Gaussian

Grid and variance are those of ``policies.privacy.terms.local_noise``, which is what the ledger
charges. Sensitivity and noise are whole numbers, so there is no float noise to attack (Mironov,
CCS 2012). Dither and noise are read from two AES-256-CTR streams of seeds of the operating system.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from node_agent.resident import JobFailedError
from policies.privacy.terms import LocalNoise
from protocols.noise.noise_table import NoiseShare, NoiseTable
from protocols.noise.streams import key_stream

_TILE: Final = 2**18  # coordinates rounded together
_DITHER_BITS: Final = 53  # what a float64 fraction holds
_LIMIT: Final = 2.0**50  # steps: whole numbers that far are exact in float64


@lru_cache(maxsize=4)
def table_for(variance: Fraction) -> NoiseTable:
    """The table of one discrete Gaussian; seconds for a wide one, so the last few are kept."""
    return NoiseTable.build(variance)


@dataclass(frozen=True, slots=True)
class StepSeeds:
    """The secrets of one step's noise: drawn from the operating system, used once, never stored."""

    dither: bytes = field(repr=False)  # 32 bytes each
    noise: bytes = field(repr=False)


def round_by_chance(
    values: NDArray[np.float64], start: int, gamma: float, seed: bytes
) -> NDArray[np.int64]:
    """``values / gamma`` as whole numbers; each is rounded up with the chance of its fraction.

    Args:
        values: float64, shape [m].
        start: coordinate of the first one: dither belongs to the coordinate.
        gamma: a power of two.
        seed: 32 secret bytes, of this step.

    Raises:
        JobFailedError: train.non_finite: NaN, infinity, or so large that it is no longer exact.
    """
    steps = values / gamma
    if not np.all(np.abs(steps) < _LIMIT):  # NaN fails this too
        raise JobFailedError("train.non_finite", "the sum of clipped gradients is out of range")
    block, skip = divmod(start, 2)
    stream = key_stream(seed, block)
    stream.update(bytes(8 * skip))
    words = np.frombuffer(stream.update(bytes(8 * values.size)), dtype="<u8")
    dither = (words >> np.uint64(64 - _DITHER_BITS)).astype(np.float64) * 2.0**-_DITHER_BITS
    whole = np.floor(steps)
    return whole.astype(np.int64) + (dither < steps - whole)


def noised(
    parts: Iterable[NDArray[np.float64]],
    *,
    noise: LocalNoise,
    seeds: StepSeeds,
    divisor: float,
) -> Iterator[NDArray[np.float32]]:
    """The sum of a batch with its noise, over ``divisor``: what may be acted on.

    Args:
        parts: the sum of clipped gradients, tensor by tensor in a fixed order, flat.
        noise: of the plan.
        seeds: of the step.
        divisor: public: the expected batch, never the size of the sample.

    Yields:
        float32 of the same shapes.

    Raises:
        JobFailedError: train.non_finite.
    """
    share = NoiseShare(table_for(noise.variance), seeds.noise)
    gamma, at = 2.0**-noise.exponent, 0
    for part in parts:
        out = np.empty(part.size, dtype=np.float32)
        for begin in range(0, part.size, _TILE):
            piece = part[begin : begin + _TILE]
            steps = round_by_chance(piece, at + begin, gamma, seeds.dither)
            steps += share.draw(at + begin, piece.size)
            out[begin : begin + _TILE] = steps * (gamma / divisor)
        at += part.size
        yield out
    if at != noise.sensitivity.coordinates:
        raise ValueError(f"the sum has {at} coordinates, its noise {noise.sensitivity.coordinates}")
