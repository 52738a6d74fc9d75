"""What the node's journal tells: values without a database behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from node_agent.rules import Refusal
from protocols.identifiers import Digest, RoundId
from protocols.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run this node knows."""

    plan: Plan
    plan_digest: Digest
    stopped: Refusal | None  # why it takes no further part


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """What this node said about a round."""

    round: RoundId
    index: int
    start_root: Digest
    joined: bool
    refusal: Refusal | None  # of a decline
    outcome: str | None  # "ready" | "leave" | None
    left: Refusal | None  # of a leave: code and reason
    update: Digest | None = None  # root of the update that it is ready with; None: made as needed


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRecord:
    """A vector that was made and signed for one attempt."""

    round: RoundId
    attempt: int
    header: bytes
    signature: bytes = field(repr=False)
    unit_hashes: tuple[bytes, ...] = field(repr=False)
    file: str
    receipt: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmRecord:
    """The model this node computed from a released sum."""

    round: RoundId
    sum: Digest
    published: Digest
    computed: Digest | None  # None: no model could be computed
    objection: str
    detail: str
    answered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of `minga node journal`."""

    id: int
    at: datetime  # UTC
    run: str
    number: int | None
    what: str
    detail: dict[str, Any]
