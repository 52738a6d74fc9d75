"""Public scales: powers of two, known before the round, one for each block of a tensor.

A scale is 2**e grid steps per 1.0. It follows from the plan in the first round and from the
previous public sum afterwards, so it tells nobody anything new. The choice is made in whole
numbers: every party gets the same exponent, whatever its processor. Normative text:
protocols/spec/vector.md, section 4.

Scales cover all blocks of the manifest, in order, one signed byte each. Tensors that a round does
not exchange keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from protocols.errors import MalformedMessageError, ManifestMismatchError, PlanRefusedError
from protocols.identifiers import Digest
from protocols.plan import Scale
from protocols.tensors.layout import VectorLayout
from protocols.tensors.manifest import Manifest
from protocols.tensors.ring import Ring
from protocols.tensors.sizes import BLOCK, EXPONENTS, WEIGHT_ONE
from protocols.tensors.units import blob_digest

_LOWEST, _HIGHEST = EXPONENTS


@dataclass(frozen=True, eq=False)
class Scales:
    """Exponents e of the scales 2**e, int8, shape [blocks of the manifest]."""

    exponents: NDArray[np.int8]

    def __post_init__(self) -> None:
        given = np.asarray(self.exponents).reshape(-1)
        if given.size and (int(given.min()) < _LOWEST or int(given.max()) > _HIGHEST):
            raise MalformedMessageError(f"the exponent of a scale must be {_LOWEST} to {_HIGHEST}")
        own = given.astype(np.int8)
        own.flags.writeable = False
        object.__setattr__(self, "exponents", own)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scales) and np.array_equal(self.exponents, other.exponents)

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __len__(self) -> int:
        return int(self.exponents.size)

    def to_bytes(self) -> bytes:
        """One signed byte for each block."""
        return self.exponents.tobytes()

    @cached_property
    def digest(self) -> Digest:
        """Name of the blob that holds them."""
        return blob_digest(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, manifest: Manifest) -> Scales:
        """Read scales.

        Raises:
            ManifestMismatchError: another number of blocks.
            MalformedMessageError: an exponent out of range.
        """
        scales = cls(np.frombuffer(data, np.int8))
        scales.check(manifest)
        return scales

    def check(self, manifest: Manifest) -> None:
        """Raises: ManifestMismatchError: these are not scales of that manifest."""
        if len(self) != manifest.blocks:
            raise ManifestMismatchError(
                f"{len(self)} scales for a manifest of {manifest.blocks} blocks"
            )

    def multipliers(self, factor: float, layout: VectorLayout) -> NDArray[np.float32]:
        """float32(factor) * 2**e for each block of the manifest; the product is exact.

        Raises:
            ManifestMismatchError: the layout has blocks beyond these scales.
        """
        if layout.segments:
            last = layout.segments[-1]
            needed = last.first_block + -(-last.coordinates // BLOCK)
            if needed > len(self):
                raise ManifestMismatchError(
                    f"{len(self)} scales for a layout of {needed} blocks or more"
                )
        return np.ldexp(np.float32(factor), self.exponents.astype(np.int32))


def largest_exponent(limit: int, bound: Fraction) -> int:
    """The largest e in [-100, 100] with 2**e * bound <= limit; -100 where there is none.

    ``bound`` must be positive. Below the range values are clamped to the limit as anywhere else.
    """
    ratio = Fraction(limit) / bound
    # floor(log2(a/b)) is the difference of the bit lengths, or one less.
    e = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    if not _two_to(e) <= ratio:
        e -= 1
    return max(_LOWEST, min(_HIGHEST, e))


def _two_to(e: int) -> Fraction:
    return Fraction(1 << e) if e >= 0 else Fraction(1, 1 << -e)


def first_scales(
    source: Manifest | VectorLayout, *, bound: float, ring: Ring, nodes: int
) -> Scales:
    """Scales of the first round: the largest 2**e with 2**e * bound <= Q, the same everywhere.

    Args:
        source: the manifest (or a layout of all its tensors).
        bound: largest magnitude expected of weight * clipped delta, in parameter units, above 0.
        ring: of the plan.
        nodes: size of the roster.
    """
    e = largest_exponent(ring.clamp_limit(nodes), Fraction(bound))
    return fixed_scales(source, e)


def fixed_scales(source: Manifest | VectorLayout, exponent: int) -> Scales:
    """One exponent for all blocks. Raises: MalformedMessageError: out of range."""
    if not _LOWEST <= exponent <= _HIGHEST:
        raise MalformedMessageError(f"the exponent of a scale must be {_LOWEST} to {_HIGHEST}")
    blocks = source.blocks if isinstance(source, Manifest) else source.block_count
    return Scales(np.full(blocks, exponent, np.int8))


def initial_scales(manifest: Manifest, rule: Scale, ring: Ring, nodes: int) -> Scales:
    """Scales of round 0 by the plan's rule; ``nodes`` is the size of the roster."""
    if rule.mode == "fixed":
        if rule.exponent is None:
            raise PlanRefusedError("fixed scales need an exponent", rule="vector.scale.exponent")
        return fixed_scales(manifest, rule.exponent)
    return first_scales(manifest, bound=rule.first_bound, ring=ring, nodes=nodes)


