"""Acting on the round machine: look, decide and record in one transaction.

``protocols.rounds.step`` decides. Here its answer is written, with its reason, while the round's
row is locked: two events that arrive together are taken one after the other, each by the phase
that the one before it left. Split, both could act on the same old phase and one would be lost:
protocols/spec/round.md, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from coordinator.leaves import say_aggregate, say_closed, say_phase, say_plan, starts
from coordinator.ledger import RoundRow, RunRow, RunStatus, Tx
from coordinator.privacy import settle
from coordinator.secure_sum import Sum
from protocols.cohort import terms_of
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.rounds import (
    Aborted,
    Burned,
    Committing,
    Event,
    Opened,
    Phase,
    Released,
    Step,
    SumOpened,
    TimePassed,
    Training,
    open_round,
    step,
)
from protocols.tensors.snapshot import Snapshot

MAX_FAILURES: Final = 5  # rounds in a row without a release; then the run has failed
RETRY_AFTER: Final = timedelta(seconds=1)  # after one failed round; twice as long for each further


def advance(
    tx: Tx,
    round_id: RoundId,
    event: Event,
    now: datetime,
    *,
    transaction: str,
    node: NodeId | None = None,
    note: str = "",
    row: RoundRow | None = None,
) -> Step:
    """Tell a round what happened, and record what it became.

    An event that changes nothing (a repetition) writes nothing.

    Args:
        tx: an open transaction.
        round_id: which round.
        event: parsed, its sender verified.
        now: UTC.
        transaction: name for history, e.g. ``join``.
        node: who caused it, if a node did.
        note: what history should say before the machine's own reason.
        row: what ``tx.lock_round`` gave before in this transaction, if it was asked.

    Returns:
        The phase as recorded, and why.

    Raises:
        NotFoundError: there is no such round.
        WrongPhaseError, NotListedError, EquivocationError: see ``step``; nothing was written.
    """
    row = row or tx.lock_round(round_id)
    answer = step(round_id, row.phase, event, now)
    if answer.phase == row.phase:
        return answer
    settle(tx, row, answer.phase, now)
    tx.set_phase(
        round_id,
        answer.phase,
        f"{note}; {answer.why}" if note else answer.why,
        transaction,
        node,
        now=now,
        entered=is_new_phase(row.phase, answer.phase),
    )
    if tx.logs:
        _log(tx, row, answer.phase, now, node)
    return answer


def _log(tx: Tx, row: RoundRow, after: Phase, now: datetime, node: NodeId | None) -> None:
    """The leaves of a step, in its transaction."""
    plan, before = tx.run(row.round.run).plan, row.phase
    if isinstance(after, Training):  # who joined has judged the round before
        last = tx.last_released(row.round.run)
        if last is not None:
            say_closed(tx, plan, last.round, now, even_if_silent=True)
    ctx_deal = certificate = None
    if plan.secagg is not None:
        begun = starts(before, after)
        if begun is not None:
            summed = Sum.of(tx, replace(row, phase=after), plan, begun[0])
            ctx_deal = summed.started().ctx_deal
        elif isinstance(after, Aborted) and isinstance(before, Committing):
            certificate = Sum.of(tx, row, plan, before.attempt).abort_certificate()
    say_phase(
        tx,
        plan,
        row.round,
        before,
        after,
        now,
        actor=node,
        ctx_deal=ctx_deal,
        certificate=certificate,
    )


def is_new_phase(before: Phase, after: Phase) -> bool:
    """Whether a round went on: to another phase, another attempt, or from adding up to opened."""
    return type(before) is not type(after) or any(
        getattr(before, name, None) != getattr(after, name, None) for name in ("attempt", "opened")
    )


def why_now(row: RoundRow, now: datetime) -> str:
    """What the round is waiting for, as the machine itself would say it; decides nothing."""
    return step(row.round, row.phase, TimePassed(), now).why


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How a secure sum was opened: its transcript, as it is published and as it is logged."""

    blob: Digest  # root of its units
    sha256: Digest  # of its bytes
    certificate_sha256: Digest  # of the commits in it


# -- the course of a run -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRound:
    """The run needs another round."""

    number: int
    index: int  # which of the plan's rounds
    start_snapshot: bytes
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRun:
    """The run is over."""

    status: RunStatus
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """The run's newest round is still under way."""


