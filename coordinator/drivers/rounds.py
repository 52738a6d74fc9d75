"""Moves rounds forward when nobody calls.

Level-based: a pass looks at what is, not at what woke it, so a missed wake-up or a crash costs a
delay and nothing else. A pass

1. ends phases whose deadline passed,
2. begins to add up released rounds whose sum is not open yet, in a thread,
3. opens the next round of each active run, or ends the run.

One process drives at a time, under a lease; every write checks the lease's fence in its own
transaction, so a process that slept through its lease writes nothing. Adding up is deterministic
and its blobs are named by content: doing it twice, even in two processes at once, is harmless, and
whoever still holds the lease records it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from coordinator.aggregation.release import Release, release
from coordinator.blobs import Blobs
from coordinator.clock import Clock
from coordinator.layouts import Layouts
from coordinator.leaves import say_closed
from coordinator.ledger import LeaseLostError, Ledger, RoundRow, RunRow, Tx
from coordinator.rounds import (
    MAX_FAILURES,
    EndRun,
    Opening,
    OpenRound,
    advance,
    next_of_run,
    open_next,
    record_release,
    retry_at,
)
from coordinator.secure_sum import Opening as Unmasking
from coordinator.secure_sum import Sum, open_masks
from coordinator.spool import upload_path
from coordinator.trust_repository import TrustRepository
from policies.in_force import plan_named
from protocols.canonical import sha256_hex
from protocols.errors import FederationError, IntegrityError
from protocols.governance.documents import run_refusal
from protocols.governance.repository import sha256_of
from protocols.identifiers import RoundId, RunId
from protocols.plan import Plan
from protocols.rounds import Released, SumFailed, TimePassed, deadline
from protocols.tensors.snapshot import Snapshot

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

LEASE: Final = "rounds"
LEASE_TTL: Final = timedelta(seconds=4)  # how long a dead process holds the others up
RENEW_EVERY: Final = timedelta(seconds=1)
CLOSE_AFTER: Final = timedelta(minutes=10)  # then a verdict is not waited for any more
IDLE_S: Final = 1.0  # between two passes when nothing happens: deadlines are kept this exactly
CLOSE_EVERY: Final = timedelta(minutes=1)
_RETRY: Final = timedelta(seconds=2)  # after adding up failed for a reason that may pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one look at the ledger found to do."""

    version: int  # of the ledger
    due: tuple[RoundId, ...] = ()  # their deadline passed
    to_open: tuple[tuple[RoundRow, Plan], ...] = ()  # released, their sum is not open
    runs: tuple[RunRow, ...] = ()  # active, their newest round is over
    next_at: datetime | None = None  # UTC: when the clock alone makes work; None: not yet known


def look(tx: Tx, now: datetime) -> Work:
    """Find what there is to do; changes nothing."""
    due: list[RoundId] = []
    to_open: list[tuple[RoundRow, Plan]] = []
    times: list[datetime] = []
    busy = set()
    for row in tx.unfinished_rounds():
        busy.add(row.round.run)
        closes_at = deadline(row.phase)
        if closes_at is None:
            to_open.append((row, tx.run(row.round.run).plan))
        elif closes_at <= now:
            due.append(row.round)
        else:
            times.append(closes_at)
    idle = [run for run in tx.active_runs() if run.run not in busy]
    ready = []
    for run in idle:
        at = retry_at(tx.newest_rounds(run.run, MAX_FAILURES))
        if at is None or at <= now:
            ready.append(run)
        else:
            times.append(at)
    return Work(
        version=tx.version(),
        due=tuple(due),
        to_open=tuple(to_open),
        runs=tuple(ready),
        next_at=min(times, default=None),
    )


def go_on(tx: Tx, run: RunRow, now: datetime, *, may_open: bool = True) -> bool:
    """Open the next round of a run or end it, if that is still what it needs.

    Args:
        tx: a writing transaction.
        run: as it was read.
        now: UTC.
        may_open: what the admins signed lets another round open.

    Returns:
        Whether anything was done.
    """
    locked = tx.lock_run(run.run)
    if locked.status != "active":
        return False  # stopped since we looked
    match next_of_run(locked, tx.newest_rounds(run.run, MAX_FAILURES)):
        case OpenRound() as decision if may_open:
            open_next(tx, locked.plan, decision, now)
            return True
        case EndRun(status=status, why=why):
            tx.set_run_status(run.run, status, why, now)
            return True
        case _:
            return False  # another process opened it since we looked


def close_old(tx: Tx, now: datetime) -> None:
    """Say of rounds released long ago who judged them: nobody else is waited for."""
    if tx.logs:
        for round_id in tx.unclosed_rounds(now - CLOSE_AFTER):
            say_closed(tx, tx.run(round_id.run).plan, round_id, now, even_if_silent=True)


