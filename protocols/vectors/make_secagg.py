"""Golden vectors of the secure sum: primitives, and one attempt of four members."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from protocols.secagg.vectors import documents


def _value(name: str) -> Any:
    return json.loads(documents()[name])


FILES: Final[dict[str, Callable[[], Any]]] = {
    name: partial(_value, name) for name in ("secagg.json", "secagg-messages.json")
}
