"""How far one unit can move a sum of integers. Noise is made from this value, never from C alone.

An update of norm at most C, scaled by s and rounded by chance in d coordinates, is longer than
s * C. With probability at least 1 - beta its squared norm is at most

    D2^2 = min{ (sC + sqrt d)^2,  (sC)^2 + d/4 + sqrt(2 ln(1/beta)) (sC + sqrt(d)/2) }

Where each rounded update is checked against the bound and drawn again, as does
``protocols.noise.rounding``, it holds always. Where only a *sum* is rounded nothing can be checked:
the bound holds but for beta, which is then added to delta in every release.

Whole numbers and fractions throughout; what must be rounded is rounded towards more sensitivity,
except the bound that is enforced: there the check makes the bound true, whatever its value.

Source: Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", ICML 2021, Theorem 1 and Proposition 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from math import ceil, floor, isqrt
from typing import Final

from protocols.errors import PlanRefusedError

LOG_INVERSE_BETA_CHECKED: Final = Fraction(1, 2)  # beta = exp(-1/2): the odds of a redraw
BETA_UNCHECKED: Final = Fraction(1, 10**12)
_LOG_INVERSE_BETA_UNCHECKED: Final = Fraction("27.63102111592855")  # ln 1e12, rounded up
LEAST_SHARE_VARIANCE: Final = 16  # squared steps: below sigma = 4 shares do not add up to noise
_VARIANCE_GRID: Final = 256  # share variances are multiples of 1/256


class Relation(StrEnum):
    """Which two data sets must be hard to tell apart: ``neighboring_relation`` of a plan."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_SPECIAL = "replace_special"  # a unit's contribution becomes zero; counts are public


class Unit(StrEnum):
    """Whose contribution is protected."""

    DOCUMENT = (
        "document"  # with all its sequences that take part: a bounded number, clipped together
    )
    SEQUENCE = "sequence"  # a document in k sequences is then a group of k
    INSTITUTION = "institution"


def _sqrt_up(x: Fraction) -> Fraction:
    """The square root of x where it is a whole number, else above it by less than 2**-63."""
    scaled = -((-x.numerator << 128) // x.denominator)
    root = isqrt(scaled)
    return Fraction(root + (root * root < scaled), 1 << 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerSensitivity:
    """How far one unit can move an integer sum, and for which neighbours that holds.

    ``l1`` follows: for whole numbers x of squared norm at most D2^2 in d coordinates, the sum of
    abs(x) is at most sqrt(d) * D2 and at most D2^2.
    """

    l2_squared: int  # D2^2, squared grid steps
    coordinates: int  # d
    relation: Relation
    unit: Unit
    failure: Fraction = Fraction(0)  # the chance, each release, that the bound does not hold

    def __post_init__(self) -> None:
        if self.l2_squared < 1 or self.coordinates < 1:
            raise ValueError("a sensitivity and a number of coordinates are at least 1")
        if not 0 <= self.failure < 1:
            raise ValueError("a chance of failure is at least 0 and below 1")

    @property
    def l1(self) -> int:
        """D1, grid steps: exact, because a sum of whole numbers is whole."""
        return min(isqrt(self.coordinates * self.l2_squared), self.l2_squared)

    def share_variance(self, noise_multiplier: Fraction, shares: int) -> Fraction:
        """Variance of one node's noise, so that ``shares`` of them make z * D2, or a little more.

        Args:
            noise_multiplier: z, the noise on the sum over D2.
            shares: honest survivors the round cannot do without, m_min - c_dp; never attendance.

        Raises:
            PlanRefusedError: below sigma = 4 a sum of shares is not close to a discrete Gaussian.
        """
        if noise_multiplier <= 0 or shares < 1:
            raise ValueError("want a noise multiplier above 0 and at least one share")
        exact = noise_multiplier**2 * self.l2_squared / shares
        variance = Fraction(ceil(exact * _VARIANCE_GRID), _VARIANCE_GRID)
        if variance < LEAST_SHARE_VARIANCE:
            raise PlanRefusedError(
                f"a share of the noise has variance {float(variance):.3g}, and needs"
                f" {LEAST_SHARE_VARIANCE}: choose a finer grid",
                rule="privacy.share_too_small",
            )
        return variance


def scaled_clip(clip_norm: Fraction, largest_exponent: int) -> Fraction:
    """s * C, exactly: the clip norm in steps of the finest scale 2**e of the round.

    Scales may differ by block: the vector is at most as long as if all had the finest.
    """
    if clip_norm <= 0:
        raise ValueError("the clip norm must be above 0")
    return clip_norm * Fraction(2) ** largest_exponent


def _rounded_norm(scaled: Fraction, coordinates: int, log_inverse_beta: Fraction) -> Fraction:
    """D2^2 of Theorem 1, rounded up by less than 2**-60 of its terms."""
    if scaled <= 0 or coordinates < 1:
        raise ValueError("want a scaled norm above 0 and at least one coordinate")
    root = _sqrt_up(Fraction(coordinates))
    worst = scaled**2 + 2 * scaled * root + coordinates
    likely = (
        scaled**2 + Fraction(coordinates, 4) + _sqrt_up(2 * log_inverse_beta) * (scaled + root / 2)
    )
    return min(worst, likely)


def institution_update(scaled: Fraction, coordinates: int) -> IntegerSensitivity:
    """Of a whole update, *whose integers are checked* before they are sent.

    Args:
        scaled: s * C, from ``scaled_clip``.
        coordinates: d, model coordinates of the round.

    Returns:
        ``l2_squared`` is what ``encode_bounded`` must be given as ``max_squares``. The relation is
        ``REPLACE_SPECIAL``: who took part is visible, what they sent is zero or not. Replacing one
        update by another moves the sum twice as far, and is not what is claimed.
    """
    return IntegerSensitivity(
        l2_squared=max(1, floor(_rounded_norm(scaled, coordinates, LOG_INVERSE_BETA_CHECKED))),
        coordinates=coordinates,
        relation=Relation.REPLACE_SPECIAL,
        unit=Unit.INSTITUTION,
    )


def record_in_sum(
    scaled: Fraction, coordinates: int, *, unit: Unit, slack: Fraction = Fraction(0)
) -> IntegerSensitivity:
    """Of one clipped record in a sum that is rounded as a whole: it fails with chance 1e-12.

    With the same dither for both neighbours the difference is a rounding by chance of the record's
    own scaled gradient, so Theorem 1 applies to it; it cannot be checked. Needs an encoder without
    error feedback or local momentum.

    Args:
        scaled: s * C, with C the clip norm of one record.
        coordinates: d.
        unit: what one record is.
        slack: steps that float arithmetic before the rounding may add to the difference.
    """
    longest = scaled + slack
    return IntegerSensitivity(
        l2_squared=ceil(_rounded_norm(longest, coordinates, _LOG_INVERSE_BETA_UNCHECKED)),
        coordinates=coordinates,
        relation=Relation.ADD_OR_REMOVE_ONE,
        unit=unit,
        failure=BETA_UNCHECKED,
    )
