"""The durable secrets of a node's current secure sum: one file for each run.

    secagg/<run>.state     canonical JSON, mode 0600: what protocols.secagg.states says

A state is replaced whole: temporary name, fsync, rename, fsync of the folder. The file it replaces
is overwritten with zeros first. That is the best a program can do: a copying file system, a flash
drive or a snapshot may keep old blocks, which is why an attempt's keys are fresh and useless in any
other attempt. Never back this folder up; a restored one is found out and refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node_agent.spool import sync_folder
from protocols.errors import MalformedMessageError, StorageFullError
from protocols.identifiers import RoundId, RunId
from protocols.secagg.states import (
    AbortSent,
    Closed,
    Committed,
    DealOkSent,
    Dealt,
    Masking,
    NodeState,
    ReadySent,
    Revealed,
    Uploaded,
    state_from_bytes,
)

# How far an attempt has come for this node; each stage includes the ones before it.
STAGES: Final[dict[type, str]] = {
    ReadySent: "ready",
    Dealt: "dealt",
    DealOkSent: "agreed",
    Masking: "masking",
    Uploaded: "fixed",
    Committed: "committed",
    Revealed: "revealed",
    AbortSent: "aborted",
    Closed: "closed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureKnown:
    """What may be told about a state: no secret is in it."""

    round: RoundId
    attempt: int
    stage: str


class SecureStates:
    """The folder of secure states. Blocking; one agent at a time holds the node's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: dict[RunId, NodeState | None] = {}

    def _path(self, run: RunId) -> Path:
        return self._folder / f"{run}.state"

    def load(self, run: RunId) -> NodeState | None:
        """The state of a run, or None if there is none that can be read.

        A file that cannot be read is as good as lost: the node then stays out of what it may have
        said in that round, and begins afresh with the next one.
        """
        if run not in self._cache:
            try:
                self._cache[run] = state_from_bytes(self._path(run).read_bytes())
            except (FileNotFoundError, MalformedMessageError):
                self._cache[run] = None
        return self._cache[run]

    def known(self, run: RunId) -> SecureKnown | None:
        """The state's outline, for decisions and status."""
        state = self.load(run)
        if state is None:
            return None
        attempt = state.attempt
        return SecureKnown(round=attempt.round, attempt=attempt.number, stage=STAGES[type(state)])

    def keep(self, run: RunId, state: NodeState) -> None:
        """Make a state durable in place of the one before.

        Raises:
            StorageFullError: no room; the old state stands.
        """
        if state == self.load(run):
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(run)
        fresh = path.with_suffix(".tmp")
        try:
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(state.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            old = _open_old(path)
            fresh.replace(path)
            sync_folder(self._folder)
            _zero(old)
        except OSError as error:
            raise StorageFullError(f"{path}: {error.strerror}") from None
        self._cache[run] = state


def _open_old(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return None


def _zero(handle: int | None) -> None:
    """Overwrite a file that has no name any more, and close it."""
    if handle is None:
        return
    try:
        os.pwrite(handle, bytes(os.fstat(handle).st_size), 0)
        os.fsync(handle)
    finally:
        os.close(handle)
