"""Removes uploads whose retention has ended. Sums, transcripts and snapshots stay.

Uploads are kept after their round so that an auditor can add them up again: for as long as the
signed policy says (``retention.round_artifacts_days``), and only where a federation is not governed
as long as the config does (``[storage] upload_retention_days``). A vector goes only when its round
is final and the days have passed since then. Level-based and idempotent: any coordinator may do it,
at any time, as often as it likes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from coordinator.clock import Clock
from coordinator.ledger import Ledger, RoundRow, Tx
from coordinator.spool import upload_path
from policies.consortium import ConsortiumPolicy
from protocols.errors import FederationError

logger = logging.getLogger(__name__)
EVERY_S: Final = 3600.0


def has_ended(row: RoundRow, now: datetime, keep: timedelta) -> bool:
    """Whether the uploads of a round may go."""
    return row.final and now - row.changed_at >= keep


def expired_uploads(tx: Tx, spool: Path, now: datetime, keep: timedelta) -> list[Path]:
    """Files of vectors whose retention has ended; those already gone are named too."""
    found: list[Path] = []
    for run in tx.runs():
        for row in tx.rounds(run.run):
            if has_ended(row, now, keep):
                found.extend(
                    upload_path(spool, row.round, upload.attempt, upload.node)
                    for upload in tx.all_uploads(row.round)
                )
    return found


def remove(paths: Iterable[Path]) -> int:
    """Delete what is still there. Returns how many files went."""
    gone = 0
    for path in paths:
        try:
            path.unlink()
            gone += 1
        except FileNotFoundError:
            continue
    return gone


class RetentionDriver:
    """Looks once an hour."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        clock: Clock,
        spool: Path,
        days: int,
        policy: Callable[[], ConsortiumPolicy | None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._spool = spool
        self._days = days
        self._policy = policy  # in force; None: the federation is not governed

    @property
    def keep(self) -> timedelta:
        """How long uploads stay after their round."""
        policy = self._policy()
        return timedelta(
            days=self._days if policy is None else policy.retention.round_artifacts_days
        )

    async def pass_once(self) -> int:
        """One look. Returns how many files went."""
        now, keep = self._clock.now(), self.keep
        paths = await self._ledger.read(
            "expired_uploads", lambda tx: expired_uploads(tx, self._spool, now, keep)
        )
        gone = await asyncio.to_thread(remove, paths)
        if gone:
            logger.info("removed %d uploads whose retention had ended", gone)
        return gone

    async def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                await self.pass_once()
            except FederationError as error:
                logger.warning("uploads were not looked through: %s", error)
            await asyncio.sleep(EVERY_S)
