"""What one update costs, as a value for the log; and the epsilon that many of them come to.

A node puts its claim into ``update.commit``; everybody else derives the same from the plan
(``claim_of``) and compares. It says which mechanism ran and nothing about data. It holds no floats:
numbers that must be exact are text. Leaves of a mode that is not private hold no claim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from policies.privacy.accounting import Guarantee, account_renyi
from policies.privacy.events import (
    Charge,
    DistributedDiscreteGaussian,
    Event,
    SampledGaussian,
    Skellam,
)
from policies.privacy.sensitivity import Relation, Unit
from policies.privacy.terms import noise_terms
from protocols.errors import MalformedMessageError
from protocols.plan import Plan

SCHEMA: Final = "minga.privacy-claim/1"


def _float_text(value: str) -> str:
    if repr(float(value)) != value:
        raise ValueError("not the shortest text of a float")
    return value


def _fraction_text(value: str) -> str:
    if str(Fraction(value)) != value:
        raise ValueError("not a fraction in lowest terms")
    return value


FloatText = Annotated[
    str,
    Field(pattern=r"^[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?$", max_length=32),
    AfterValidator(_float_text),
]
FractionText = Annotated[
    str, Field(pattern=r"^[0-9]+(/[0-9]+)?$", max_length=2048), AfterValidator(_fraction_text)
]
WholeText = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,39}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class SampledGaussianClaim(_Strict):
    """A Poisson sample, clipped, with Gaussian noise on its sum."""

    kind: Literal["sampled-gaussian"] = "sampled-gaussian"
    sampling_rate: FloatText
    noise_multiplier: FloatText
    discrete: bool


class DistributedClaim(_Strict):
    """A sum of clipped updates with shares of discrete Gaussian noise."""

    kind: Literal["distributed-discrete-gaussian"] = "distributed-discrete-gaussian"
    l2_squared: WholeText
    l1: WholeText
    coordinates: WholeText
    share_variance: FractionText
    shares: int = Field(ge=1, le=64)


class Claim(_Strict):
    """What one round of one plan costs each institution whose update may be in its sum."""

    schema_: Literal["minga.privacy-claim/1"] = Field(default=SCHEMA, alias="schema")
    mode: Literal["record-local", "record-distributed", "institution"]
    dataset: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    unit: Literal["document", "sequence", "institution"]
    relation: Literal["add_or_remove_one", "replace_special"]
    delta: str = Field(max_length=40)
    count: int = Field(ge=1, le=2**53 - 1)
    failure: FractionText
    distance: FractionText
    event: Annotated[SampledGaussianClaim | DistributedClaim, Field(discriminator="kind")]

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    @classmethod
    def from_value(cls, value: Any) -> Claim:
        """Read a claim from parsed JSON.

        Raises:
            MalformedMessageError: and nothing else.
        """
        try:
            claim = cls.model_validate(value)
            delta = Decimal(claim.delta)
            if not 0 < delta < 1:
                raise ValueError("delta is above 0 and below 1")
            claim.charge()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "claim"
            raise MalformedMessageError(f"privacy claim: {where}: {first['msg']}") from None
        except (ValueError, ArithmeticError) as error:
            raise MalformedMessageError(f"privacy claim: {error}") from None
        return claim

    def to_value(self) -> dict[str, Any]:
        """As JSON, for the leaf."""
        return self.model_dump(mode="json", by_alias=True)

    def charge(self) -> Charge:
        """What is composed. Raises: ValueError: numbers that no mechanism has."""
        event: Event
        if isinstance(self.event, SampledGaussianClaim):
            event = SampledGaussian(
                sampling_rate=float(self.event.sampling_rate),
                noise_multiplier=float(self.event.noise_multiplier),
                discrete=self.event.discrete,
            )
        else:
            event = DistributedDiscreteGaussian(
                l2_squared=int(self.event.l2_squared),
                l1=int(self.event.l1),
                coordinates=int(self.event.coordinates),
                share_variance=Fraction(self.event.share_variance),
                shares=self.event.shares,
            )
        return Charge(
            event=event,
            count=self.count,
            relation=Relation(self.relation),
            unit=Unit(self.unit),
            failure=Fraction(self.failure),
            distance=Fraction(self.distance),
        )


def claim_of(plan: Plan, index: int, coordinates: int) -> Claim | None:
    """The claim of the plan's round ``index``; None: the round spends nothing, or has no privacy.

    Args:
        plan: of the run.
        index: which of the plan's rounds.
        coordinates: model coordinates that a training round exchanges.

    Raises:
        PlanRefusedError: as ``noise_terms``.
    """
    if plan.privacy is None or not plan.trains_in(index):
        return None
    charge = noise_terms(plan, coordinates).charge
    return Claim(
        mode=plan.mode,  # type: ignore[arg-type]  # a mode with privacy terms
        dataset=plan.privacy.dataset,
        unit=plan.privacy.unit,
        relation=charge.relation.value,
        delta=plan.privacy.delta,
        count=charge.count,
        failure=str(charge.failure),
        distance=str(charge.distance),
        event=_event_claim(charge.event),
    )


def _event_claim(event: Event) -> SampledGaussianClaim | DistributedClaim:
    match event:
        case SampledGaussian():
            return SampledGaussianClaim(
                sampling_rate=repr(event.sampling_rate),
                noise_multiplier=repr(event.noise_multiplier),
                discrete=event.discrete,
            )
        case DistributedDiscreteGaussian():
            return DistributedClaim(
                l2_squared=str(event.l2_squared),
                l1=str(event.l1),
                coordinates=str(event.coordinates),
                share_variance=str(event.share_variance),
                shares=event.shares,
            )
        case Skellam():
            raise ValueError("no plan mode uses Skellam noise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one institution's data set has spent on one kind of unit, over all runs."""

    institution: str
    dataset: str
    unit: Unit
    claims: int
    guarantee: Guarantee  # at the smallest delta that any of the claims names


def spent_by(claims: Iterable[tuple[str, Claim]]) -> tuple[Spent, ...]:
    """Epsilon of each (institution, data set, unit), recomputed from what was claimed.

    Args:
        claims: institution and claim of every update that counts as spent: released or burned.

    Returns:
        In ascending order of institution, data set and unit.
    """
    groups: dict[tuple[str, str, str], list[Claim]] = {}
    for institution, claim in claims:
        groups.setdefault((institution, claim.dataset, claim.unit), []).append(claim)
    found = []
    for (institution, dataset, unit), group in sorted(groups.items()):
        least = float(min(Decimal(claim.delta) for claim in group))
        guarantee = account_renyi(_gathered(group), delta=least)
        found.append(
            Spent(
                institution=institution,
                dataset=dataset,
                unit=Unit(unit),
                claims=len(group),
                guarantee=guarantee,
            )
        )
    return tuple(found)


def _gathered(claims: Iterable[Claim]) -> list[Charge]:
    """Equal claims as one charge: composing it is one multiplication instead of many."""
    counts: dict[Claim, int] = {}
    for claim in claims:
        counts[claim] = counts.get(claim, 0) + 1
    return [claim.charge().times(count) for claim, count in counts.items()]
