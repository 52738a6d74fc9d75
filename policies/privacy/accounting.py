"""The epsilon that charges come to. Rounded towards more privacy loss.

Renyi differential privacy composes every event here, at orders fixed beforehand; privacy loss
distributions are tighter and take Gaussian and Poisson-sampled Gaussian events only. Both are
Google's ``dp_accounting``; what it has no event for (sums of discrete Gaussians, Skellam) is added
to its Renyi divergences as a bound at each order.

What noise and sensitivity do not keep exactly is taken out of delta first:

    delta >= delta' + sum of failures + (1 + e^epsilon) * sum of distances

Composition takes the parameters of all events as fixed before the first. Where later ones depend on
what earlier ones released, give a single order, fixed in advance: then the bound is a Renyi filter
(Feldman and Zrnic, NeurIPS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from typing import Any, Final

from policies.privacy.events import (
    Charge,
    DistributedDiscreteGaussian,
    Event,
    SampledGaussian,
    Skellam,
    float_up,
)
from policies.privacy.sensitivity import Relation, Unit
from protocols.errors import PlanRefusedError

WHOLE_ORDERS: Final = tuple(float(a) for a in (*range(2, 65), 128, 256, 512, 1024))
# Those of dp_accounting and Opacus: for continuous noise only.
FRACTIONAL_ORDERS: Final = (
    *(1 + x / 10.0 for x in range(1, 100)),
    *(float(a) for a in (*range(11, 64), 128, 256, 512, 1024)),
)
_PAD: Final = 1.0 + 2.0**-40  # the float error of adding and converting, upwards
_SETTLES: Final = 60  # rounds of epsilon against delta; two are enough unless nothing is left


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """(epsilon, delta) differential privacy, for one unit and relation.

    ``epsilon`` is infinite where nothing can be promised.
    """

    epsilon: float
    delta: float
    relation: Relation | None  # None, as the unit: nothing was charged, which holds for any
    unit: Unit | None
    order: float | None  # the Renyi order that gave it; None for privacy loss distributions

    def printed(self, digits: int = 3) -> str:
        """Epsilon for people: rounded up."""
        if not math.isfinite(self.epsilon):
            return "unbounded"
        step = Decimal(1).scaleb(-digits)
        return str(Decimal(self.epsilon).quantize(step, rounding=ROUND_CEILING))


def _kind(charges: Sequence[Charge]) -> tuple[Relation | None, Unit | None]:
    """The one relation and unit of all charges. Raises: PlanRefusedError."""
    kinds = {(charge.relation, charge.unit) for charge in charges}
    if len(kinds) > 1:
        raise PlanRefusedError(
            "charges for different units or neighbouring relations cannot be added",
            rule="privacy.mixed_units",
        )
    return next(iter(kinds), (None, None))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError("delta is above 0 and below 1")


def _spare_delta(charges: Sequence[Charge], delta: float, epsilon: float) -> float:
    """What is left of delta at this epsilon, rounded down; may be negative."""
    failures = sum((c.failure * c.count for c in charges), Fraction(0))
    distances = sum((c.distance * c.count for c in charges), Fraction(0))
    if not failures and not distances:
        return delta
    if epsilon > 700 and distances:  # e^epsilon is beyond floats, and the promise beyond use
        return -math.inf
    taken = float_up(failures)
    if distances:
        taken += (1 + math.exp(epsilon)) * float_up(distances)
    return (delta - taken * _PAD) / _PAD


def _settle(charges: Sequence[Charge], delta: float, convert: Any) -> tuple[float, float | None]:
    """Epsilon and order, with delta shared between the mechanism and what it does not keep."""
    epsilon, order = 0.0, None
    for _ in range(_SETTLES):
        spare = _spare_delta(charges, delta, epsilon)
        if spare <= 0:
            return math.inf, None
        found, order = convert(spare)
        if found <= epsilon:
            return epsilon, order
        epsilon = found * _PAD
    return math.inf, None


def _supported_order(event: Event, alpha: float) -> bool:
    match event:
        case SampledGaussian(discrete=False) | DistributedDiscreteGaussian():
            return True
        case SampledGaussian() | Skellam():
            return alpha == int(alpha)


def renyi(charges: Sequence[Charge], orders: Sequence[float]) -> list[float]:
    """Renyi divergences of all charges together, one for each order.

    Raises:
        PlanRefusedError: charges for different units, or an event at an order it has no bound for.
    """
    from dp_accounting import (  # noqa: PLC0415 - heavy, and absent where nothing is accounted
        GaussianDpEvent,
        NeighboringRelation,
        PoissonSampledDpEvent,
    )
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    if not orders or any(alpha <= 1 for alpha in orders):
        raise ValueError("want at least one order, all above 1")
    relation, _ = _kind(charges)
    totals = [0.0] * len(orders)
    if relation is None:
        return totals
    accountant = RdpAccountant(list(orders), NeighboringRelation[relation.name])
    counts: dict[Event, int] = {}  # a run's rounds are one event many times: composed at once
    for charge in charges:
        counts[charge.event] = counts.get(charge.event, 0) + charge.count
    for event, count in counts.items():
        if not all(_supported_order(event, alpha) for alpha in orders):
            raise PlanRefusedError(
                "noise in whole numbers is accounted at whole orders only",
                rule="privacy.fractional_order",
            )
        if isinstance(event, SampledGaussian):
            step = GaussianDpEvent(event.noise_multiplier)
            if event.sampling_rate < 1:
                step = PoissonSampledDpEvent(event.sampling_rate, step)
            accountant.compose(step, count)
        else:
            for i, alpha in enumerate(orders):
                totals[i] += count * event.renyi(alpha)
    return [
        (own + float(library)) * _PAD
        for own, library in zip(totals, accountant.rdp.tolist(), strict=True)
    ]


def convert_renyi(
    curve: Sequence[float], orders: Sequence[float], delta: float
) -> tuple[float, float]:
    """Epsilon at ``delta`` of a Renyi curve, and the order that gave it.

    Source: Canonne, Kamath and Steinke, NeurIPS 2020, Proposition 12.
    """
    from dp_accounting.rdp import compute_epsilon  # noqa: PLC0415

    epsilon, order = compute_epsilon(list(orders), list(curve), delta)
    return float(epsilon) * _PAD, float(order)


def account_renyi(
    charges: Iterable[Charge], *, delta: float, orders: Sequence[float] = WHOLE_ORDERS
) -> Guarantee:
    """Epsilon by Renyi divergences: the least over ``orders``.

    Raises:
        PlanRefusedError: as ``renyi``.
    """
    all_charges = tuple(charges)
    _check_delta(delta)
    relation, unit = _kind(all_charges)
    curve = renyi(all_charges, orders)

    def convert(spare: float) -> tuple[float, float]:
        return convert_renyi(curve, orders, spare)

    epsilon, order = _settle(all_charges, delta, convert)
    return Guarantee(epsilon=epsilon, delta=delta, relation=relation, unit=unit, order=order)


def supports_pld(charges: Iterable[Charge]) -> bool:
    """Whether privacy loss distributions can take all of these."""
    return all(
        isinstance(charge.event, SampledGaussian) and not charge.event.discrete
        for charge in charges
    )


def account_pld(charges: Iterable[Charge], *, delta: float) -> Guarantee:
    """Epsilon by privacy loss distributions, discretised pessimistically at 1e-4.

    For an auditor's second opinion. Not a filter: only for parameters fixed beforehand.

    Raises:
        PlanRefusedError: an event it cannot take, or charges for different units.
    """
    from dp_accounting import (  # noqa: PLC0415
        GaussianDpEvent,
        NeighboringRelation,
        PoissonSampledDpEvent,
    )
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415

    all_charges = tuple(charges)
    _check_delta(delta)
    relation, unit = _kind(all_charges)
    if not supports_pld(all_charges):
        raise PlanRefusedError(
            "privacy loss distributions take continuous Gaussian noise only",
            rule="privacy.no_pld",
        )
    accountant = None
    if relation is not None:
        accountant = PLDAccountant(NeighboringRelation[relation.name])
        for charge in all_charges:
            event = charge.event
            if not isinstance(event, SampledGaussian):
                continue  # refused above
            step = GaussianDpEvent(event.noise_multiplier)
            if event.sampling_rate < 1:
                step = PoissonSampledDpEvent(event.sampling_rate, step)
            accountant.compose(step, charge.count)

    def convert(spare: float) -> tuple[float, None]:
        if accountant is None:
            return 0.0, None
        return float(accountant.get_epsilon(spare)) * _PAD, None

    epsilon, order = _settle(all_charges, delta, convert)
    return Guarantee(epsilon=epsilon, delta=delta, relation=relation, unit=unit, order=order)
