"""Small plans of the private modes, for tests."""

from __future__ import annotations

from typing import Any

from protocols.plan import Plan
from tests.support.plans import plan_value

KEYS = {name: digit * 64 for name, digit in (("a", "1"), ("b", "2"), ("c", "3"))}
SECAGG = {"threshold": 3, "colluders": 1, "min_surviving": 3, "keys": KEYS}
_RECORD = {
    "unit": "document",
    "max_sequences": 4,
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "sampling_rate": 0.05,
    "expected_batch": 16.0,
    "delta": "1e-5",
}
_STEP = {"kind": "synthetic", "synthetic": {"delta": 0.25}}
_PARTS: dict[str, dict[str, Any]] = {
    "record-local": {"privacy": _RECORD | {"steps": 10}, "local_step": _STEP},
    "record-distributed": {
        "privacy": _RECORD | {"steps": 1, "colluders": 1},
        "local_step": _STEP | {"optimizer": "sgd", "lr": 1.0, "keep_optimizer": False},
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
        "local_step": _STEP,
        "vector": {"scale": {"mode": "fixed", "exponent": 10}},
    },
}


def private_value(mode: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A plan of ``mode`` as a JSON value.

    Args:
        mode: a private one.
        changes: fields to set; a path like ``privacy.steps`` sets one inside a part, and None
            takes it out.
    """
    value = plan_value(mode=mode, min_participants=3, secagg=SECAGG, **_PARTS[mode])
    for path, new in (changes or {}).items():
        spot, parts = value, path.split(".")
        for part in parts[:-1]:
            spot[part] = dict(spot.get(part) or {})
            spot = spot[part]
        if new is None:
            spot.pop(parts[-1], None)
        else:
            spot[parts[-1]] = new
    return value


def private_plan(mode: str, changes: dict[str, Any] | None = None) -> Plan:
    """The same as a value."""
    return Plan.from_value(private_value(mode, changes))
