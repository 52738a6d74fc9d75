"""Which records take part in a private step: each by itself, with the public rate q. No torch.

The analysis of DP-SGD holds for Poisson samples: every record is in with probability q, whatever
the others do, and batches differ in size. A shuffled epoch or a fixed batch size is another
mechanism with another, larger loss. A sample may be empty; the step is taken all the same.

Chance comes from the operating system by way of AES-256-CTR, never from a generator of torch or
numpy: who can guess the sample has nothing to be amplified.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocols.noise.streams import key_stream

_WORD_BITS: Final = 64
_TILE: Final = 2**20  # records looked at together


def threshold(rate: Fraction) -> int:
    """A record is in when its word is below this: q * 2**64, rounded down.

    The true rate is at most q, which is what is charged.

    Raises:
        ValueError: q is not above 0 and at most 1, or so small that nobody would ever take part.
    """
    if not 0 < rate <= 1:
        raise ValueError("a sampling rate is above 0 and at most 1")
    least = (rate.numerator << _WORD_BITS) // rate.denominator
    if least == 0:
        raise ValueError("a sampling rate below 2**-64 takes nobody")
    return least


def poisson_sample(records: int, rate: Fraction, seed: bytes) -> NDArray[np.int64]:
    """Draw one sample.

    Args:
        records: N, how many there are.
        rate: q.
        seed: 32 secret bytes, fresh for each step and used for nothing else.

    Returns:
        int64, ascending: the numbers of the records that take part; may be empty.
    """
    below = threshold(rate)
    if below >> _WORD_BITS:
        return np.arange(records, dtype=np.int64)
    stream = key_stream(seed, 0)
    found = []
    for start in range(0, records, _TILE):
        count = min(_TILE, records - start)
        words = np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8")
        found.append(np.flatnonzero(words < np.uint64(below)).astype(np.int64) + start)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)
