"""One agent per folder: a second one would sign a second statement for the same round."""

from __future__ import annotations

import fcntl
import os
from types import TracebackType
from typing import Self

from node_agent.config import NodeFolder
from protocols.decimals import read_decimal
from protocols.errors import LedgerBusyError


class FolderLock:
    """An exclusive lock that dies with its process, however the process dies."""

    def __init__(self, folder: NodeFolder, *, pid: int) -> None:
        self._path = folder.lock
        self._pid = pid
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            LedgerBusyError: another agent works in this folder; names its process id.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise LedgerBusyError(
                f"another agent (process {holder}) works in {self._path.parent}"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{self._pid}\n".encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # releases the lock; the file stays, it is no marker
            self._descriptor = None


def lock_holder(folder: NodeFolder) -> int | None:
    """Process id of the agent that works here now; None when nobody does."""
    try:
        descriptor = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return read_decimal(text, most=2**31) or 0
    else:
        return None
    finally:
        os.close(descriptor)
