"""What a federation allows its institutions to spend, and which of its words applies to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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


def _general(cap: Cap) -> bool:
    return cap.institution == EVERYBODY
