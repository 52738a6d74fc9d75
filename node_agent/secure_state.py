"""The durable secrets of a node's current secure sum: one file for each run.

    secagg/<run>.state     canonical JSON, mode 0600: what protocols.secagg.states says

A state is replaced whole: temporary name, fsync, rename, fsync of the folder. The file that lost
its name is then overwritten with zeros. That is the best a program can do: a copying file system, a
flash drive or a snapshot may keep old blocks, which is why an attempt's keys are fresh and useless
in any other attempt. Never back this folder up; a restored one is found out and refused, because
the journal and the coordinator know how far the node had come.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node_agent.spool import sync_folder
from protocols.errors import CorruptStateError, MalformedMessageError, StorageFullError
from protocols.identifiers import NodeId, RoundId, RunId
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

logger = logging.getLogger(__name__)

# How far an attempt has come for this node, in this order. An attempt may be given up at any stage.
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
RANK: Final[dict[str, int]] = {stage: rank for rank, stage in enumerate(STAGES.values())}


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureKnown:
    """What may be told about a state: no secret is in it."""

    round: RoundId
    attempt: int
    stage: str

    @property
    def order(self) -> tuple[int, int, int]:
        """Grows with everything that this node does in a run."""
        return self.round.number, self.attempt, RANK[self.stage]


def outline(state: NodeState) -> SecureKnown:
    """A state without its secrets."""
    attempt = state.attempt
    return SecureKnown(round=attempt.round, attempt=attempt.number, stage=STAGES[type(state)])


class SecureStates:
    """The folder of secure states. Blocking; one agent at a time holds the node's folder."""

    def __init__(self, folder: Path, *, node: NodeId) -> None:
        self._folder = folder
        self._node = node
        self._cache: dict[RunId, NodeState | None] = {}

    def _path(self, run: RunId) -> Path:
        return self._folder / f"{run}.state"

    def recover(self) -> None:
        """Destroy what a crash left between writing a state and giving it its name."""
        for left in self._folder.glob("*.tmp"):
            _zero(_open_old(left))
            left.unlink(missing_ok=True)

    def runs(self) -> tuple[RunId, ...]:
        """The runs that have a state, readable or not."""
        return tuple(RunId(path.stem) for path in sorted(self._folder.glob("*.state")))

    def load(self, run: RunId) -> NodeState | None:
        """The state of a run, or None if there is none that can be read.

        A file that cannot be read, or is of another node or run, is as good as lost: the node then
        stays out of what it may have said in that round, and begins afresh with the next one.
        """
        if run not in self._cache:
            self._cache[run] = self._read(run)
        return self._cache[run]

    def _read(self, run: RunId) -> NodeState | None:
        path = self._path(run)
        try:
            state = state_from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, MalformedMessageError) as error:
            logger.warning("%s cannot be read: %s", path, type(error).__name__)
            return None
        if (state.node, state.attempt.round.run) != (self._node, run):
            logger.warning("%s is of node %s in %s", path, state.node, state.attempt.round)
            return None
        return state

    def known(self, run: RunId) -> SecureKnown | None:
        """The state's outline, for decisions and status."""
        state = self.load(run)
        return None if state is None else outline(state)

    def keep(self, run: RunId, state: NodeState) -> None:
        """Make a state durable in place of the one before.

        Raises:
            CorruptStateError: it would be a step back; the old state stands.
            StorageFullError: no room; the old state stands.
        """
        before = self.load(run)
        if state == before:
            return
        if before is not None and outline(state).order < outline(before).order:
            raise CorruptStateError(f"{state.attempt}: a state cannot go back")
        path = self._path(run)
        fresh = path.with_suffix(".tmp")
        old = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(state.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            old = _open_old(path)
            fresh.replace(path)
            sync_folder(self._folder)
        except OSError as error:
            if old is not None:
                os.close(old)
            # Under which name the disk has it now is unknown: the next look finds out.
            self._cache.pop(run, None)
            raise StorageFullError(f"{path}: {error.strerror}") from None
        self._cache[run] = state
        _zero(old)


def _open_old(path: Path) -> int | None:
    """A file that is about to lose its name; None if there is none that can be written."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _zero(handle: int | None) -> None:
    """Overwrite a file with zeros, as far as its disk lets us, and close it."""
    if handle is None:
        return
    try:
        os.pwrite(handle, bytes(os.fstat(handle).st_size), 0)
        os.fsync(handle)
    except OSError as error:
        logger.warning("an old state could not be overwritten: %s", error.strerror)
    finally:
        os.close(handle)
