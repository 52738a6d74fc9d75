"""Golden vectors of the privacy terms: one plan of each private mode, and its digest.

The claims that follow from them are in ``tests/unit/data``: this package does not know policies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from protocols.plan import Plan
from protocols.plan_privacy import PRIVATE_MODES

_KEYS: Final = {name: digit * 64 for name, digit in (("a", "1"), ("b", "2"), ("c", "3"))}
_RECORD: Final[dict[str, Any]] = {
    "unit": "document",
    "max_sequences": 4,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "sampling_rate": 0.05,
    "expected_batch": 16.0,
    "delta": "1e-5",
}
_PARTS: Final[dict[str, dict[str, Any]]] = {
    "record-local": {
        "privacy": {**_RECORD, "steps": 10},
        "local_step": {"kind": "builtin", "max_steps": 10},
    },
    "record-distributed": {
        "privacy": {**_RECORD, "steps": 1, "colluders": 1},
        "local_step": {
            "kind": "builtin",
            "max_steps": 1,
            "optimizer": "sgd",
            "lr": 1.0,
            "keep_optimizer": False,
        },
        "vector": {"scale": {"mode": "fixed", "exponent": 12}},
    },
    "institution": {
        "privacy": {
            "unit": "institution",
            "clip_norm": 1.0,
            "noise_multiplier": 1.0,
            "delta": "1e-5",
            "colluders": 1,
            "insist": True,
        },
        "vector": {"scale": {"mode": "fixed", "exponent": 10}},
    },
}


def _plan(mode: str) -> Plan:
    return Plan.from_value(
        {
            "federation": "demo",
            "run": "r1",
            "mode": mode,
            "roster": ["a", "b", "c"],
            "min_participants": 3,
            "rounds": 2,
            "model": {"family": "vector", "manifest": "1" * 64, "initial": "2" * 64},
            "secagg": {"threshold": 3, "colluders": 1, "min_surviving": 3, "keys": _KEYS},
            **_PARTS[mode],
        }
    )


def plans() -> dict[str, Any]:
    """Every private mode: a plan in canonical form, and its digest."""
    return {
        mode: {"plan": _plan(mode).to_bytes().decode(), "digest": _plan(mode).digest}
        for mode in PRIVATE_MODES
    }


FILES: Final[dict[str, Callable[[], Any]]] = {"privacy.json": plans}
