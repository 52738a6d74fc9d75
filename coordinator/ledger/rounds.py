"""Runs and rounds in a ledger transaction."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam

from coordinator.ledger.rows import (
    ConfirmationRow,
    HistoryRow,
    PhaseTimeRow,
    RoundRow,
    RunRow,
    RunStatus,
)
from coordinator.ledger.schema import confirmations, history, phase_times, rounds, runs
from coordinator.ledger.statements import Statements
from protocols.errors import (
    CorruptStateError,
    EquivocationError,
    ExistsError,
    MalformedMessageError,
    NotFoundError,
)
from protocols.identifiers import Digest, NodeId, RoundId, RunId
from protocols.plan import Plan
from protocols.rounds import Phase, deadline, is_final
from protocols.rounds_codec import from_ms, phase_from_json, phase_to_json, to_ms

_RUN = sa.select(runs).where(runs.c.run_id == bindparam("run"))
_RUNS = sa.select(runs).order_by(runs.c.submitted_at, runs.c.run_id)
_ACTIVE = _RUNS.where(runs.c.status == "active")
_STATUSES = sa.select(runs.c.run_id, runs.c.status, runs.c.ended_at)
_SET_RUN = (
    sa.update(runs)
    .where(runs.c.run_id == bindparam("run"))
    .values(status=bindparam("new_status"), why=bindparam("reason"), ended_at=bindparam("end"))
)
_THIS = sa.and_(rounds.c.run_id == bindparam("run"), rounds.c.number == bindparam("n"))
_ROUND = sa.select(rounds).where(_THIS)
# Not FOR UPDATE: that would also block inserts of uploads and traffic that refer to the round.
_LOCK_ROUND = _ROUND.with_for_update(key_share=True)
_LOCK_RUN = _RUN.with_for_update(key_share=True)
_OF_RUN = sa.select(rounds).where(rounds.c.run_id == bindparam("run")).order_by(rounds.c.number)
_NEWEST = (
    sa.select(rounds)
    .where(rounds.c.run_id == bindparam("run"))
    .order_by(rounds.c.number.desc())
    .limit(bindparam("count"))
)
_LAST_RELEASED = (
    sa.select(rounds)
    .where(rounds.c.run_id == bindparam("run"), rounds.c.sum.is_not(None))
    .order_by(rounds.c.number.desc())
    .limit(1)
)
_NOT_FINAL = (
    sa.select(rounds)
    .where(rounds.c.final.is_(sa.false()))
    .order_by(rounds.c.closes_at, rounds.c.run_id, rounds.c.number)
)
_SET_PHASE = (
    sa.update(rounds)
    .where(_THIS)
    .values(
        phase_name=bindparam("name"),
        phase=bindparam("body"),
        final=bindparam("is_final"),
        closes_at=bindparam("closes"),
        why=bindparam("reason"),
        changed_at=bindparam("at"),
    )
)
_SET_RESULT = (
    sa.update(rounds)
    .where(_THIS)
    .values(
        sum=bindparam("digest"), next_snapshot=bindparam("snapshot"), metrics=bindparam("numbers")
    )
)
_HISTORY = (
    sa.select(history)
    .where(history.c.id > bindparam("after"))
    .order_by(history.c.id)
    .limit(bindparam("count"))
)
_HISTORY_OF_RUN = _HISTORY.where(history.c.run_id == bindparam("run"))
_TIMES = (
    sa.select(phase_times)
    .where(phase_times.c.run_id == bindparam("run"))
    .order_by(phase_times.c.history_id)
)
_CONFIRMATION = sa.select(confirmations).where(
    confirmations.c.run_id == bindparam("run"),
    confirmations.c.number == bindparam("n"),
    confirmations.c.node_id == bindparam("node"),
)
_CONFIRMATIONS = (
    sa.select(confirmations)
    .where(confirmations.c.run_id == bindparam("run"))
    .order_by(confirmations.c.number, confirmations.c.node_id)
)


class Rounds(Statements):
    """Plans, phases, results and the history of it all."""

    # -- runs --------------------------------------------------------------------------------

    def add_run(
        self,
        plan: Plan,
        snapshot: bytes,
        now: datetime,
        *,
        by: str = "",
        request: bytes | None = None,
    ) -> RunRow:
        """Begin a run. The same plan and snapshot again are no error.

        Args:
            plan: the terms.
            snapshot: canonical JSON of the initial model.
            now: UTC.
            by: the operator, for history.
            request: what the operator signed, JSON.

        Raises:
            ExistsError: another plan or snapshot was submitted under this name.
        """
        data = plan.to_bytes()
        written = self._insert_once(
            runs,
            run_id=plan.run,
            plan=data,
            plan_digest=plan.digest,
            snapshot=snapshot,
            request=request,
            status="active",
            why="submitted",
            submitted_at=to_ms(now),
        )
        row = self.run(plan.run_id)
        if written:
            who = f" by operator {by}" if by else ""
            self.note(f"run {plan.run} was submitted{who}", now=now, run=plan.run_id)
        elif (row.plan_bytes, row.snapshot) != (data, snapshot):
            raise ExistsError(f"run {plan.run} exists with another plan; choose another name")
        return row

    def find_run(self, run: RunId) -> RunRow | None:
        """A run, if there is one of that name."""
        row = self._one(_RUN, run=run)
        return None if row is None else _run(row)

    def run(self, run: RunId) -> RunRow:
        """Raises: NotFoundError."""
        row = self.find_run(run)
        if row is None:
            raise NotFoundError(f"there is no run {run}")
        return row

    def lock_run(self, run: RunId) -> RunRow:
        """The run, which nobody else changes until this transaction ends.

        Lock a run before its rounds, never after.

        Raises:
            NotFoundError: there is none.
        """
        row = self._one(_LOCK_RUN, run=run)
        if row is None:
            raise NotFoundError(f"there is no run {run}")
        return _run(row)

    def runs(self) -> list[RunRow]:
        """All runs, the oldest first."""
        return [_run(row) for row in self._all(_RUNS)]

    def run_statuses(self) -> dict[RunId, tuple[RunStatus, datetime | None]]:
        """Status of every run and when it ended (UTC; None: still active)."""
        return {
            RunId(row.run_id): (
                row.status,
                None if row.ended_at is None else from_ms(row.ended_at),
            )
            for row in self._all(_STATUSES)
        }

    def active_runs(self) -> list[RunRow]:
        """Runs that may open another round, the oldest first."""
        return [_run(row) for row in self._all(_ACTIVE)]

    def set_run_status(self, run: RunId, status: RunStatus, why: str, now: datetime) -> None:
        """Record that a run ended, and why."""
        end = None if status == "active" else to_ms(now)
        if not self._write(_SET_RUN, run=run, new_status=status, reason=why, end=end):
            raise NotFoundError(f"there is no run {run}")
        self.note(f"run {run} is {status}: {why}", now=now, run=run)

    # -- rounds ------------------------------------------------------------------------------

    def open_round(
        self,
        round_id: RoundId,
        *,
        index: int,
        phase: Phase,
        start_snapshot: bytes,
        why: str,
        now: datetime,
    ) -> RoundRow:
        """Add a round.

        Args:
            round_id: a number that was never used.
            index: which of the plan's rounds it is.
            phase: its first phase.
            start_snapshot: canonical JSON of the model it starts from.
            why: one line.
            now: UTC.

        Raises:
            ExistsError: the number was used.
        """
        written = self._insert_once(
            rounds,
            run_id=round_id.run,
            number=round_id.number,
            plan_index=index,
            phase_name=type(phase).__name__,
            phase=_phase_text(phase),
            final=is_final(phase),
            closes_at=_closes_at(phase),
            why=why,
            opened_at=to_ms(now),
            changed_at=to_ms(now),
            start_snapshot=start_snapshot,
        )
        if not written:
            raise ExistsError(f"round {round_id} exists")
        self.note(why, now=now, round_=round_id, phase=type(phase).__name__, entered=True)
        return self.lock_round(round_id)

    def round(self, round_id: RoundId) -> RoundRow | None:
        """A round, to be shown; None: there is none."""
        row = self._one(_ROUND, run=round_id.run, n=round_id.number)
        return None if row is None else _round(row)

    def lock_round(self, round_id: RoundId) -> RoundRow:
        """A round, which nobody else changes until this transaction ends.

        Raises:
            NotFoundError: there is none.
        """
        row = self._one(_LOCK_ROUND, run=round_id.run, n=round_id.number)
        if row is None:
            raise NotFoundError(f"there is no round {round_id}")
        return _round(row)

    def rounds(self, run: RunId) -> list[RoundRow]:
        """All rounds of a run, in order."""
        return [_round(row) for row in self._all(_OF_RUN, run=run)]

    def newest_rounds(self, run: RunId, count: int = 1) -> list[RoundRow]:
        """The last ``count`` rounds of a run, the newest first."""
        return [_round(row) for row in self._all(_NEWEST, run=run, count=count)]

    def last_released(self, run: RunId) -> RoundRow | None:
        """The newest round of a run whose sum is public."""
        row = self._one(_LAST_RELEASED, run=run)
        return None if row is None else _round(row)

    def released_rounds(self, run: RunId) -> list[RoundRow]:
        """The rounds of a run whose sum is public, in order."""
        return [row for row in self.rounds(run) if row.released]

    def unfinished_rounds(self) -> list[RoundRow]:
        """Every round that is not final, the first deadline first."""
        return [_round(row) for row in self._all(_NOT_FINAL)]

    def due(self, now: datetime) -> list[RoundRow]:
        """The rounds whose deadline passed."""
        found = []
        for row in self.unfinished_rounds():
            closes_at = deadline(row.phase)
            if closes_at is not None and closes_at <= now:
                found.append(row)
        return found

    def set_phase(
        self,
        round_id: RoundId,
        phase: Phase,
        why: str,
        transaction: str | None = None,
        node: NodeId | None = None,
        *,
        now: datetime,
        entered: bool = False,
    ) -> None:
        """Record what a round became, with its reason. Only after ``lock_round``.

        Args:
            round_id: which round.
            phase: what it is now.
            why: one line.
            transaction: name for history; this transaction's, if not given.
            node: who caused it, if a node did.
            now: UTC.
            entered: whether the phase or the attempt is a new one.
        """
        name = type(phase).__name__
        self._write(
            _SET_PHASE,
            run=round_id.run,
            n=round_id.number,
            name=name,
            body=_phase_text(phase),
            is_final=is_final(phase),
            closes=_closes_at(phase),
            reason=why,
            at=to_ms(now),
        )
        self.note(
            why,
            now=now,
            round_=round_id,
            phase=name,
            node=node,
            transaction=transaction,
            entered=entered,
        )

    def set_result(
        self, round_id: RoundId, sum_: Digest, next_snapshot: bytes, metrics: dict[str, int]
    ) -> None:
        """Record what came out of a round; in the transaction that says it was opened."""
        self._write(
            _SET_RESULT,
            run=round_id.run,
            n=round_id.number,
            digest=sum_,
            snapshot=next_snapshot,
            numbers=json.dumps(metrics, sort_keys=True),
        )

    # -- confirmations -----------------------------------------------------------------------

    def confirm(
        self,
        round_id: RoundId,
        node: NodeId,
        model_root: str,
        objection: str,
        detail: str,
        *,
        now: datetime,
    ) -> bool:
        """Keep what a node says it computed. The same again is no error.

        Returns:
            Whether it was new.

        Raises:
            EquivocationError: it said something else before.
        """
        written = self._insert_once(
            confirmations,
            run_id=round_id.run,
            number=round_id.number,
            node_id=node,
            model_root=model_root,
            objection=objection,
            detail=detail,
            received_at=to_ms(now),
        )
        if written:
            return True
        row = self._one(_CONFIRMATION, run=round_id.run, n=round_id.number, node=node)
        if row is None or (row.model_root, row.objection) != (model_root, objection):
            raise EquivocationError(f"{node} said something else about the result of {round_id}")
        return False

    def confirmations(self, run: RunId) -> list[ConfirmationRow]:
        """What the nodes said about the results of a run, by round and node."""
        return [
            ConfirmationRow(
                round=RoundId(RunId(row.run_id), row.number),
                node=NodeId(row.node_id),
                model_root=row.model_root,
                objection=row.objection,
                detail=row.detail,
                received_at=from_ms(row.received_at),
            )
            for row in self._all(_CONFIRMATIONS, run=run)
        ]

    # -- history -----------------------------------------------------------------------------

    def version(self) -> int:
        """The id of the last entry in history; 0: none."""
        return int(self._c.execute(sa.text("SELECT value FROM ledger_version")).scalar_one())

    def history(
        self, after: int = 0, run: RunId | None = None, limit: int = 1000
    ) -> list[HistoryRow]:
        """What happened after entry ``after``, in order, of one run or of everything."""
        if run is None:
            found = self._all(_HISTORY, after=after, count=limit)
        else:
            found = self._all(_HISTORY_OF_RUN, after=after, count=limit, run=run)
        return [
            HistoryRow(
                id=row.id,
                at=from_ms(row.at),
                run=None if row.run_id is None else RunId(row.run_id),
                number=row.number,
                transaction=row.transaction,
                phase=row.phase,
                why=row.why,
                node=None if row.node_id is None else NodeId(row.node_id),
            )
            for row in found
        ]

    def phase_times(self, run: RunId) -> list[PhaseTimeRow]:
        """When each phase of each round of a run began, in order."""
        return [
            PhaseTimeRow(
                round=RoundId(RunId(row.run_id), row.number),
                phase=row.phase,
                entered_at=from_ms(row.entered_at),
            )
            for row in self._all(_TIMES, run=run)
        ]


def _closes_at(phase: Phase) -> int | None:
    closes_at = deadline(phase)
    return None if closes_at is None else to_ms(closes_at)


def _phase_text(phase: Phase) -> str:
    return json.dumps(phase_to_json(phase), separators=(",", ":"))


def _run(row: Any) -> RunRow:
    return RunRow(
        run=RunId(row.run_id),
        plan_bytes=bytes(row.plan),
        plan_digest=Digest(row.plan_digest),
        snapshot=bytes(row.snapshot),
        request=None if row.request is None else bytes(row.request),
        status=row.status,
        why=row.why,
        submitted_at=from_ms(row.submitted_at),
        ended_at=None if row.ended_at is None else from_ms(row.ended_at),
    )


def _round(row: Any) -> RoundRow:
    round_id = RoundId(RunId(row.run_id), row.number)
    try:
        phase = phase_from_json(json.loads(row.phase))
    except (MalformedMessageError, ValueError) as error:
        raise CorruptStateError(f"the ledger's phase of round {round_id}: {error}") from None
    return RoundRow(
        round=round_id,
        index=row.plan_index,
        phase=phase,
        why=row.why,
        opened_at=from_ms(row.opened_at),
        changed_at=from_ms(row.changed_at),
        start_snapshot=bytes(row.start_snapshot),
        next_snapshot=None if row.next_snapshot is None else bytes(row.next_snapshot),
        sum=None if row.sum is None else Digest(row.sum),
        metrics=None if row.metrics is None else json.loads(row.metrics),
        transcript=None if row.transcript is None else Digest(row.transcript),
    )
