"""Epsilon in millionths, always rounded up: what is compared with the policy's numbers."""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from policies.document import MAX_NUMBER
from policies.privacy.accounting import account_renyi
from policies.privacy.claim import Claim


def cost_of_one(claim: Claim, *, delta: float) -> int:
    """What one round of a claim costs by itself, millionths of epsilon."""
    return micro(account_renyi([claim.charge()], delta=delta).epsilon)


def micro(epsilon: float) -> int:
    """Millionths, rounded up; what is not finite is beyond every bound."""
    if not math.isfinite(epsilon) or epsilon * 1e6 > MAX_NUMBER:
        return MAX_NUMBER + 1
    return max(0, math.ceil(epsilon * 1e6))


@lru_cache(maxsize=1)
def accountant_version() -> str | None:
    """Of the package that computes epsilon here; None: it is not installed."""
    try:
        return version("dp-accounting")
    except PackageNotFoundError:
        return None
