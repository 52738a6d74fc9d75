"""The discrete Gaussian as a table of whole numbers: what a node adds to its update.

A draw is a number U of 192 bits. Its top bits name one of K = 2**k columns; column c holds the
outcome c - bound below its cut and one other outcome, its alias, from the cut on:

    U    =  64 bits of the word stream  ||  128 bits of the tie stream
    draw =  c - bound  if U < cut[c]  else  alias[c]          where c = the top k bits of U

The first 64 bits decide unless they equal those of the cut; only then the 128 others are made.
Thresholds of 64 bits alone would put each coordinate up to K * 2**-64 off its law: with 2**19
columns and 1e8 coordinates that is 2.8e-6 a round, the size of a delta. The outcomes are cut at 12
sigma and have whole weights that sum to 2**192, so the law of a table is known exactly;
``distance`` bounds how far it is from the true one.

Both streams belong to the coordinate: word i is bytes 8i to 8i + 7 (little-endian) of the key
stream, tie i is block 2**127 + i (big-endian). Chunks, threads and order do not change a draw.

The table is made with whole numbers only, so every institution gets the same one, bit for bit, and
can compare its digest. Not constant in time: which entries are read depends on the noise. Whoever
shares a processor with a node can watch that; nobody across the network can.

Source: Walker, ACM TOMS 3 (1977); Vose, IEEE TSE 17 (1991).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from fractions import Fraction
from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocols.errors import MalformedMessageError
from protocols.noise.streams import SEED_BYTES, key_stream

TAIL: Final = 12  # outcomes beyond 12 sigma are left out: 4e-33 of the mass
U_BITS: Final = 192
WORD_BITS: Final = 64
TIE_BITS: Final = U_BITS - WORD_BITS
MOST_COLUMNS: Final = 2**20  # 22 MiB of table; sigma up to 43,690
# Of every table, so that its cost can be said before it is made. What is cut off at 12 sigma is
# nearly all of it, and grows towards that of the continuous law: 2**-107 from sigma = 300 on.
MOST_DISTANCE: Final = Fraction(1, 2**106)

_PRECISION = 512  # bits of the weights while they are made
_TIES_AT = 1 << 127  # block where the tie stream begins: no vector has 2**128 coordinates
_TILE = 2**16  # coordinates drawn at once
_LABEL = b"minga/discrete-gaussian-table/1"


def _exp_minus(x: Fraction) -> int:
    """exp(-x) in units of 2**-_PRECISION, wrong by less than 2**-400 of itself; 0 < x <= 16.

    Taylor for x / 2**s <= 2**-8, then squared s times, with 64 bits to spare.
    """
    work, s = _PRECISION + 64, 12
    one = 1 << work
    y = (x.numerator << work) // (x.denominator << s)
    term, total, n = one, one, 0
    while term:
        n += 1
        term = term * y // (n << work)
        total += -term if n % 2 else term
    for _ in range(s):
        total = total * total >> work
    return total >> 64


def half_weights(variance: Fraction, bound: int) -> list[int]:
    """exp(-x**2 / (2 * variance)) for x = 0 .. bound, in units of 2**-512, rounded down.

    By recurrence: the ratio of neighbours is exp(-(2x + 1) / (2 * variance)), itself a geometric
    sequence. Each error stays below 2**-200 of the total, far below one unit of 2**-192.
    """
    ratio, step = _exp_minus(1 / (2 * variance)), _exp_minus(1 / variance)
    weight, weights = 1 << _PRECISION, []
    for _ in range(bound + 1):
        weights.append(weight)
        weight = weight * ratio >> _PRECISION
        ratio = ratio * step >> _PRECISION
    return weights


def _bound(variance: Fraction) -> int:
    """The least whole number that is at least TAIL * sigma."""
    square = TAIL * TAIL * variance
    return isqrt(-(-square.numerator // square.denominator) - 1) + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoiseTable:
    """The alias table of one discrete Gaussian. Public: it holds no secret."""

    variance: Fraction  # sigma squared, in squared grid steps
    bound: int  # largest magnitude of an outcome
    distance: Fraction  # at least the total variation to the exact law, for one coordinate
    cut_high: NDArray[np.uint64] = field(repr=False)  # shape [K]: the top 64 bits of each cut
    cut_low: NDArray[np.uint64] = field(repr=False)  # shape [K, 2]: the other 128, high first
    alias: NDArray[np.int32] = field(repr=False)  # shape [K]: outcomes

    @classmethod
    def build(cls, variance: Fraction) -> NoiseTable:
        """Make the table; about 2 s at sigma = 13,000.

        Raises:
            MalformedMessageError: sigma below 1/4 or beyond what MOST_COLUMNS can hold.
        """
        if variance < Fraction(1, 16):
            raise MalformedMessageError("noise needs a variance of at least 1/16 grid step squared")
        bound = _bound(variance)
        if 2 * bound + 1 > MOST_COLUMNS:
            raise MalformedMessageError(f"noise of variance {variance} needs too large a table")
        weights, distance = _whole_weights(variance, bound)
        return cls._from_weights(weights, variance, bound, distance)

    @classmethod
    def _from_weights(
        cls, weights: list[int], variance: Fraction, bound: int, distance: Fraction
    ) -> NoiseTable:
        if distance > MOST_DISTANCE:
            raise MalformedMessageError(f"a table of variance {variance} is too far from its law")
        k = (len(weights) - 1).bit_length()
        cuts, alias = _alias(weights, k)
        parts = [cut >> TIE_BITS for cut in cuts]
        mask = (1 << 64) - 1
        low = [((cut >> 64) & mask, cut & mask) for cut in cuts]
        arrays = (
            np.array(parts, np.uint64),
            np.array(low, np.uint64),
            np.array([column - bound for column in alias], np.int32),
        )
        for array in arrays:
            array.flags.writeable = False
        high, rest, outcomes = arrays
        return cls(
            variance=variance,
            bound=bound,
            distance=distance,
            cut_high=high,
            cut_low=rest,
            alias=outcomes,
        )

    @property
    def column_bits(self) -> int:
        """k: the table has 2**k columns."""
        return int(self.cut_high.size).bit_length() - 1

    @property
    def digest(self) -> bytes:
        """SHA-256, 32 bytes, of the label, the parameters and the arrays, little-endian."""
        v = self.variance
        head = f"{v.numerator}/{v.denominator} {self.bound} {self.column_bits}\n".encode()
        state = hashlib.sha256(_LABEL + b"\n" + head)
        state.update(self.cut_high.astype("<u8").tobytes())
        state.update(self.cut_low.astype("<u8").tobytes())
        state.update(self.alias.astype("<i4").tobytes())
        return state.digest()

    def cut(self, column: int) -> int:
        """The cut of one column, 192 bits."""
        high, (mid, low) = self.cut_high[column], self.cut_low[column]
        return int(high) << TIE_BITS | int(mid) << 64 | int(low)

    def weights(self) -> list[int]:
        """How many of the 2**192 values of U give each outcome -bound .. bound. Exact."""
        width = 1 << (U_BITS - self.column_bits)
        counts = [0] * self.cut_high.size
        for column in range(self.cut_high.size):
            own = self.cut(column) - column * width
            counts[column] += own
            counts[int(self.alias[column]) + self.bound] += width - own
        return counts[: 2 * self.bound + 1]

    def decide(
        self, words: NDArray[np.uint64], start: int, seed: bytes, out: NDArray[np.int32]
    ) -> int:
        """Turn words into draws.

        Args:
            words: uint64, shape [m]: the first 64 bits of each U.
            start: coordinate of the first one; names the tie bits.
            seed: 32 secret bytes, for the tie bits alone.
            out: int32, shape [m], overwritten.

        Returns:
            How many ties were decided by further bits.
        """
        column = (words >> np.uint64(WORD_BITS - self.column_bits)).astype(np.int64)
        high = self.cut_high[column]
        np.copyto(out, np.where(words < high, column - self.bound, self.alias[column]))
        ties = np.flatnonzero(words == high)
        for i in ties.tolist():
            c = int(column[i])
            block = key_stream(seed, _TIES_AT + start + i).update(bytes(16))
            if int.from_bytes(block, "big") < self.cut(c) & ((1 << TIE_BITS) - 1):
                out[i] = c - self.bound
        return int(ties.size)


def _whole_weights(variance: Fraction, bound: int) -> tuple[list[int], Fraction]:
    """Weights of -bound .. bound that sum to 2**192, and a bound on their total variation.

    Each weight is rounded down and the rest, fewer than 2 * bound + 1 units, goes to 0: at most one
    unit a column in total variation, and a second for the error of ``half_weights``. What is cut
    off is below the geometric sum from bound + 1 on, as ratios of neighbours fall.
    """
    half = half_weights(variance, bound + 2)
    after, ratio_num, ratio_den = half[bound + 1] + 1, half[bound + 2] + 1, half[bound + 1]
    half = half[: bound + 1]
    total = 2 * sum(half) - half[0]
    scaled = [(w << U_BITS) // total for w in half]
    scaled[0] += (1 << U_BITS) - (2 * sum(scaled) - scaled[0])
    tail = Fraction(2 * after, total) / (1 - Fraction(ratio_num, ratio_den))
    rounding = Fraction(2 * (2 * bound + 1), 1 << U_BITS)
    # One power of two above: a short number that is still a bound.
    distance = tail + rounding
    short = Fraction(1, 1 << ((distance.denominator // distance.numerator).bit_length() - 1))
    return scaled[:0:-1] + scaled, short


def _alias(weights: list[int], k: int) -> tuple[list[int], list[int]]:
    """Cuts and aliases (as columns) of Vose's method, in whole numbers: no unit is lost.

    A full column has its cut at its start and itself as alias.
    """
    columns, width = 1 << k, 1 << (U_BITS - k)
    left = weights + [0] * (columns - len(weights))
    alias = list(range(columns))
    cuts = [column * width for column in range(columns)]
    small = [c for c in range(columns) if left[c] < width]
    large = [c for c in range(columns) if left[c] > width]
    while small:
        c, donor = small.pop(), large[-1]
        cuts[c] += left[c]
        alias[c] = donor
        left[donor] -= width - left[c]
        if left[donor] <= width:
            large.pop()
            if left[donor] < width:
                small.append(donor)
    return cuts, alias


class NoiseShare:
    """One node's noise for one attempt: a ``Noise`` of ``protocols.tensors.encode``.

    Safe to call from several threads for different chunks. The seed is fresh for each attempt, from
    the operating system, used for nothing else, and erased by its owner; two sums with the same
    noise would cancel it.
    """

    __slots__ = ("_seed", "_table")

    def __init__(self, table: NoiseTable, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes")
        self._table, self._seed = table, seed

    def __repr__(self) -> str:
        return f"NoiseShare(variance={self._table.variance})"

    def draw(self, start: int, count: int) -> NDArray[np.int32]:
        """The noise of coordinates start .. start + count - 1; int32, shape [count]."""
        out = np.empty(count, np.int32)
        block, skip = divmod(start, 2)
        stream = key_stream(self._seed, block)
        stream.update(bytes(8 * skip))
        for begin in range(0, count, _TILE):
            part = out[begin : begin + _TILE]
            words = np.frombuffer(stream.update(bytes(8 * part.size)), "<u8")
            self._table.decide(words, start + begin, self._seed, part)
        return out

    def __call__(self, chunk: int, start: int, lanes: NDArray[np.int32]) -> None:
        """Add the noise of coordinates from ``start`` on to ``lanes``, in place."""
        del chunk  # the coordinate says it all
        np.add(lanes, self.draw(start, lanes.size), out=lanes)
