"""The status file: what the agent is doing, written by it and read by `minga node status`.

It is a courtesy, never an input to a decision: what counts is in the journal. Replaced whole, not
synced: after a power failure an old status is no harm.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from protocols.canonical import parse_json
from protocols.errors import MalformedMessageError

STATUS_SCHEMA: Final = "minga.node-status/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One run."""

    run: str
    status: str
    round: str  # empty before the first
    phase: str
    why: str  # of the last decision
    doing: tuple[str, ...] = ()  # actions under way
    stopped: str = ""  # why this node takes no further part
    declined: str = ""  # why it does not take part in the round
    privacy: str = ""  # what the run's sums promise


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """What `minga node status` shows of a running agent."""

    schema: str = STATUS_SCHEMA
    node: str
    federation: str
    at: str  # ISO 8601, UTC
    pid: int
    state: str  # "running" | "paused"
    coordinator: str
    connected: bool
    trouble: str  # of the connection; empty: none
    clock_offset_s: float | None  # coordinator's clock minus ours
    certificate_until: str
    capability: str = ""  # what the site can train
    workers: dict[str, str] = field(default_factory=dict)
    runs: tuple[RunStatus, ...] = ()


def write_status(path: Path, status: NodeStatus) -> None:
    """Replace the status file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(asdict(status), indent=1, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def read_status(path: Path) -> dict[str, Any] | None:
    """The last status; None where there is none or it cannot be read."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, MalformedMessageError):
        return None
    if not isinstance(value, dict) or value.get("schema") != STATUS_SCHEMA:
        return None
    return value


def iso(at: datetime) -> str:
    """``2026-01-31T12:00:00Z``."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
