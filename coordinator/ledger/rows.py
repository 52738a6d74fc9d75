"""What the ledger gives back: rows as frozen values, parsed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Literal

from protocols.canonical import hash_hex
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.plan import Plan
from protocols.rounds import Phase, Released, is_final

NodeStatus = Literal["active", "suspended"]
RunStatus = Literal["active", "done", "stopped", "failed"]


@lru_cache(maxsize=256)
def parse_plan(data: bytes) -> Plan:
    """A stored plan. Plans never change, so parsing one again would only cost time."""
    return Plan.from_bytes(data)


def model_root_of(snapshot: bytes) -> Digest:
    """The model root that a canonical snapshot document stands for."""
    return hash_hex("minga/snapshot/v1", snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """An enrolled institution."""

    node: NodeId
    signing_key: bytes  # raw Ed25519 public key
    status: NodeStatus
    enrolled_at: datetime  # UTC
    seen_at: datetime | None  # UTC; None: never
    state: str  # "running" | "paused" | ""
    agent_version: str
    approval: bytes | None = field(default=None, repr=False)  # signed by its institution


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRow:
    """A certificate that was issued."""

    serial: int
    spki_sha256: Digest
    subject_role: str
    subject_name: str
    not_after: datetime  # UTC
    der: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run."""

    run: RunId
    plan_bytes: bytes = field(repr=False)
    plan_digest: Digest
    snapshot: bytes = field(repr=False)  # canonical JSON: the initial model
    request: bytes | None = field(repr=False)  # JSON: what the operator signed; None: nothing
    status: RunStatus
    why: str
    submitted_at: datetime  # UTC
    ended_at: datetime | None  # UTC; None: still active

    @property
    def plan(self) -> Plan:
        """The parsed plan."""
        return parse_plan(self.plan_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """A round with its phase."""

    round: RoundId
    index: int  # which of the plan's rounds
    phase: Phase
    why: str  # of the last change
    opened_at: datetime  # UTC
    changed_at: datetime  # UTC
    start_snapshot: bytes = field(repr=False)
    next_snapshot: bytes | None = field(repr=False)  # None: no sum was opened
    sum: Digest | None  # None: no sum was opened
    metrics: dict[str, int] | None  # None: no sum was opened
    transcript: Digest | None  # how the sum was opened; None: no secure sum

    @property
    def attempt(self) -> int:
        """The attempt of the secure sum; 0 before there is one."""
        return getattr(self.phase, "attempt", 0)

    @property
    def final(self) -> bool:
        """Whether nothing can happen to the round any more."""
        return is_final(self.phase)

    @property
    def released(self) -> bool:
        """Whether its sum is public."""
        return isinstance(self.phase, Released) and self.phase.opened is not None

    @property
    def start_root(self) -> Digest:
        """The model root everybody in this round starts from."""
        return model_root_of(self.start_snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRow:
    """A vector on its way in."""

    upload_id: bytes
    round: RoundId
    attempt: int
    node: NodeId
    header: bytes
    signature: bytes
    unit_hashes: tuple[bytes, ...] = field(repr=False)
    total: int  # bytes
    began_at: datetime  # UTC
    finished_at: datetime | None  # UTC; None: not complete
    receipt: bytes | None  # None: not complete


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    """Bulk bytes of one node in one round."""

    round: RoundId
    node: NodeId
    up: int  # bytes
    down: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationRow:
    """What a node computed from a released sum."""

    round: RoundId
    node: NodeId
    model_root: str  # hex; "": none
    objection: str  # a code; "": it agrees
    detail: str
    received_at: datetime  # UTC


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What a local step cost, as a node claims it."""

    round: RoundId
    node: NodeId
    gpu_ms: int
    cpu_ms: int
    energy_mwh: int
    source: str  # of the energy: "measured" | "estimated" | "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimeRow:
    """When a round entered a phase."""

    round: RoundId
    phase: str
    entered_at: datetime  # UTC


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRow:
    """One change of state."""

    id: int
    at: datetime  # UTC
    run: RunId | None  # None: about the federation
    number: int | None  # None: not about one round
    transaction: str
    phase: str
    why: str
    node: NodeId | None  # None: no node caused it


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRow:
    """What a node said it is doing."""

    node: NodeId
    reports: bytes  # protobuf
    received_at: datetime  # UTC