def next_of_run(run: RunRow, newest: Sequence[RoundRow]) -> OpenRound | EndRun | Wait:
    """Decide how an active run goes on.

    Args:
        run: active.
        newest: its last rounds, the newest first; at least ``MAX_FAILURES`` of them if there are.

    A round that was aborted or burned is tried again from the same model under the next number: a
    number is never used twice, since keys, headers and logs name it.
    """
    if not newest:
        return OpenRound(
            number=0, index=0, start_snapshot=run.snapshot, why="the first round of the run"
        )
    last = newest[0]
    number = last.round.number + 1
    if last.released and last.next_snapshot is not None:
        index = last.index + 1
        if index >= run.plan.total_rounds:
            return EndRun(status="done", why=f"all {run.plan.total_rounds} rounds were released")
        why = f"round {last.round} was released"
        return OpenRound(number=number, index=index, start_snapshot=last.next_snapshot, why=why)
    if not isinstance(last.phase, Aborted | Burned):
        return Wait()
    failures = failures_in_a_row(newest)
    if failures >= MAX_FAILURES:
        why = f"{failures} rounds in a row ended without a release; the last: {last.phase.reason}"
        return EndRun(status="failed", why=why)
    return OpenRound(
        number=number,
        index=last.index,
        start_snapshot=last.start_snapshot,
        why=f"round {last.round} was {type(last.phase).__name__.lower()}: {last.phase.reason}",
    )


def failures_in_a_row(newest: Sequence[RoundRow]) -> int:
    """How many of a run's last rounds, the newest first, ended without a release."""
    failures = 0
    for row in newest:
        if not isinstance(row.phase, Aborted | Burned):
            break
        failures += 1
    return failures


def retry_at(newest: Sequence[RoundRow]) -> datetime | None:
    """When the round after a failed one may open (UTC); None: at once.

    A pause, so that a run does not use up its tries while, say, everybody is paused for a moment.
    """
    failures = failures_in_a_row(newest)
    if not failures or failures >= MAX_FAILURES:
        return None
    return newest[0].changed_at + RETRY_AFTER * (1 << (failures - 1))


def open_next(tx: Tx, plan: Plan, decision: OpenRound, now: datetime) -> RoundRow:
    """Open the round that ``next_of_run`` asked for."""
    first = open_round(terms_of(plan), now=now, join_s=plan.deadlines.join)
    row = tx.open_round(
        RoundId(plan.run_id, decision.number),
        index=decision.index,
        phase=first,
        start_snapshot=decision.start_snapshot,
        why=decision.why,
        now=now,
    )
    if tx.logs:
        say_plan(tx, tx.run(plan.run_id), row, now)
    return row


def record_release(
    tx: Tx,
    round_id: RoundId,
    *,
    sum_: Digest,
    snapshot: Snapshot,
    metrics: dict[str, int],
    now: datetime,
    norm: float = math.inf,
    opening: Opening | None = None,
) -> Step:
    """Record that a sum is public; its blobs are durable already. May be repeated.

    Args:
        sum_, snapshot, metrics: what came out.
        now: UTC.
        norm: L2 norm of the mean update; infinite: not known.
        opening: how a secure sum was opened.

    Raises:
        EquivocationError: another result was recorded before.
        WrongPhaseError: the round is not Released.
    """
    opened = Opened(sum=sum_, model_root=snapshot.model_root)
    answer = advance(tx, round_id, SumOpened(opened), now, transaction="record_release")
    tx.set_result(round_id, sum_, snapshot.to_bytes(), metrics)
    if opening is not None:
        tx.set_transcript(round_id, opening.blob)
    if tx.logs and isinstance(answer.phase, Released):
        say_aggregate(
            tx,
            tx.run(round_id.run).plan,
            round_id,
            now,
            attempt=answer.phase.attempt,
            sum_blob=sum_,
            model_out=snapshot.model_root,
            norm=norm,
            transcript_blob=opening.blob if opening else None,
            transcript_sha256=opening.sha256 if opening else None,
            certificate_sha256=opening.certificate_sha256 if opening else None,
        )
    return answer
