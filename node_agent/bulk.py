"""Blobs down: raw bytes, resumed where they stopped, checked unit by unit. (Up: ``uploads``.)

DescribeBlob names the 4 MiB units; their tree root must be the blob's name. Fetch streams from an
offset; a unit is compared with its hash before it is kept. A file grows under the name
``.<name>.part``; after a crash what lies there is hashed again and only the rest is fetched, so no
unit needs an fsync of its own. Normative text: protocols/spec/upload.md, section 4.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from node_agent.client import Backoff, Connection, rebuild_error
from node_agent.spool import sync_folder
from protocols.errors import (
    DigestMismatchError,
    NotReadyError,
    StorageFullError,
    UnreachableError,
)
from protocols.gen import bulk_pb2
from protocols.identifiers import Digest, RoundId
from protocols.tensors.sizes import UNIT
from protocols.tensors.units import digest_of_units, unit_count
from protocols.tlog.merkle import leaf_hash

T = TypeVar("T")
MESSAGE: Final = 2**20  # bytes of one raw message
STALL_S: Final = 120.0  # without a byte accepted or received, a transfer is given up and resumed
READ_BACK_S: Final = 600.0
ATTEMPTS: Final = 6  # failures in a row without progress
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def silent(_done: int, _total: int) -> None:
    """Nobody watches."""


@dataclass(slots=True)
class Watch:
    """Bytes moved so far, for the stall watch."""

    moved: int = 0


async def unless_stalled(work: Awaitable[Any], watch: Watch, *, stall_s: float) -> Any:
    """Await ``work``; give it up when ``watch`` stands still.

    Raises:
        UnreachableError: nothing moved for ``stall_s``.
    """
    task = asyncio.ensure_future(work)
    try:
        while True:
            before = watch.moved
            done, _ = await asyncio.wait({task}, timeout=stall_s)
            if done:
                return task.result()
            if watch.moved == before:
                raise UnreachableError(f"a transfer stood still for {stall_s:g} s")
    finally:
        if not task.done():
            task.cancel()


class Patience:
    """Counts failures in a row without progress, and waits between them."""

    def __init__(self, connection: Connection) -> None:
        self._rng = connection.rng
        self._backoff = Backoff()
        self._failures = 0
        self._best = -1

    async def wait(self, error: NotReadyError, at: int) -> None:
        """Wait, or raise ``error`` when nothing helps.

        Args:
            error: what happened.
            at: bytes that are safe; an advance starts the count anew.
        """
        if at > self._best:
            self._best, self._failures = at, 0
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise error
        await asyncio.sleep(
            self._backoff.delay(self._failures - 1, self._rng, at_least=error.retry_after_s)
        )


# -- down ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blob:
    digest: Digest
    size: int
    hashes: tuple[bytes, ...]

    def unit(self, index: int) -> tuple[int, int]:
        """First byte of a unit and one past its last."""
        return index * UNIT, min((index + 1) * UNIT, self.size)


async def describe(connection: Connection, digest: Digest, *, size: int | None) -> _Blob:
    """The units of a blob, shown to be those of its name.

    Args:
        connection: to the coordinator.
        digest: name of the blob.
        size: bytes it must have, where that is known; a wrong size is refused before any byte.

    Raises:
        DigestMismatchError: the unit hashes are not the blob's, or another size is announced.
    """
    request = bulk_pb2.DescribeBlobRequest(digest=bytes.fromhex(digest))
    info = await connection.ask(lambda c: c.bulk.DescribeBlob, request)
    hashes = tuple(info.unit_hashes)
    if (
        any(len(unit) != 32 for unit in hashes)
        or unit_count(info.size) != len(hashes)
        or digest_of_units(hashes) != digest
    ):
        raise DigestMismatchError(f"the unit hashes of blob {digest} are not those of its name")
    if size is not None and info.size != size:
        raise DigestMismatchError(f"blob {digest} has {info.size} bytes, it must have {size}")
    return _Blob(digest=digest, size=int(info.size), hashes=hashes)


async def _in_thread(work: Callable[..., T], descriptor: int, *arguments: Any) -> T:
    """Run blocking work on a descriptor of its own.

    A thread cannot be cancelled: when this coroutine is, the caller closes its descriptor, and the
    number may name another file by the time the thread uses it.
    """
    own = os.dup(descriptor)

    def run() -> T:
        try:
            return work(own, *arguments)
        finally:
            os.close(own)

    return await asyncio.to_thread(run)


def _good_prefix(descriptor: int, blob: _Blob) -> int:
    """How many leading units of a partial file are right; the rest is cut off."""
    length, good = os.fstat(descriptor).st_size, 0
    for index, wanted in enumerate(blob.hashes):
        start, stop = blob.unit(index)
        if stop > length or leaf_hash(os.pread(descriptor, stop - start, start)) != wanted:
            break
        good += 1
    os.ftruncate(descriptor, blob.unit(good)[0] if good < len(blob.hashes) else blob.size)
    return good


def _keep_unit(descriptor: int, blob: _Blob, index: int, parts: list[bytes]) -> None:
    """Compare a unit with its hash, then write it."""
    hasher = hashlib.sha256(b"\x00")
    for part in parts:
        hasher.update(part)
    if hasher.digest() != blob.hashes[index]:
        raise DigestMismatchError(f"unit {index} of blob {blob.digest} is not what its hash says")
    at = blob.unit(index)[0]
    try:
        waiting = [memoryview(part) for part in parts]
        while waiting:
            written = os.pwritev(descriptor, waiting, at)
            at += written
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if written:
                waiting[0] = waiting[0][written:]
    except OSError as error:
        raise StorageFullError(f"blob {blob.digest}: {error.strerror}") from None


async def fetch(
    connection: Connection,
    digest: Digest,
    path: Path,
    *,
    size: int | None = None,
    round_: RoundId | None = None,
    durable: bool = True,
    progress: Progress = silent,
    stall_s: float = STALL_S,
) -> int:
    """Download a blob into ``path``; return its size in bytes. Resumes what a crash left.

    Args:
        connection: to the coordinator.
        digest: name of the blob.
        path: where it goes; appears only when every unit was checked.
        size: bytes it must have, where that is known.
        round_: on whose account the coordinator counts the bytes.
        durable: whether the file must outlast a power failure.
        progress: called after every unit.
        stall_s: seconds without a byte before the stream is started anew.

    Raises:
        NotFoundError: the coordinator has no such blob.
        DigestMismatchError: a unit is not what its hash says.
        NotReadyError: it failed too often in a row without progress.
    """
    blob = await describe(connection, digest, size=size)
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        good = await _in_thread(_good_prefix, descriptor, blob)
        patience = Patience(connection)
        while good < len(blob.hashes):
            watch = Watch(blob.unit(good)[0])
            stream = _stream_units(
                connection, blob, descriptor, good, watch, progress=progress, round_=round_
            )
            try:
                good = await unless_stalled(stream, watch, stall_s=stall_s)
            except NotReadyError as error:
                good = watch.moved // UNIT  # only whole, checked units moved it
                await patience.wait(error, watch.moved)
        if durable:
            await _in_thread(os.fdatasync, descriptor)
    finally:
        os.close(descriptor)
    part.replace(path)
    if durable:
        await asyncio.to_thread(sync_folder, path.parent)
    return blob.size


async def _stream_units(
    connection: Connection,
    blob: _Blob,
    descriptor: int,
    first: int,
    watch: Watch,
    *,
    progress: Progress,
    round_: RoundId | None,
) -> int:
    """Receive units from ``first`` on; a unit is checked while the next one arrives."""
    method = connection.channel.unary_stream("/minga.v1.Bulk/Fetch", None, None)
    offset = blob.unit(first)[0]
    metadata = (("minga-round", str(round_)),) if round_ else ()
    call = method(bytes.fromhex(blob.digest) + offset.to_bytes(8, "big"), metadata=metadata)
    parts: list[bytes] = []
    filled, index = 0, first
    checking: asyncio.Task[None] | None = None

    async def settle() -> None:
        nonlocal checking
        if checking is not None:
            task, checking = checking, None
            await task
            watch.moved = blob.unit(index - 1)[1]
            progress(watch.moved, blob.size)

    try:
        async for message in call:
            taken = 0
            while taken < len(message):
                if index >= len(blob.hashes):
                    raise DigestMismatchError(f"more bytes came than blob {blob.digest} has")
                start, stop = blob.unit(index)
                room = stop - start - filled
                whole = taken == 0 and len(message) <= room  # the usual case: not copied
                piece = message if whole else message[taken : taken + room]
                taken += len(piece)
                parts.append(piece)
                filled += len(piece)
                if filled == stop - start:
                    await settle()
                    work = _in_thread(_keep_unit, descriptor, blob, index, parts)
                    checking = asyncio.ensure_future(work)
                    parts, filled, index = [], 0, index + 1
        await settle()
    except grpc.aio.AioRpcError as error:
        await settle()
        raise rebuild_error(error, connection.address) from None
    finally:
        if checking is not None:
            checking.cancel()  # its thread goes on alone, on a descriptor of its own
        call.cancel()
    if index < len(blob.hashes):
        raise UnreachableError(f"the download of {blob.digest} was cut off", retry_after_s=0.0)
    return index


async def fetch_bytes(
    connection: Connection, digest: Digest, *, limit: int, round_: RoundId | None = None
) -> bytes:
    """Download a small blob into memory.

    Args:
        connection: to the coordinator.
        digest: name of the blob.
        limit: bytes that are taken at most.
        round_: on whose account the coordinator counts the bytes.

    Raises:
        DigestMismatchError: larger than ``limit`` bytes, or not what its name says.
        NotFoundError, NotReadyError: as ``fetch``.
    """
    blob = await describe(connection, digest, size=None)
    if blob.size > limit:
        raise DigestMismatchError(f"blob {digest} has {blob.size} bytes; at most {limit} are taken")
    patience = Patience(connection)
    metadata = (("minga-round", str(round_)),) if round_ else ()
    while True:
        method = connection.channel.unary_stream("/minga.v1.Bulk/Fetch", None, None)
        call = method(bytes.fromhex(digest) + bytes(8), timeout=STALL_S, metadata=metadata)
        data = bytearray()
        try:
            async for message in call:
                data += message
                if len(data) > blob.size:
                    break
        except grpc.aio.AioRpcError as failure:
            error = rebuild_error(failure, connection.address)
            if not isinstance(error, NotReadyError):
                raise error from None
            await patience.wait(error, 0)
            continue
        finally:
            call.cancel()
        units = [leaf_hash(data[slice(*blob.unit(index))]) for index in range(len(blob.hashes))]
        if len(data) != blob.size or tuple(units) != blob.hashes:
            raise DigestMismatchError(f"blob {digest} is not what its name says")
        return bytes(data)
