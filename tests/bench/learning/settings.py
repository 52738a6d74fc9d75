"""How much is trained, and at which rates. Every row of a benchmark has the same budget of tokens.

The rates are those that ``--tune`` found on other held-out text and another seed than the rows use;
the tuning runs are in the report too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Sizes of one benchmark."""

    hidden: int = 48
    layers: int = 2
    sequence: int = 96  # tokens, which are bytes
    batch: int = 8  # sequences of a local step
    rounds: int = 10
    inner: int = 12  # local steps a round and site
    base_steps: int = 480  # central, on the public part
    scored: int = 1  # how many times in a run all held-out text is scored, before the end
    train_bytes: int = 300_000  # of each site
    valid_bytes: int = 12_000  # of each site
    lora_rank: int = 8
    private_rounds: int = 6
    private_steps: int = 3  # a round
    private_batch: int = 32  # documents, expected

    @property
    def digest(self) -> str:
        """What cells on disk belong to."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


FULL = Amount()
QUICK = Amount(
    rounds=6,
    inner=8,
    base_steps=100,
    scored=1,
    train_bytes=100_000,
    valid_bytes=6_000,
    private_rounds=3,
    private_steps=2,
    private_batch=16,
)
TINY = Amount(  # for tests
    hidden=32,
    layers=1,
    sequence=64,
    rounds=3,
    inner=6,
    base_steps=20,
    scored=1,
    train_bytes=12_000,
    valid_bytes=1_500,
    lora_rank=4,
    private_rounds=1,
    private_steps=2,
    private_batch=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was tuned for a kind of row."""

    lr: float
    outer: dict[str, Any] = field(default_factory=lambda: {"optimizer": "average", "lr": 1.0})
    warmup: int = 20
