"""Puts what the admins signed into the round log, and waits until witnesses have seen it.

A metadata file is served only once its ``tuf.published`` leaf is under a witnessed checkpoint, so
that the coordinator cannot show two members two different files for one version without the log
showing both. Saying the same again is harmless: a leaf that is there already is not repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from typing import Final

from coordinator.ledger import Ledger, Tx
from coordinator.log_hub import LogHub
from coordinator.trust_acts import Act
from coordinator.trust_repository import PublishedFile
from policies.audit.replay import Replay
from policies.releases import Reported
from protocols.errors import NotReadyError
from protocols.tlog.kinds import TufPublished

WITNESSED_S: Final = 60.0  # for the witnesses to cosign; then the publication is tried again


def subject_of(file: PublishedFile) -> str:
    """``tuf/<role>/<version>``."""
    return f"tuf/{file.role}/{file.version}"


class TrustLog:
    """``Announce`` for a coordinator that keeps a round log."""

    def __init__(self, ledger: Ledger, hub: LogHub, *, patience_s: float = WITNESSED_S) -> None:
        self._ledger = ledger
        self._hub = hub
        self._patience_s = patience_s

    async def heard(self, name: str, at: datetime) -> bool:
        """Whether the log shows that a member was heard by this time."""
        return await self._ledger.read("heard", lambda tx: tx.log_state().heard(name, at))

    async def evaluated(self) -> tuple[Reported, ...]:
        """Every evaluation of a model that stands in the log."""
        return await self._ledger.read("evaluated", lambda tx: tx.log_state().reports)

    async def __call__(self, files: tuple[PublishedFile, ...], acts: tuple[Act, ...] = ()) -> None:
        """Log the files and return when a witnessed checkpoint holds them.

        Raises:
            NotReadyError: the witnesses have not cosigned it in time, or another process leads.
        """
        await self._ledger.run("publish_trust", lambda tx: say_published(tx, files, acts))
        size = await self._ledger.read("log_size", Tx.log_size)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience_s
        while self._hub.witnessed is None or self._hub.witnessed.size < size:
            left = until - loop.time()
            if left <= 0:
                names = ", ".join(self._hub.waits_for()) or "the log's writer"
                raise NotReadyError(
                    f"what was signed is in the log, and not witnessed yet: it waits for {names}; "
                    "publish it again",
                    retry_after_s=5.0,
                )
            await self._hub.changed(min(1.0, left))


def say_published(tx: Tx, files: Iterable[PublishedFile], acts: Iterable[Act] = ()) -> None:
    """One ``tuf.published`` leaf for each file that has none yet, behind what is said of it."""
    known = tx.log_state().published
    for act in acts:
        if act.file not in known:
            tx.append_own(act.said, subject=act.subject, digest=act.digest)
    for file in files:
        if file.sha256 in known.get((file.role, file.version), frozenset()):
            continue
        tx.append_own(partial(_said, file), subject=subject_of(file), digest=file.sha256)


def _said(file: PublishedFile, log: Replay) -> TufPublished:
    """Keys are named where they change, not again with every timestamp."""
    return TufPublished(
        role=file.role,
        version=file.version,
        sha256=file.sha256,
        length=len(file.data),
        speakers=None if file.speakers == log.speakers else file.speakers,
    )
