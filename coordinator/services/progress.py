"""What nodes say they are doing, for people who watch; never part of a decision.

Reports come with every poll. They are gathered and written together, at most about once a second,
to a small table: so a second coordinator shows them too, and a thousand nodes cost one transaction.
A report that is lost in a crash is not missed, the next one follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from coordinator.ledger import Ledger, Tx
from protocols.errors import FederationError, MalformedMessageError
from protocols.gen import rounds_pb2
from protocols.identifiers import NodeId
from protocols.wire import read_round, read_text

logger = logging.getLogger(__name__)

EVERY_S: Final = 1.0
_MAX_REPORTS: Final = 16
_STATES: Final = frozenset({"", "running", "paused"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one node said in one poll."""

    at: datetime  # UTC, the coordinator's clock
    state: str
    agent_version: str
    progress: tuple[rounds_pb2.Progress, ...]
    capability: str = ""


def read_report(request: rounds_pb2.SyncRequest, now: datetime) -> Report:
    """Check what a node says of itself.

    Raises:
        MalformedMessageError: too many reports, an unknown state, text that is none.
    """
    if len(request.progress) > _MAX_REPORTS:
        raise MalformedMessageError(f"{len(request.progress)} reports; at most {_MAX_REPORTS}")
    if request.state not in _STATES:
        raise MalformedMessageError(f"a node is running or paused, not {request.state!r:.40}")
    for report in request.progress:
        read_round(report.round)
        read_text(report.activity, what="an activity", limit=64)
    return Report(
        at=now,
        state=request.state,
        agent_version=read_text(request.agent_version, what="a version", limit=64),
        progress=tuple(request.progress),
        capability=read_text(request.capability, what="a capability", limit=100),
    )


def write_reports(tx: Tx, reports: dict[NodeId, Report]) -> None:
    """Keep the last report of each node. A node that reports nothing keeps its last one."""
    known = read_reports(tx)
    for node in sorted(reports):  # in one order everywhere, so that two processes cannot deadlock
        report, before = reports[node], known.get(node, rounds_pb2.SyncRequest())
        tx.seen(node, report.at, report.state, report.agent_version)
        if report.progress or report.capability != before.capability:
            packed = rounds_pb2.SyncRequest(
                progress=report.progress or before.progress, capability=report.capability
            )
            tx.set_progress(node, packed.SerializeToString(), report.at)


def read_reports(tx: Tx) -> dict[NodeId, rounds_pb2.SyncRequest]:
    """What each node said last: ``progress`` and ``capability``."""
    return {row.node: rounds_pb2.SyncRequest.FromString(row.reports) for row in tx.progress()}


def read_progress(tx: Tx) -> dict[NodeId, Sequence[rounds_pb2.Progress]]:
    """What each node said last that it is doing."""
    return {node: report.progress for node, report in read_reports(tx).items()}


class ProgressBook:
    """Gathers reports and writes them now and then."""

    def __init__(self, ledger: Ledger, *, every_s: float = EVERY_S) -> None:
        self._ledger = ledger
        self._every_s = every_s
        self._gathered: dict[NodeId, Report] = {}
        self._writer: asyncio.Task[None] | None = None

    def add(self, node: NodeId, report: Report) -> None:
        """Take a report; it is in the ledger about ``every_s`` later."""
        before = self._gathered.get(node)
        if before is not None and not report.progress:
            report = Report(
                at=report.at,
                state=report.state,
                agent_version=report.agent_version,
                progress=before.progress,
                capability=report.capability,
            )
        self._gathered[node] = report
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_later(), name="progress")

    async def _write_later(self) -> None:
        while self._gathered:
            await self._write()
            await asyncio.sleep(self._every_s)

    async def _write(self) -> None:
        gathered, self._gathered = self._gathered, {}
        try:
            await self._ledger.run("progress", lambda tx: write_reports(tx, gathered))
        except FederationError as error:
            logger.info("progress was not written: %s", error)