class RoundDriver:
    """Drives all rounds of one coordinator.

    Args:
        ledger, clock: as everywhere.
        blobs, layouts: where sums and snapshots go.
        spool: folder of the uploads.
        holder: name of this process in the lease; one is made up if not given.
        add_up: ``aggregation.release``, or another in tests.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        clock: Clock,
        blobs: Blobs,
        layouts: Layouts,
        spool: Path,
        holder: str = "",
        trust: TrustRepository | None = None,
        add_up: Callable[..., Release] = release,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._blobs = blobs
        self._layouts = layouts
        self._spool = spool
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._add_up = add_up
        self._trust = trust
        self._held: dict[RunId, str] = {}  # runs whose next round may not open, and why
        self._fence: int | None = None
        self._renew_at: datetime | None = None
        self._adding: dict[RoundId, asyncio.Task[None]] = {}
        self._not_before: dict[RoundId, datetime] = {}
        self._close_at = clock.now()

    # -- the loop ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive until cancelled. What fails because the ledger is away is tried again."""
        try:
            while True:
                try:
                    work = await self.pass_once()
                except FederationError as error:
                    logger.warning("the round driver waits: %s", error)
                    await asyncio.sleep(IDLE_S)
                    continue
                await self._ledger.changed(work.version, self._pause(work))
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Let go of the lease, so that another process need not wait for it to run out."""
        tasks = list(self._adding.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fence, self._fence = self._fence, None
        if fence is not None:
            with suppress(FederationError):
                await self._ledger.run("release_lease", lambda tx: tx.release_lease(LEASE, fence))

    def _pause(self, work: Work) -> float:
        """Seconds until the next pass if nothing happens."""
        if work.next_at is None:
            return IDLE_S
        left = (work.next_at - self._clock.now()).total_seconds()
        return min(IDLE_S, max(0.0, left))

    async def pass_once(self) -> Work:
        """One pass. Returns what it found; nothing, if another process drives.

        Raises:
            NotReadyError: the ledger is away, or another process took over in the middle.
        """
        now = self._clock.now()
        if not await self._hold(now):
            return Work(version=self._ledger.version())
        work = await self._ledger.read("look", lambda tx: look(tx, now))
        try:
            for round_id in work.due:
                await self._fenced("deadline", partial(_end_phase, round_id=round_id, now=now))
            for row, plan in work.to_open:
                self._begin_adding(row, plan, now)
            for run in work.runs:
                may = self._may_open(run, now)
                await self._fenced("next_round", partial(go_on, run=run, now=now, may_open=may))
            if now >= self._close_at:
                self._close_at = now + CLOSE_EVERY
                await self._fenced("close_rounds", partial(close_old, now=now))
        except LeaseLostError:
            self._fence = self._renew_at = None
            raise
        return work

    @property
    def drives(self) -> bool:
        """Whether this process held the lease at its last pass."""
        return self._fence is not None

    async def settle(self) -> None:
        """Wait until nothing is being added up any more: for simulations."""
        while self._adding:
            await asyncio.gather(*self._adding.values(), return_exceptions=True)

    def _may_open(self, run: RunRow, now: datetime) -> bool:
        """Whether the signed terms still let a round of this run open."""
        if self._trust is None:
            return True
        try:
            state = self._trust.state()
            refusal = None
            if state is not None:
                refusal = state.plan_signed(run.run, sha256_of(run.plan_bytes)) or run_refusal(
                    state.emergencies, run.run, run.plan_digest, now
                )
                policy = self._trust.policy()
                if refusal is None and policy is not None:
                    refusal = plan_named(run.plan, policy)
            if refusal is not None:
                raise refusal
        except FederationError as error:
            if self._held.get(run.run) != str(error):
                logger.warning("run %s waits: %s", run.run, error.diagnostics())
            self._held[run.run] = str(error)
            return False
        self._held.pop(run.run, None)
        return True

    # -- the lease ---------------------------------------------------------------------------

    async def _hold(self, now: datetime) -> bool:
        """Whether this process drives; takes or renews the lease where that is due."""
        soon = self._renew_at is not None and self._renew_at - now <= RENEW_EVERY
        if self._renew_at is not None and now < self._renew_at and soon:
            return self._fence is not None  # later than soon: the clock was set back meanwhile
        fence = self._fence
        if fence is not None:
            held = await self._ledger.run(
                "renew_lease", lambda tx: tx.renew_lease(LEASE, fence, now, LEASE_TTL)
            )
            if not held:
                logger.warning("another process drives the rounds now")
                self._fence = None
        if self._fence is None:
            self._fence = await self._ledger.run(
                "take_lease", lambda tx: tx.take_lease(LEASE, self._holder, now, LEASE_TTL)
            )
            if self._fence is not None:
                logger.info("driving rounds under fence %d", self._fence)
        self._renew_at = now + RENEW_EVERY
        return self._fence is not None

    async def _fenced(self, name: str, work: Callable[[Tx], Result]) -> Result:
        """A transaction that writes nothing once another process drives."""
        fence = self._fence
        if fence is None:
            raise LeaseLostError("this process does not drive the rounds")

        def checked(tx: Tx) -> Result:
            tx.check_fence(LEASE, fence)
            return work(tx)

        return await self._ledger.run(name, checked)

    # -- adding up ---------------------------------------------------------------------------

    def _begin_adding(self, row: RoundRow, plan: Plan, now: datetime) -> None:
        wait = self._not_before.get(row.round, now) - now
        if row.round in self._adding or timedelta() < wait <= _RETRY:
            return  # a longer wait: the clock was set back meanwhile
        self._not_before.pop(row.round, None)
        task = asyncio.create_task(self._open_sum(row, plan), name=f"open {row.round}")
        self._adding[row.round] = task
        task.add_done_callback(lambda _: self._adding.pop(row.round, None))

    async def _open_sum(self, row: RoundRow, plan: Plan) -> None:
        """Add up one released round and record what came out.

        An integrity error is an answer, the round is burned. Anything else (no room, the ledger
        away, a bug) leaves the round as it is; a later pass tries again.
        """
        phase = row.phase
        if not isinstance(phase, Released):
            return
        try:
            uploads, opening = await self._ledger.read(
                "uploads", lambda tx: self._parts_of(tx, row, plan, phase)
            )
            work = partial(
                self._add_up,
                plan=plan,
                index=row.index,
                start=Snapshot.from_bytes(row.start_snapshot),
                uploads=uploads,
                blobs=self._blobs,
                layouts=self._layouts,
                remover=opening.remover if opening else None,
            )
            result = await asyncio.to_thread(work)
            how = await asyncio.to_thread(self._publish, opening) if opening else None
        except IntegrityError as error:
            logger.warning("round %s: %s", row.round, error)
            await self._record("sum_failed", partial(_burn, round_id=row.round, error=error))
        except FederationError as error:
            self._later(row.round, error)
        except Exception:
            logger.exception("adding up round %s failed; it is tried again", row.round)
            self._not_before[row.round] = self._clock.now() + _RETRY
        else:
            done = partial(_opened, round_id=row.round, result=result, opening=how)
            await self._record("record_release", done)

    def _publish(self, opening: Unmasking) -> Opening:
        """Keep the transcript of a secure sum. Blocking."""
        data = opening.transcript.to_bytes()
        return Opening(
            blob=self._blobs.put_bytes(data),
            sha256=sha256_hex(data),
            certificate_sha256=sha256_hex(opening.transcript.certificate.to_bytes()),
        )

    async def _record(self, name: str, work: Callable[..., object]) -> None:
        now = self._clock.now()
        try:
            await self._fenced(name, lambda tx: work(tx, now=now))
        except FederationError as error:
            logger.warning("the result was not recorded: %s", error)

    def _later(self, round_id: RoundId, error: FederationError) -> None:
        logger.warning("round %s cannot be added up now: %s", round_id, error)
        self._not_before[round_id] = self._clock.now() + _RETRY

    def _parts_of(
        self, tx: Tx, row: RoundRow, plan: Plan, phase: Released
    ) -> tuple[Sequence[Path], Unmasking | None]:
        """The vectors to add, and in a secure sum what takes the masks off."""
        uploads = self._uploads_of(tx, row.round, phase)
        if plan.secagg is None:
            return uploads, None
        return uploads, open_masks(Sum.of(tx, row, plan, phase.attempt))

    def _uploads_of(self, tx: Tx, round_id: RoundId, phase: Released) -> Sequence[Path]:
        """Files of the survivors' vectors, by node.

        Raises:
            IntegrityError: the ledger counts a survivor whose upload it does not have.
        """
        uploads = tx.uploads(round_id, phase.attempt)
        complete = {upload.node for upload in uploads if upload.receipt is not None}
        if not phase.survivors <= complete:
            missing = ", ".join(sorted(phase.survivors - complete))
            raise IntegrityError(f"the updates of survivors are not here: {missing}")
        return [
            upload_path(self._spool, round_id, phase.attempt, node)
            for node in sorted(phase.survivors)
        ]


def _end_phase(tx: Tx, round_id: RoundId, now: datetime) -> None:
    advance(tx, round_id, TimePassed(), now, transaction="deadline")


def _burn(tx: Tx, round_id: RoundId, error: IntegrityError, *, now: datetime) -> None:
    event = SumFailed(error.code, str(error))
    advance(tx, round_id, event, now, transaction="sum_failed")


def _opened(
    tx: Tx, round_id: RoundId, result: Release, opening: Opening | None, *, now: datetime
) -> None:
    record_release(
        tx,
        round_id,
        sum_=result.sum,
        snapshot=result.snapshot,
        metrics=result.metrics,
        now=now,
        norm=result.norm,
        opening=opening,
    )
