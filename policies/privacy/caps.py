"""What a federation allows its institutions to spend, and which of its words applies to whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from policies.consortium import ConsortiumPolicy
from policies.document import period_days
from policies.privacy.budget import Allowance
from policies.privacy.claim import Claim
from policies.privacy.sensitivity import Unit

EVERYBODY: Final = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """What the federation allows an institution's data set to spend."""

    institution: str  # "*": every one that has no cap of its own
    allowance: Allowance


def cap_for(caps: Sequence[Cap], institution: str, claim: Claim) -> Allowance | None:
    """The cap that applies to a spend; None: there is none."""
    unit = Unit(claim.unit)
    fitting = [
        cap
        for cap in caps
        if (cap.allowance.dataset, cap.allowance.unit) == (claim.dataset, unit)
        and cap.institution in (institution, EVERYBODY)
    ]
    return next((cap.allowance for cap in sorted(fitting, key=_general)), None)


def consortium_cap(
    policy: ConsortiumPolicy,
    institution: str,
    claim: Claim,
    classes: Iterable[str],
    now: datetime,
) -> Allowance | None:
    """What the signed policy allows an institution's data set to spend; None: nothing at all.

    The period is a window that ends now: what was spent in it counts, nothing is carried over.

    Args:
        classes: of data that the plan may use; the largest of their budgets counts, since only the
            site knows which one its collection is.
        now: UTC.
    """
    budget = policy.privacy.budgets.largest(institution, classes)
    if budget.eps_total_micro == 0:
        return None
    return Allowance(
        dataset=claim.dataset,
        unit=Unit(claim.unit),
        epsilon=budget.eps_total_micro / 1_000_000,
        delta=float(claim.delta),
        starts_at=now - timedelta(days=period_days(budget.period)),
    )


def _general(cap: Cap) -> bool:
    return cap.institution == EVERYBODY
