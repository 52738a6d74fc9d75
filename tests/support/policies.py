"""The example policy and small changes of it, for tests."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from policies.consortium import ConsortiumPolicy

EXAMPLE = Path(__file__).resolve().parents[2] / "policies" / "example" / "consortium.json"


@cache
def example() -> ConsortiumPolicy:
    """The policy of the example federation."""
    return ConsortiumPolicy.from_bytes(EXAMPLE.read_bytes())


def changed_value(changes: dict[str, Any], base: ConsortiumPolicy | None = None) -> dict[str, Any]:
    """A policy as JSON with some values replaced; keys are dotted paths, ``-`` removes."""
    value = deepcopy((base or example()).to_value())
    for path, new in changes.items():
        *way, last = path.split(".")
        at = value
        for name in way:
            at = at[int(name)] if isinstance(at, list) else at[name]
        if new == "-":
            del at[last]
        else:
            at[last] = new
    return value


def policy(changes: dict[str, Any] | None = None, **plain: Any) -> ConsortiumPolicy:
    """The example policy with some values replaced."""
    return ConsortiumPolicy.from_value(changed_value({**(changes or {}), **plain}))
