"""What a release did, as values that anyone can compose again, and their Renyi divergences.

An event says what mechanism ran and nothing about data. Its numbers are exact, or floats that were
rounded towards more privacy loss by whoever made it (``rate_up``, ``multiplier_down``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from policies.privacy.sensitivity import LEAST_SHARE_VARIANCE, IntegerSensitivity, Relation, Unit

_PAD: Final = 1.0 + 2.0**-40  # more than all float error of a formula here, less than 1e-12


def float_up(x: Fraction) -> float:
    """The least float that is not below x."""
    near = float(x)
    return near if Fraction(near) >= x else math.nextafter(near, math.inf)


def rate_up(x: Fraction) -> float:
    """A sampling rate as a float: never below."""
    if not 0 < x <= 1:
        raise ValueError("a sampling rate is above 0 and at most 1")
    return float_up(x)


def multiplier_down(x: Fraction) -> float:
    """A noise multiplier as a float: never above."""
    near = float(x)
    return near if Fraction(near) <= x else math.nextafter(near, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledGaussian:
    """One step of DP-SGD: a Poisson sample, clipped, and Gaussian noise on the sum.

    With ``discrete`` the noise is a discrete Gaussian and the sensitivity a whole number: the
    Renyi divergences of the continuous one are then exact upper bounds at whole orders, and nothing
    is known at others, nor for privacy loss distributions.
    """

    sampling_rate: float
    noise_multiplier: float  # z, the noise over D2
    discrete: bool

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError("a sampling rate is above 0 and at most 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError("a noise multiplier is above 0 and finite")


def tau(shares: int, share_variance: Fraction) -> float:
    """How far a sum of discrete Gaussians is from one, in each coordinate; rounded up.

    tau = 10 * sum over k = 1 .. n - 1 of exp(-2 pi^2 sigma_i^2 k / (k + 1)). Proposition 14.
    """
    if shares < 1 or share_variance <= 0:
        raise ValueError("want at least one share, of variance above 0")
    rate = 2 * math.pi**2 * float(share_variance) / _PAD
    total = math.fsum(math.exp(-rate * k / (k + 1)) for k in range(1, shares))
    return 10 * total * _PAD


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedDiscreteGaussian:
    """A sum to which each of ``shares`` honest nodes added a discrete Gaussian.

    ``shares`` is the number the round cannot do without, m_min - c_dp, never attendance.
    """

    l2_squared: int
    l1: int
    coordinates: int
    share_variance: Fraction
    shares: int

    def __post_init__(self) -> None:
        if self.l2_squared < 1 or self.coordinates < 1 or self.shares < 1:
            raise ValueError("a sensitivity, coordinates and shares are at least 1")
        if not 1 <= self.l1 <= self.l2_squared:
            raise ValueError("for whole numbers D1 is at least 1 and at most D2 squared")
        if self.share_variance < LEAST_SHARE_VARIANCE:
            raise ValueError(f"a share has a variance of at least {LEAST_SHARE_VARIANCE}")

    @property
    def rho(self) -> float:
        """D2^2 / (2 sig^2): what it costs as zero-concentrated privacy, tau left out."""
        return float_up(Fraction(self.l2_squared) / (2 * self.shares * self.share_variance))

    def renyi(self, alpha: float) -> float:
        """Its Renyi divergence at ``alpha`` is at most this. ICML 2021, Theorem 1."""
        return distributed_renyi(
            alpha,
            l2_squared=self.l2_squared,
            l1=self.l1,
            coordinates=self.coordinates,
            variance=self.shares * self.share_variance,
            tau=tau(self.shares, self.share_variance),
        )


def distributed_renyi(
    alpha: float, *, l2_squared: int, l1: int, coordinates: int, variance: Fraction, tau: float
) -> float:
    """The least of the three bounds on a sum of discrete Gaussians, rounded up.

    Args:
        alpha: order, above 1.
        l2_squared, l1: D2^2 and D1 of one unit.
        coordinates: d.
        variance: of the whole noise, shares * share variance.
        tau: of the function of that name.
    """
    if alpha <= 1:
        raise ValueError("an order is above 1")
    ratio = float_up(Fraction(l2_squared) / variance)  # (D2 / sig)^2
    sig = math.sqrt(float(variance)) / _PAD
    d = coordinates
    first = alpha / 2 * ratio + tau * d
    second = alpha / 2 * (ratio + 2 * l1 * tau / sig + tau**2 * d)
    third = alpha / 2 * (math.sqrt(ratio) + math.sqrt(d) * tau) ** 2
    return min(first, second, third) * _PAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Skellam:
    """A sum with Skellam noise, which stays Skellam when shares are added. Whole orders only.

    Source: Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated
    Learning", NeurIPS 2021, Theorem 3.5.
    """

    l2_squared: int
    l1: int
    variance: Fraction  # mu, of the whole noise

    def __post_init__(self) -> None:
        if not 1 <= self.l1 <= self.l2_squared or self.variance <= 0:
            raise ValueError("want 1 <= D1 <= D2 squared and a variance above 0")

    def renyi(self, alpha: float) -> float:
        """Its Renyi divergence at the whole order ``alpha`` is at most this."""
        if alpha <= 1 or alpha != int(alpha):
            raise ValueError("Skellam noise is accounted at whole orders above 1")
        a, mu, l2, l1 = Fraction(alpha), self.variance, self.l2_squared, self.l1
        extra = min(((2 * a - 1) * l2 + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
        return float_up(a * l2 / (2 * mu) + extra)


Event = SampledGaussian | DistributedDiscreteGaussian | Skellam


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """An event, how often it happened, and what each time adds to delta.

    ``failure``: the chance that the sensitivity did not hold. ``distance``: total variation between
    the noise that was drawn and that of the event, over all coordinates and shares.
    """

    event: Event
    count: int = 1
    relation: Relation
    unit: Unit
    failure: Fraction = Fraction(0)
    distance: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("a charge counts at least 1")
        if self.failure < 0 or self.distance < 0:
            raise ValueError("failure and distance are not negative")

    def times(self, n: int) -> Charge:
        """The same n times."""
        return Charge(
            event=self.event,
            count=self.count * n,
            relation=self.relation,
            unit=self.unit,
            failure=self.failure,
            distance=self.distance,
        )


def charge_for_sum(
    sensitivity: IntegerSensitivity,
    *,
    share_variance: Fraction,
    shares: int,
    coordinate_distance: Fraction,
) -> Charge:
    """What one release of a sum with distributed discrete Gaussian noise costs.

    Args:
        sensitivity: of one unit.
        share_variance: of the noise of each node, ``sensitivity.share_variance``.
        shares: m_min - c_dp.
        coordinate_distance: ``NoiseTable.distance``. Each share of each coordinate adds it; noise
            of nodes beyond ``shares`` adds none, being a function of what is already hidden.
    """
    return Charge(
        event=DistributedDiscreteGaussian(
            l2_squared=sensitivity.l2_squared,
            l1=sensitivity.l1,
            coordinates=sensitivity.coordinates,
            share_variance=share_variance,
            shares=shares,
        ),
        relation=sensitivity.relation,
        unit=sensitivity.unit,
        failure=sensitivity.failure,
        distance=coordinate_distance * shares * sensitivity.coordinates,
    )


def charge_for_sampled_sum(
    sensitivity: IntegerSensitivity,
    *,
    sampling_rate: Fraction,
    share_variance: Fraction,
    shares: int,
    coordinate_distance: Fraction,
) -> Charge:
    """What one step costs whose noise is a sum of shares: ``record-distributed``.

    Args:
        sensitivity: of one record.
        sampling_rate: of the Poisson sample at the site whose records are meant.
        share_variance, shares, coordinate_distance: as in ``charge_for_sum``.

    The sum of the shares is not quite a discrete Gaussian: probabilities differ by a factor of at
    most e^tau in each coordinate, so by at most tau * d in total variation, which is added to the
    distance. With one share tau is 0: ``record-local``.

    Raises:
        ValueError: a share of variance below LEAST_SHARE_VARIANCE.
    """
    if share_variance < LEAST_SHARE_VARIANCE:
        raise ValueError(f"a share has a variance of at least {LEAST_SHARE_VARIANCE}")
    d = sensitivity.coordinates
    square = shares * share_variance / sensitivity.l2_squared
    root = Fraction(math.isqrt((square.numerator << 128) // square.denominator), 1 << 64)
    return Charge(
        event=SampledGaussian(
            sampling_rate=rate_up(sampling_rate),
            noise_multiplier=multiplier_down(root),
            discrete=True,
        ),
        relation=sensitivity.relation,
        unit=sensitivity.unit,
        failure=sensitivity.failure,
        distance=(coordinate_distance * shares + Fraction(tau(shares, share_variance))) * d,
    )
