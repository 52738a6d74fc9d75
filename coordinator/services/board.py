"""What nodes wait for: one view of all runs per process, however many nodes wait.

A thousand nodes in a long poll cost one look at the ledger per change, not a thousand. The board
keeps nothing that the ledger does not have; a process that starts makes it anew.

Most changes concern no node that waits (a peer joined, a vector arrived). A node is woken when
something happened that it may have to act on: a run came or ended, a round opened, entered another
phase, attempt or stage, or was opened. The version that it sent decides, not the moment of waiting,
so a change between two polls is not missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from coordinator.clock import Clock
from coordinator.ledger import Ledger, RoundRow, RunRow, RunStatus, Tx
from coordinator.rounds import why_now
from protocols.errors import FederationError
from protocols.gen import rounds_pb2
from protocols.identifiers import NodeId, RunId
from protocols.rounds import Dealing, Phase, Released
from protocols.wire import phase_to_view, round_ref

logger = logging.getLogger(__name__)

KEEP_ENDED: Final = timedelta(days=30)  # how long nodes are told of a run that ended
POLLS_PER_NODE: Final = 4  # a node's oldest poll is answered when it opens more
_FOLLOW_S: Final = 5.0
_RETRY_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """One run on the board."""

    run: RunId
    roster: frozenset[NodeId]
    view: rounds_pb2.RunView
    key: Hashable  # changes when nodes have to hear of it
    since: int  # the version at which the key changed
    settled: bool  # nothing can happen to the run any more
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All runs at one version."""

    version: int
    runs: Mapping[RunId, Posted] = field(default_factory=dict)

    def of(self, node: NodeId, now: datetime) -> list[Posted]:
        """The runs on whose roster ``node`` stands, without those that ended long ago."""
        return [
            posted
            for posted in self.runs.values()
            if node in posted.roster
            and (posted.ended_at is None or now - posted.ended_at < KEEP_ENDED)
        ]


def stage(phase: Phase) -> Hashable:
    """What distinguishes the moments of a round at which nodes have to act."""
    match phase:
        case Dealing(attempt=attempt, dealt=dealt, ready=ready):
            return ("Dealing", attempt, bool(phase.without_keys), dealt == ready)
        case Released(opened=opened):
            return ("Released", opened)
        case _:
            return (type(phase).__name__, getattr(phase, "attempt", 0))


def round_view(row: RoundRow, now: datetime) -> rounds_pb2.RoundView:
    """A round as nodes see it."""
    return rounds_pb2.RoundView(
        round=round_ref(row.round),
        index=row.index,
        phase=phase_to_view(row.phase),
        why=why_now(row, now),
        start_snapshot=row.start_snapshot,
        next_snapshot=row.next_snapshot or b"",
        transcript=row.transcript or "",
    )


def post(
    run: RunRow,
    status: RunStatus,
    ended_at: datetime | None,
    current: RoundRow | None,
    released: RoundRow | None,
    *,
    version: int,
    before: Posted | None,
    now: datetime,
) -> Posted:
    """One run for the board; pure."""
    view = rounds_pb2.RunView(run=run.run, plan_digest=run.plan_digest, status=status)
    if current is not None:
        view.current.CopyFrom(round_view(current, now))
    if released is not None:
        view.last_released.CopyFrom(round_view(released, now))
    key = (
        status,
        (current.round.number, stage(current.phase)) if current else None,
        released.round.number if released else None,
    )
    return Posted(
        run=run.run,
        roster=frozenset(run.plan.roster_ids),
        view=view,
        key=key,
        since=before.since if before is not None and before.key == key else version,
        settled=status != "active" and (current is None or current.final),
        ended_at=ended_at,
    )


def read_page(tx: Tx, before: Page | None, now: datetime) -> Page:
    """Read what changed since ``before``; runs that are settled are not read again."""
    version = tx.version()
    known = before.runs if before else {}
    runs: dict[RunId, Posted] = {}
    for run_id, (status, ended_at) in tx.run_statuses().items():
        old = known.get(run_id)
        if old is not None and old.settled:
            runs[run_id] = old
            continue
        if old is None and ended_at is not None and now - ended_at >= KEEP_ENDED:
            continue
        newest = tx.newest_rounds(run_id)
        runs[run_id] = post(
            tx.run(run_id),
            status,
            ended_at,
            newest[0] if newest else None,
            tx.last_released(run_id),
            version=version,
            before=old,
            now=now,
        )
    return Page(version=version, runs=runs)


class Board:
    """Shared by all polls of one process."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._page: Page | None = None
        self._turning = asyncio.Lock()  # one look at the ledger at a time
        self._waiting: dict[NodeId, list[asyncio.Future[None]]] = {}
        self._follower: asyncio.Task[None] | None = None

    async def wait(self, node: NodeId, seen: int, wait_s: float) -> tuple[int, list[Posted]]:
        """The runs of ``node``: as soon as there is news after ``seen``, or when time is up.

        Args:
            node: who asks.
            seen: version of its last answer; 0: answer at once.
            wait_s: seconds.

        Returns:
            The version of the answer, and the runs.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while True:
            page = await self._turn()
            mine = page.of(node, self._clock.now())
            left = end - loop.time()
            news = seen == 0 or any(posted.since > seen for posted in mine)
            if news or left <= 0 or not await self._sleep(node, left, page):
                page = self._page or page
                return page.version, page.of(node, self._clock.now())

    async def _turn(self) -> Page:
        """The page of the newest version that this process knows of."""
        async with self._turning:
            page = self._page
            if page is None or page.version < self._ledger.version():
                now = self._clock.now()
                turned = await self._ledger.read("board", lambda tx: read_page(tx, page, now))
                self._page = turned
                self._wake(page, turned)
                return turned
            return page

    def _wake(self, before: Page | None, after: Page) -> None:
        for posted in after.runs.values():
            old = before.runs.get(posted.run) if before else None
            if old is None or old.key != posted.key:
                for node in posted.roster:
                    for future in self._waiting.get(node, ()):
                        if not future.done():
                            future.set_result(None)

    async def _sleep(self, node: NodeId, seconds: float, page: Page) -> bool:
        """Wait for news; False: time is up, or the node has too many polls."""
        if self._page is not page:
            return True  # it was turned in the meantime: look again
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(node, [])
        if len(waiting) >= POLLS_PER_NODE and not waiting[0].done():
            waiting[0].cancel()
        waiting.append(future)
        if self._follower is None:
            self._follower = asyncio.create_task(self._follow(), name="board")
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait({future})
        except TimeoutError:
            return False
        finally:
            waiting.remove(future)
            if not waiting:
                self._waiting.pop(node, None)
            if not self._waiting and self._follower is not None:
                self._follower.cancel()
                self._follower = None
        return not future.cancelled()

    async def _follow(self) -> None:
        """Turn the page after every change, as long as somebody waits."""
        while True:
            try:
                version = self._page.version if self._page else 0
                if await self._ledger.changed(version, _FOLLOW_S) > version:
                    await self._turn()
            except FederationError as error:
                logger.info("the board waits for the ledger: %s", error)
                await asyncio.sleep(_RETRY_S)
