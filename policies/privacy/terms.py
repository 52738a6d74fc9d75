"""From a plan and a number of coordinates to grid, noise, clamp limit and cost of one round.

Everybody derives the same values: the node before it joins, the coordinator before it takes a plan,
the planner before anybody computes, the auditor afterwards.

    record-local         grid 2**-e with e the least that keeps rounding small beside C
    record-distributed   grid of the plan's fixed scale; one record moves a site's vector by C / B
    institution          grid of the plan's fixed scale; a site's vector is at most C long

Terms that cannot keep their promise, or would drown what they are made for, are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, isqrt
from typing import Final

from policies.privacy.events import Charge, charge_for_sampled_sum, charge_for_sum
from policies.privacy.sensitivity import (
    IntegerSensitivity,
    Unit,
    institution_update,
    record_in_sum,
    scaled_clip,
)
from protocols.errors import PlanRefusedError
from protocols.noise.noise_table import MOST_COLUMNS, MOST_DISTANCE, TAIL
from protocols.plan import Plan
from protocols.plan_privacy import Privacy
from protocols.tensors.ring import Ring

MOST_NOISE_PER_SIGNAL: Final = 10.0  # mode institution; beyond only where the plan insists
KAPPA: Final = 8  # deviations of a sum's noise that must fit the ring: 1e-15 of coordinates beyond
_MOST_SIGMA: Final = (MOST_COLUMNS // 2 - 1) // TAIL - 1
_FLOAT_SUM: Final = Fraction(1, 2**16)  # of C: a sum of records in float64 errs by far less
_FLOAT_ULPS: Final = Fraction(1, 2**21)  # of a clamped value: both sums, four operations each


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseTerms:
    """Grid, noise and cost. ``charge`` is that of one round in which a site trains."""

    exponent: int  # the grid is 2**-exponent in parameter units
    sensitivity: IntegerSensitivity
    share_variance: Fraction  # of one site's noise, squared grid steps
    shares: int  # honest shares that every opened sum holds
    charge: Charge
    limit: int | None  # largest magnitude a site sends before noise; None: as without privacy
    noise_per_signal: float  # L2 norms, of the sum with every site in it; the signal at its largest

    @property
    def share_sigma(self) -> float:
        """Deviation of one site's noise in each coordinate, in parameter units."""
        return math.ldexp(math.sqrt(float(self.share_variance)), -self.exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNoise:
    """The noise of one step of DP-SGD at a site, on the sum of clipped gradients."""

    exponent: int  # the clipped sum is rounded by chance to multiples of 2**-exponent
    sensitivity: IntegerSensitivity
    variance: Fraction  # of the discrete Gaussian, squared grid steps


def _root(x: Fraction) -> float:
    return math.sqrt(float(x))


def _root_up(n: int) -> int:
    """The least whole number whose square is at least n; n at least 1."""
    return isqrt(n - 1) + 1


def _short(charge: Charge) -> Charge:
    """The charge with its distance rounded up to a power of two: the same text everywhere."""
    d = charge.distance
    if not d:
        return charge
    exponent = (d.denominator // d.numerator).bit_length() - 1
    return replace(charge, distance=Fraction(1, 1 << exponent) if exponent > 0 else d)


def _unit(privacy: Privacy) -> Unit:
    return Unit(privacy.unit)


def local_noise(privacy: Privacy, coordinates: int) -> LocalNoise:
    """Grid and noise of a step in mode ``record-local``.

    The grid is at most C / (4 * sqrt d), so that rounding lengthens what one record does by less
    than 2 %; coarser, and charged as such, where the table of the noise would grow too large.

    Args:
        privacy: of a plan in that mode.
        coordinates: d, trainable coordinates of the round.
    """
    clip, z = Fraction(privacy.clip_norm), Fraction(privacy.noise_multiplier)
    wanted, exponent = 4 * _root_up(coordinates), -100
    while exponent < 100 and scaled_clip(clip, exponent) < wanted:
        exponent += 1
    while True:
        scaled = scaled_clip(clip, exponent)
        slack = scaled * _FLOAT_SUM
        sensitivity = record_in_sum(scaled, coordinates, unit=_unit(privacy), slack=slack)
        if z**2 * sensitivity.l2_squared <= _MOST_SIGMA**2 or exponent == -100:
            break
        exponent -= 1
    variance = sensitivity.share_variance(z, 1)
    return LocalNoise(exponent=exponent, sensitivity=sensitivity, variance=variance)


def noise_terms(plan: Plan, coordinates: int) -> NoiseTerms:
    """Grid, noise and cost of the plan's training rounds.

    Args:
        plan: in a mode that is differentially private.
        coordinates: d, model coordinates that a round exchanges.

    Raises:
        PlanRefusedError: privacy.share_too_small, privacy.noise_too_large, privacy.headroom,
            privacy.noise_drowns.
        ValueError: the plan is in another mode.
    """
    privacy, secagg = plan.privacy, plan.secagg
    if privacy is None or secagg is None:
        raise ValueError(f"mode {plan.mode} is not differentially private")
    if coordinates < 1:
        raise PlanRefusedError("a private round exchanges no coordinate", rule="privacy.headroom")
    if plan.mode == "record-local":
        return _record_local(plan, privacy, coordinates)
    ring, n = Ring(plan.vector.ring_bits), len(plan.roster)
    exponent = plan.vector.scale.exponent
    if exponent is None:
        raise ValueError("mode needs fixed scales")  # the plan refuses it
    clip = Fraction(privacy.clip_norm)
    if plan.mode == "institution":
        scaled = longest = scaled_clip(clip, exponent)
        sensitivity = institution_update(scaled, coordinates)
    else:
        batch = Fraction(privacy.expected_batch or 1)
        scaled, longest = scaled_clip(clip / batch, exponent), scaled_clip(clip, exponent)
        slack = _root_up(coordinates) * ring.clamp_limit(n) * _FLOAT_ULPS
        sensitivity = record_in_sum(scaled, coordinates, unit=_unit(privacy), slack=slack)
    shares = privacy.shares(max(secagg.threshold, secagg.min_surviving))
    variance = sensitivity.share_variance(Fraction(privacy.noise_multiplier), shares)
    if variance > _MOST_SIGMA**2:
        raise PlanRefusedError(
            f"a site's noise has a deviation of {_root(variance):.0f} steps and may have"
            f" {_MOST_SIGMA}: choose a coarser grid (vector.scale.exponent)",
            rule="privacy.noise_too_large",
        )
    limit = _clamp_limit(ring, n, variance, longest, coordinates)
    if plan.mode == "institution":
        charge = charge_for_sum(
            sensitivity, share_variance=variance, shares=shares, coordinate_distance=MOST_DISTANCE
        )
    else:
        charge = charge_for_sampled_sum(
            sensitivity,
            sampling_rate=Fraction(privacy.sampling_rate or 1),
            share_variance=variance,
            shares=shares,
            coordinate_distance=MOST_DISTANCE,
        )
    ratio = math.sqrt(coordinates * n * float(variance)) / (n * float(longest))
    terms = NoiseTerms(
        exponent=exponent,
        sensitivity=sensitivity,
        share_variance=variance,
        shares=shares,
        charge=_short(charge),
        limit=limit,
        noise_per_signal=ratio,
    )
    _check_worth(plan, privacy, terms)
    return terms


def _record_local(plan: Plan, privacy: Privacy, coordinates: int) -> NoiseTerms:
    local = local_noise(privacy, coordinates)
    if local.variance > _MOST_SIGMA**2:
        raise PlanRefusedError(
            "the noise of a step needs too large a table", rule="privacy.noise_too_large"
        )
    steps = privacy.steps or 1
    one = charge_for_sampled_sum(
        local.sensitivity,
        sampling_rate=Fraction(privacy.sampling_rate or 1),
        share_variance=local.variance,
        shares=1,
        coordinate_distance=MOST_DISTANCE,
    )
    # Of the mean gradient: every record's as long as it may be, all in one direction.
    signal = privacy.clip_norm * (privacy.expected_batch or 1.0) * math.sqrt(len(plan.roster))
    noise = math.ldexp(_root(local.variance), -local.exponent) * math.sqrt(coordinates)
    return NoiseTerms(
        exponent=local.exponent,
        sensitivity=local.sensitivity,
        share_variance=local.variance,
        shares=1,
        charge=replace(_short(one), count=steps),
        limit=None,
        noise_per_signal=noise / signal,
    )


def _clamp_limit(
    ring: Ring, nodes: int, variance: Fraction, longest: Fraction, coordinates: int
) -> int:
    """What a site's integers are clamped to, so that the sum and its noise fit the ring.

    Raises:
        PlanRefusedError: an ordinary update would not fit.
    """
    room = ring.noisy_limit() - ceil(KAPPA * math.sqrt(nodes * (float(variance) + 0.25)))
    limit = room // nodes
    usual = min(float(longest), KAPPA * float(longest) / math.sqrt(coordinates))
    if limit < max(1.0, usual):
        raise PlanRefusedError(
            f"{nodes} updates and their noise do not fit a ring of {ring.bits} bits: choose more"
            " bits (vector.ring_bits) or a coarser grid (vector.scale.exponent)",
            rule="privacy.headroom",
        )
    return min(limit, ring.clamp_limit(nodes))


def _check_worth(plan: Plan, privacy: Privacy, terms: NoiseTerms) -> None:
    if plan.mode != "institution" or privacy.insist:
        return
    if terms.noise_per_signal > MOST_NOISE_PER_SIGNAL:
        raise PlanRefusedError(
            f"the noise is at least {terms.noise_per_signal:.3g} times as long as what"
            f" {len(plan.roster)} institutions can say together in {terms.sensitivity.coordinates}"
            " coordinates: no model comes of it. A plan that wants it nevertheless says"
            " privacy.insist = true",
            rule="privacy.noise_drowns",
        )