def next_exponent(
    *,
    sum_squares: int,
    coordinates: int,
    old: int,
    weight_sum_units: int,
    k_permille: int,
    floor: Fraction,
    limit: int,
) -> int:
    """The exponent of one block after a round: the largest e with 2**e * bound <= Q.

    bound = max(floor, k * rms), rms over the block of the mean S * 2**-old * 65536 / W. Decided in
    whole numbers: 2**e * k * rms <= Q exactly when
    4**e * k_permille**2 * sum_squares * 4**-old * 65536**2 <= Q**2 * 1000**2 * coordinates * W**2.

    Args:
        sum_squares: sum of S**2 over the block, S the centred integer sums.
        coordinates: of the block.
        old: exponent that the round used.
        weight_sum_units: W, sum of the survivors' weights, in units of 1/65536.
        k_permille: k in thousandths.
        floor: smallest bound a scale is made for, in parameter units.
        limit: Q.
    """
    by_floor = largest_exponent(limit, floor)
    if sum_squares == 0:
        return by_floor
    left = k_permille**2 * sum_squares * WEIGHT_ONE**2
    right = limit**2 * 1000**2 * coordinates * weight_sum_units**2
    if old >= 0:
        right <<= 2 * old
    else:
        left <<= -2 * old
    # The largest e with 4**e * left <= right: half the difference of bit lengths, or one off.
    e = (right.bit_length() - left.bit_length()) // 2 + 1
    while (left << 2 * e if e >= 0 else left) > (right if e >= 0 else right << -2 * e):
        e -= 1
    return max(_LOWEST, min(by_floor, e))


def next_scales(
    sum_squares: Mapping[int, int],
    weight_sum_units: int,
    old: Scales,
    layout: VectorLayout,
    *,
    k_permille: int,
    floor: float,
    ring: Ring,
    nodes: int,
) -> Scales:
    """Scales of the next round from the public sum of this one.

    Args:
        sum_squares: for each block of the layout (by its index in the manifest) the exact sum of
            squares of the centred sums.
        weight_sum_units: W, at least 1.
        old: scales that the round used.
        layout: of the round. Blocks it does not exchange keep their exponent.
        k_permille: headroom over the rms of the mean, in thousandths.
        floor: smallest bound, in parameter units, above 0.
        ring: of the plan.
        nodes: size of the roster.
    """
    limit, smallest = ring.clamp_limit(nodes), Fraction(floor)
    exponents = old.exponents.copy()
    for block in layout.blocks():
        exponents[block.number] = next_exponent(
            sum_squares=sum_squares[block.number],
            coordinates=block.stop - block.start,
            old=int(old.exponents[block.number]),
            weight_sum_units=weight_sum_units,
            k_permille=k_permille,
            floor=smallest,
            limit=limit,
        )
    return Scales(exponents)
