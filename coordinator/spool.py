"""Vectors and blobs that are still arriving.

One file per upload. A resume unit is 4 MiB; the durable offset is a whole number of units (or the
end), each checked against its announced hash and synced before it is acknowledged. Nothing about
progress is kept in the ledger: after a crash the file itself is read back, and what does not have
its hash does not count. One stream writes to a place at a time: a newer stream of this process
takes over from an older one (its connection may be half-open); another process is held off by a
file lock. Over a long link several streams bring several parts at once (``streams_allowed``).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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
MAX_STREAMS = 8  # that bring one upload
ALL_STREAMS = 32  # that bring uploads, as long as there is one for each
AHEAD = 2  # parts of one stream: the next one comes while the one before is answered
_TAKE_OVERS = 3  # newer streams may come while an older one ends
MAX_KNOWN = 4096  # files whose units are remembered; of others it is read back


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
        self._verified: dict[Path, _Verified] = {}
        self._open: dict[Path, _Open] = {}
        self._allowed: dict[Path, int] = {}  # streams of one file, as was answered last

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
        """Bytes from the beginning that are checked and synced; after a restart the file is read
        back."""
        return (await self._known(arriving)).durable

    async def _known(self, arriving: Arriving) -> _Verified:
        known = self._verified.get(arriving.path)
        if known is None:
            units = await asyncio.to_thread(_verified_units, arriving)
            # Another task may have read it back meanwhile, and a stream gone on from there.
            known = self._verified.setdefault(arriving.path, _Verified(arriving.total, units))
            if len(self._verified) > MAX_KNOWN:
                idle = (path for path in self._verified if path not in self._open)
                self._verified.pop(next(idle, arriving.path))
        return known

    def forget(self, arriving: Arriving) -> None:
        """The file was taken away or is complete."""
        self._verified.pop(arriving.path, None)
        self._allowed.pop(arriving.path, None)

    def allow_streams(self, arriving: Arriving, *, expected: int = 0) -> int:
        """How many streams may bring this file at once, so that all together stay bounded.

        Args:
            arriving: the file.
            expected: other files that will come at the same time, whether they have begun or not:
                those who are asked together must not all be told that they are alone.
        """
        others = len(self._open.keys() - {arriving.path})
        allowed = streams_allowed(max(others, expected))
        while len(self._allowed) >= MAX_KNOWN:
            del self._allowed[next(iter(self._allowed))]
        self._allowed[arriving.path] = allowed
        return allowed

    async def receive(
        self,
        arriving: Arriving,
        offset: int,
        messages: AsyncIterator[bytes],
        *,
        end: int | None = None,
        source: str = "",
    ) -> int:
        """Write a stream of messages from ``offset`` on; return the durable offset.

        Args:
            arriving: what the file must become.
            offset: where the stream begins.
            messages: at most ``MAX_MESSAGE`` bytes each.
            end: where it ends, if other streams may bring other parts at the same time; None: it
                goes to the end of the file and is alone.
            source: the connection that it comes on.

        Raises:
            OffsetError: a stream that is alone does not begin at the durable offset, another one
                begins before it; it says which that is.
            DigestMismatchError: a unit does not have its hash; what came before it stays.
            MalformedMessageError: a message too large, more bytes than announced, or a part that
                is not of whole units.
            StorageFullError: the disk is full; what was acknowledged stays.
            NotReadyError: another process is receiving this very file.
        """
        part = _part(arriving, offset, end)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("receive needs a task")
        await self._take_over(arriving.path, part, source, alone=end is None)
        opened = self._open.setdefault(arriving.path, _Open())
        opened.streams[task] = _Part(part, source)
        try:
            known = await self._known(arriving)
            if offset < known.durable or (end is None and offset != known.durable):
                raise OffsetError(
                    f"the upload goes on at byte {known.durable}, not at {offset}",
                    expected=known.durable,
                )
            known.withdraw(part)
            arriving.path.parent.mkdir(parents=True, exist_ok=True)
            opened.open(arriving.path)
            writer = _Writer(arriving, opened.fd, offset, min(part.stop * UNIT, arriving.total))
            async for message in messages:
                if len(message) > MAX_MESSAGE:
                    raise MalformedMessageError(
                        f"a raw message has at most {MAX_MESSAGE} bytes, got {len(message)}"
                    )
                if message:
                    try:
                        await _to_the_end(writer.write, message)
                    finally:
                        known.add(writer.take_closed())
            return known.durable
        finally:
            del opened.streams[task]
            if not opened.streams:
                opened.close()
                if self._open.get(arriving.path) is opened:
                    del self._open[arriving.path]

    async def _take_over(self, path: Path, part: range, source: str, *, alone: bool) -> None:
        """End the older parts that write where this one will, or are too many beside it."""
        for _ in range(_TAKE_OVERS):
            opened = self._open.get(path)
            parts = opened.streams if opened is not None else {}
            older = {task for task, other in parts.items() if alone or _overlap(part, other.units)}
            left = {task: other.source for task, other in parts.items() if task not in older}
            older |= too_many(left, source, self._allowed.get(path, MAX_STREAMS))
            if not older:
                return
            for task in older:
                task.cancel()
            await asyncio.wait(older, timeout=5.0)
        raise NotReadyError("an older stream of this upload is still ending")


def streams_allowed(others: int) -> int:
    """How many streams one upload may use beside ``others`` that are arriving: each may have a
    receive window of data under way, and all of them together should not have more than so much."""
    return max(1, min(MAX_STREAMS, ALL_STREAMS // (others + 1)))


K = TypeVar("K", bound=Hashable)


def too_many(parts: Mapping[K, str], source: str, allowed: int) -> set[K]:
    """Which parts of a file must end before another one begins; the oldest may be half-open.

    Args:
        parts: that are being written, in the order in which they began, and the stream (the
            connection) of each.
        source: the stream of the one that begins.
        allowed: streams of this file, at least 1.

    Returns:
        So many, from the oldest on, that ``AHEAD`` of each stream and ``allowed`` streams stay,
        the new part counted.
    """
    streams: dict[str, list[K]] = {}
    for part, stream in parts.items():
        streams.setdefault(stream, []).append(part)
    mine = streams.pop(source, [])
    ending = mine[: max(0, len(mine) - (AHEAD - 1))]
    for stream in list(streams)[: max(0, len(streams) - (allowed - 1))]:
        ending += streams[stream]
    return set(ending)


def _part(arriving: Arriving, offset: int, end: int | None) -> range:
    """The units that a stream brings.

    Raises:
        MalformedMessageError: it does not consist of whole units.
    """
    stop = arriving.total if end is None else end
    if end is not None and not (
        offset % UNIT == 0 and offset < end <= arriving.total
        and (end % UNIT == 0 or end == arriving.total)
    ):  # fmt: skip
        raise MalformedMessageError(
            f"a part from {offset} to {end} of {arriving.total} bytes is not of whole units"
        )
    return range(offset // UNIT, -(-stop // UNIT))


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


async def _to_the_end(work: Callable[[bytes], None], message: bytes) -> None:
    """Run blocking work on a file that others close: also when this task is cancelled meanwhile,
    the thread has ended before it goes on."""
    running = asyncio.ensure_future(asyncio.to_thread(work, message))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        raise


class _Verified:
    """Which units of a file are right and durable."""

    def __init__(self, total: int, units: set[int]) -> None:
        self._total = total
        self._beyond = units  # not joined to the beginning
        self._whole = 0  # units from the beginning
        self.add(())

    @property
    def durable(self) -> int:
        """Bytes from the beginning."""
        return min(self._whole * UNIT, self._total)

    def add(self, units: Iterable[int]) -> None:
        """These were checked and synced."""
        self._beyond.update(units)
        while self._whole in self._beyond:
            self._beyond.remove(self._whole)
            self._whole += 1

    def withdraw(self, units: range) -> None:
        """These are about to be written again."""
        self._beyond.difference_update(units)


@dataclass(frozen=True, slots=True)
class _Part:
    units: range  # that it brings
    source: str  # the connection that it comes on


class _Open:
    """A file that streams of this process are writing, under one lock."""

    def __init__(self) -> None:
        self.streams: dict[asyncio.Task[object], _Part] = {}
        self.fd = -1

    def open(self, path: Path) -> None:
        """Open and lock it, if no other stream did."""
        if self.fd >= 0:
            return
        with storage_errors("an upload"):
            fresh = not path.exists()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise NotReadyError("another process is receiving this upload") from None
            self.fd = fd
            if fresh:
                sync_folder(path.parent)

    def close(self) -> None:
        """Nobody writes it any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Writer:
    """Writes one stream's part of a file; hashes as it goes."""

    def __init__(self, arriving: Arriving, fd: int, start: int, stop: int) -> None:
        self._arriving = arriving
        self._fd = fd
        self._at, self._stop = start, stop
        self._unit = hashlib.sha256(b"\x00")
        self._closed: list[int] = []

    def take_closed(self) -> list[int]:
        """The units that became durable since the last call."""
        closed, self._closed = self._closed, []
        return closed

    def write(self, message: bytes) -> None:
        """Append one message."""
        view = memoryview(message)
        if self._at + len(view) > self._stop:
            raise MalformedMessageError(
                f"more than the announced {self._arriving.total} bytes were sent"
                if self._stop == self._arriving.total
                else f"more bytes were sent than the part up to {self._stop} has"
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

    def _close_unit(self, number: int) -> None:
        if self._unit.digest() != self._arriving.unit_hashes[number]:
            raise DigestMismatchError(f"unit {number} of the upload does not have its hash")
        with storage_errors("an upload"):
            os.fdatasync(self._fd)
        self._closed.append(number)
        self._unit = hashlib.sha256(b"\x00")


def _verified_units(arriving: Arriving) -> set[int]:
    """Which units of the file on disk have their hashes."""
    try:
        file = arriving.path.open("rb")
    except FileNotFoundError:
        return set()
    good = set()
    with file:
        for number, expected in enumerate(arriving.unit_hashes):
            wanted = min(UNIT, arriving.total - number * UNIT)
            unit = file.read(wanted)
            if len(unit) == wanted and leaf_hash(unit) == expected:
                good.add(number)
            if len(unit) < wanted:
                break
    return good
