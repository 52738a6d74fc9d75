"""Vectors and blobs that are still arriving.

One file per upload. A resume unit is 4 MiB; the durable offset is a whole number of units (or the
end), each checked against its announced hash and synced before it is acknowledged. Nothing about
progress is kept in the ledger: after a crash the file itself is read back, and what does not have
its hash does not count. One stream writes to a file at a time: a newer stream of this process takes
over from an older one (its connection may be half-open), another process is held off by a file
lock.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from coordinator.blobs import storage_errors, sync_folder
from protocols.errors import (
    DigestMismatchError,
    MalformedMessageError,
    NotReadyError,
    OffsetError,
    StorageFullError,
)
from protocols.identifiers import NodeId, RoundId
from protocols.tensors.sizes import UNIT
from protocols.tlog.merkle import leaf_hash

MAX_MESSAGE = 2**20  # bytes of payload in one raw message
MAX_KNOWN = 4096  # files whose durable offset is remembered; of others it is read back


@dataclass(frozen=True, slots=True, kw_only=True)
class Arriving:
    """What a file must become."""

    path: Path
    total: int  # bytes
    unit_hashes: tuple[bytes, ...]


def upload_path(spool: Path, round_: RoundId, attempt: int, node: NodeId) -> Path:
    """Where the vector of a node lies; every part of the name was parsed."""
    return spool / round_.run / f"{round_.number}.{attempt}.{node}.vector"


class Spool:
    """The folder of everything that is arriving."""

    def __init__(self, root: Path, *, min_free_bytes: int) -> None:
        self.root = root
        self._min_free = min_free_bytes
        self._durable: dict[Path, int] = {}
        self._streams: dict[Path, asyncio.Task[object]] = {}

    def prepare(self) -> None:
        """Make the folder."""
        self.root.mkdir(parents=True, exist_ok=True)

    def check_room(self, size: int) -> None:
        """Refuse before the first byte what will not fit.

        Raises:
            StorageFullError: the disk would have less than the configured rest.
        """
        free = shutil.disk_usage(self.root).free
        if free - size < self._min_free:
            raise StorageFullError(
                f"{size} bytes do not fit: {free} are free and {self._min_free} stay free",
                retry_after_s=30.0,
            )

    async def durable(self, arriving: Arriving) -> int:
        """Bytes that are checked and synced; after a restart the file is read back."""
        known = self._durable.get(arriving.path)
        if known is None:
            known = await asyncio.to_thread(_verified_prefix, arriving)
            self._durable[arriving.path] = known
            if len(self._durable) > MAX_KNOWN:
                idle = (path for path in self._durable if path not in self._streams)
                self._durable.pop(next(idle, arriving.path))
        return known

    def forget(self, arriving: Arriving) -> None:
        """The file was taken away or is complete."""
        self._durable.pop(arriving.path, None)

    async def receive(self, arriving: Arriving, offset: int, messages: AsyncIterator[bytes]) -> int:
        """Write a stream of messages from ``offset`` on; return the durable offset.

        Raises:
            OffsetError: the stream does not begin at the durable offset; it says which that is.
            DigestMismatchError: a unit does not have its hash; what came before it stays.
            MalformedMessageError: a message too large, or more bytes than announced.
            StorageFullError: the disk is full; what was acknowledged stays.
            NotReadyError: another process is receiving this very file.
        """
        await self._take_over(arriving.path)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("receive needs a task")
        self._streams[arriving.path] = task
        try:
            durable = await self.durable(arriving)
            if offset != durable:
                raise OffsetError(
                    f"the upload goes on at byte {durable}, not at {offset}", expected=durable
                )
            arriving.path.parent.mkdir(parents=True, exist_ok=True)
            with _Writer(arriving, durable) as writer:
                async for message in messages:
                    if len(message) > MAX_MESSAGE:
                        raise MalformedMessageError(
                            f"a raw message has at most {MAX_MESSAGE} bytes, got {len(message)}"
                        )
                    if message:
                        self._durable[arriving.path] = await asyncio.to_thread(
                            writer.write, message
                        )
                return self._durable.get(arriving.path, durable)
        finally:
            if self._streams.get(arriving.path) is task:
                del self._streams[arriving.path]

    async def _take_over(self, path: Path) -> None:
        older = self._streams.get(path)
        if older is not None and older is not asyncio.current_task():
            older.cancel()
            await asyncio.wait([older], timeout=5.0)
            if self._streams.get(path) is older:
                raise NotReadyError("an older stream of this upload is still ending")


class _Writer:
    """Appends to one file under its lock; hashes as it goes."""

    def __init__(self, arriving: Arriving, durable: int) -> None:
        self._arriving = arriving
        self._at = durable
        self._durable = durable
        self._unit = hashlib.sha256(b"\x00")
        self._fd = -1

    def __enter__(self) -> _Writer:
        with storage_errors("an upload"):
            fresh = not self._arriving.path.exists()
            self._fd = os.open(self._arriving.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                raise NotReadyError("another process is receiving this upload") from None
            os.ftruncate(self._fd, self._durable)
            if fresh:
                sync_folder(self._arriving.path.parent)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, message: bytes) -> int:
        """Append one message; returns the durable offset."""
        view = memoryview(message)
        if self._at + len(view) > self._arriving.total:
            raise MalformedMessageError(
                f"more than the announced {self._arriving.total} bytes were sent"
            )
        while view:
            number = self._at // UNIT
            end = min((number + 1) * UNIT, self._arriving.total)
            part = view[: end - self._at]
            with storage_errors("an upload"):
                written = os.pwrite(self._fd, part, self._at)
            self._unit.update(part[:written])
            self._at += written
            view = view[written:]
            if self._at == end:
                self._close_unit(number)
        return self._durable

    def _close_unit(self, number: int) -> None:
        if self._unit.digest() != self._arriving.unit_hashes[number]:
            raise DigestMismatchError(f"unit {number} of the upload does not have its hash")
        with storage_errors("an upload"):
            os.fdatasync(self._fd)
        self._durable = self._at
        self._unit = hashlib.sha256(b"\x00")


def _verified_prefix(arriving: Arriving) -> int:
    """How much of the file on disk is whole units with their hashes."""
    try:
        file = arriving.path.open("rb")
    except FileNotFoundError:
        return 0
    with file:
        good = 0
        for expected in arriving.unit_hashes:
            unit = file.read(min(UNIT, arriving.total - good))
            if len(unit) < min(UNIT, arriving.total - good) or leaf_hash(unit) != expected:
                break
            good += len(unit)
        return good
