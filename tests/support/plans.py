"""Small plans for tests."""

from __future__ import annotations

from typing import Any

from protocols.plan import Plan
from protocols.tensors.manifest import Manifest, TensorSpec

MANIFEST = Manifest((TensorSpec("vector", (1000,)),))


def plan_value(**changes: Any) -> dict[str, Any]:
    """A plan of three nodes over a vector of 1,000 coordinates, as a JSON value."""
    value: dict[str, Any] = {
        "federation": "demo",
        "run": "r1",
        "roster": ["a", "b", "c"],
        "min_participants": 2,
        "rounds": 2,
        "model": {"family": "vector", "manifest": MANIFEST.digest, "initial": "1" * 64},
        "local_step": {"kind": "synthetic", "synthetic": {"delta": 0.25}},
    }
    return value | changes


def plan(**changes: Any) -> Plan:
    """The same as a value."""
    return Plan.from_value(plan_value(**changes))
