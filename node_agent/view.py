"""What the coordinator says, parsed once: a claim about each run, not yet a reason to act.

A phase can only be read with the terms of the plan that this node accepted, so it stays as it
came until the plan is known (``RoundSeen.phase``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from protocols.cohort import terms_of
from protocols.errors import MalformedMessageError
from protocols.gen import rounds_pb2
from protocols.identifiers import Digest, RoundId, RunId, parse_run_id
from protocols.plan import Plan
from protocols.rounds import Phase, Released
from protocols.tensors.snapshot import Snapshot
from protocols.wire import from_ms, phase_from_view, read_digest, read_round, read_text

_MAX_RUNS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSeen:
    """A round as the coordinator shows it."""

    round: RoundId
    index: int  # which of the plan's rounds
    raw_phase: rounds_pb2.PhaseView
    start: Snapshot
    following: Snapshot | None  # of a released round: the model it published
    transcript: Digest | None = None  # of a released secure sum: how it was opened

    def phase(self, plan: Plan) -> Phase:
        """Raises: MalformedMessageError."""
        return phase_from_view(self.raw_phase, terms_of(plan))

    @property
    def opened(self) -> bool:
        """Whether the sum is public."""
        return self.raw_phase.name == Released.__name__ and bool(self.raw_phase.sum)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeen:
    """A run on whose roster this node stands."""

    run: RunId
    plan_digest: Digest
    status: str  # "active" | "done" | "stopped" | "failed"
    current: RoundSeen | None
    last_released: RoundSeen | None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One answer to Sync."""

    version: int
    now: datetime  # UTC, the coordinator's clock
    runs: tuple[RunSeen, ...]


def _round(view: rounds_pb2.RoundView, run: RunId) -> RoundSeen:
    round_ = read_round(view.round)
    if round_.run != run:
        raise MalformedMessageError(f"round {round_} is shown under run {run}")
    following = Snapshot.from_bytes(view.next_snapshot) if view.next_snapshot else None
    return RoundSeen(
        round=round_,
        index=int(view.index),
        raw_phase=view.phase,
        start=Snapshot.from_bytes(view.start_snapshot),
        following=following,
        transcript=read_digest(view.transcript) if view.transcript else None,
    )


def read_view(answer: rounds_pb2.SyncResponse) -> View:
    """Read an answer to Sync.

    Raises:
        MalformedMessageError: a name, digest, snapshot or time that is none.
    """
    if len(answer.runs) > _MAX_RUNS:
        raise MalformedMessageError(
            f"{len(answer.runs)} runs at once; at most {_MAX_RUNS} are read"
        )
    runs = []
    for shown in answer.runs:
        run = parse_run_id(shown.run)
        runs.append(
            RunSeen(
                run=run,
                plan_digest=read_digest(shown.plan_digest),
                status=read_text(shown.status, what="a run's status", limit=40),
                current=_round(shown.current, run) if shown.HasField("current") else None,
                last_released=(
                    _round(shown.last_released, run) if shown.HasField("last_released") else None
                ),
            )
        )
    return View(version=int(answer.version), now=from_ms(int(answer.now_ms)), runs=tuple(runs))
