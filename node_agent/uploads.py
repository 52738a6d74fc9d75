"""Vectors up: raw bytes, resumed where they stopped, over a long link in several streams.

Announce (BeginUpload) -> Append from the durable offset -> FinishUpload -> receipt. After any
failure the coordinator is asked again how far it got; what is durable there is not sent twice. Over
a long link several streams bring several parts at once (``node_agent.parts``). Normative text:
protocols/spec/upload.md, section 3.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from node_agent.bulk import (
    MESSAGE,
    READ_BACK_S,
    STALL_S,
    Patience,
    Progress,
    Watch,
    silent,
    unless_stalled,
)
from node_agent.client import Connection, rebuild_error
from node_agent.parts import PART_UNITS, missing_parts, streams_for
from protocols.errors import (
    CorruptStateError,
    MalformedMessageError,
    NotReadyError,
    UnreachableError,
)
from protocols.gen import bulk_pb2
from protocols.tensors.sizes import UNIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What BeginUpload says."""

    header: bytes
    signature: bytes
    unit_hashes: tuple[bytes, ...]


async def upload(
    connection: Connection,
    path: Path,
    announcement: Announcement,
    *,
    progress: Progress = silent,
    stall_s: float = STALL_S,
    leaf: bytes = b"",
) -> bytes:
    """Send a file and return its receipt, 32 bytes. Safe to repeat at any time.

    Args:
        connection: to the coordinator.
        path: the vector.
        announcement: its signed header.
        progress: told of every step.
        stall_s: without progress for so long, a try is given up.
        leaf: what the node signs about it for the round log; empty: there is none.

    Raises:
        ConflictingUploadError, WrongPhaseError, NotListedError: as the coordinator said.
        CorruptStateError: the file is not as long as what was announced.
        NotReadyError: it failed too often in a row without progress.
    """
    request = bulk_pb2.BeginUploadRequest(
        header=announcement.header,
        signature=announcement.signature,
        unit_hashes=announcement.unit_hashes,
    )
    patience = Patience(connection)
    arrived: set[int] = set()  # units beyond the durable offset that were acknowledged
    while True:
        # After a restart the other side reads the whole file back before it answers.
        state = await connection.ask(lambda c: c.bulk.BeginUpload, request, timeout_s=READ_BACK_S)
        if not state.complete and state.durable < state.total:
            if _size(path) != state.total:
                raise CorruptStateError(f"{path} is not the vector that was announced")
            place = Place(method=APPEND, name=("minga-upload-bin", bytes(state.upload_id)))
            try:
                await send(
                    connection, path, place, state, arrived, progress=progress, stall_s=stall_s
                )
            except NotReadyError as error:
                await patience.wait(error, int(state.durable))
                continue
        finish = bulk_pb2.FinishUploadRequest(upload_id=state.upload_id, leaf=leaf)
        try:
            answer = await connection.call(
                connection.bulk.FinishUpload, finish, timeout_s=READ_BACK_S
            )
        except NotReadyError as error:  # not answered, or it lost what it had not acknowledged
            arrived.clear()
            await patience.wait(error, int(state.durable))
            continue
        progress(int(state.total), int(state.total))
        return bytes(answer.receipt)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the bytes of a file go."""

    method: str
    name: tuple[str, bytes]  # metadata that says of what they are


APPEND: Final = "/minga.v1.Bulk/Append"
MOST_AHEAD: Final = 2  # parts of a connection: one is sent while the one before is answered
RATED: Final = 8 * 2**20  # bytes: of fewer the time says little about the link


async def send(
    connection: Connection,
    path: Path,
    place: Place,
    state: bulk_pb2.UploadState,
    arrived: set[int],
    *,
    progress: Progress = silent,
    stall_s: float = STALL_S,
) -> None:
    """Send what is missing, over a long link in several streams at once.

    Args:
        connection: to the coordinator.
        path: the file.
        place: where it goes.
        state: as the other side answered when it was announced.
        arrived: units beyond ``state.durable`` that it has; those that it gets are added.
        progress: told of every message.
        stall_s: without progress for so long, a stream is given up.

    Raises:
        NotReadyError: a stream broke; what arrived before stays.
        CorruptStateError: the file is shorter than it was.
    """
    start, total = int(state.durable), int(state.total)
    ahead = min(MOST_AHEAD, max(1, int(state.ahead)))
    least = 1 if ahead > 1 else PART_UNITS
    missing = sum(end - offset for offset, end in missing_parts(start, total, arrived, 1))
    streams = streams_for(
        round_trip_s=connection.round_trip_s,
        allowed=int(state.streams),
        parts=-(-missing // (least * UNIT)),
        rate=connection.upload_rate,
    )
    now = asyncio.get_running_loop().time
    begun = now()
    if streams == 1 and not arrived:
        await _append(
            connection, connection.channel, path, place, start, total, alone=True,
            progress=lambda more: progress(start + more, total), stall_s=stall_s,
        )  # fmt: skip
    else:
        parts = list(missing_parts(start, total, arrived, streams, least=least))
        await _send_parts(
            connection, path, place, parts, streams, ahead, arrived, total,
            progress=progress, stall_s=stall_s,
        )  # fmt: skip
    if missing >= RATED and now() > begun:
        connection.upload_rate = missing / (now() - begun)


async def _send_parts(
    connection: Connection,
    path: Path,
    place: Place,
    parts: Sequence[tuple[int, int]],
    streams: int,
    ahead: int,
    arrived: set[int],
    total: int,
    *,
    progress: Progress,
    stall_s: float,
) -> None:
    sent = dict.fromkeys(parts, 0)
    before = total - sum(end - offset for offset, end in parts)

    def count(part: tuple[int, int], more: int) -> None:
        sent[part] = more
        progress(before + sum(sent.values()), total)

    async def work(channel: grpc.aio.Channel, sending: asyncio.Lock) -> None:
        while True:
            async with _Turn(sending) as turn:
                part = next(waiting, None)
                if part is None:
                    return
                await _append(
                    connection, channel, path, place, *part, alone=False,
                    progress=partial(count, part), sent=turn.end, stall_s=stall_s,
                )  # fmt: skip
                arrived.update(range(part[0] // UNIT, -(-part[1] // UNIT)))

    waiting = iter(parts)  # shared: whoever is free takes the next
    async with connection.channels(streams) as channels:
        tasks = [
            asyncio.ensure_future(work(channel, sending))
            for channel, sending in [(channel, asyncio.Lock()) for channel in channels]
            for _ in range(ahead)  # one of them sends while the others wait for their answers
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


class _Turn:
    """One part of a connection at a time is sent; the next one need not wait for its answer."""

    def __init__(self, sending: asyncio.Lock) -> None:
        self._sending = sending
        self._mine = False

    async def __aenter__(self) -> _Turn:
        await self._sending.acquire()
        self._mine = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Everything is sent. Again: nothing happens."""
        if self._mine:
            self._mine = False
            self._sending.release()


async def _append(
    connection: Connection,
    channel: grpc.aio.Channel,
    path: Path,
    place: Place,
    offset: int,
    end: int,
    *,
    alone: bool,
    progress: Callable[[int], None],
    stall_s: float,
    sent: Callable[[], None] = lambda: None,
) -> int:
    """Stream bytes [offset, end) of a file; return the offset that is durable there.

    ``sent`` is called when the last of them went out, before they are answered.

    When the other side ends the call while we write, grpc.aio reports that the write failed and
    loses the reason. An append of nothing, which writes nothing, brings the reason out.
    """
    watch = Watch(offset)

    async def messages() -> AsyncIterator[bytes]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            at = offset
            while at < end:
                data = os.pread(descriptor, min(MESSAGE, end - at), at)
                if not data:
                    raise CorruptStateError(f"{path} became shorter while it was sent")
                yield data
                at += len(data)
                watch.moved = at
                progress(at - offset)
            sent()
        finally:
            os.close(descriptor)

    metadata: list[tuple[str, str | bytes]] = [place.name, ("minga-offset", str(offset))]
    if not alone:
        metadata.append(("minga-end", str(end)))
    call = partial(_append_call, connection, channel, place.method, metadata, watch, stall_s)
    try:
        return await call(messages())
    except _CutOffError:
        await call(_nothing())
        raise UnreachableError("the upload was cut off", retry_after_s=0.0) from None


class _CutOffError(Exception):
    """The call ended while it was written to; why is not known."""


async def _nothing() -> AsyncIterator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for message in nothing:
        yield message


async def _append_call(
    connection: Connection,
    channel: grpc.aio.Channel,
    method: str,
    metadata: Sequence[tuple[str, str | bytes]],
    watch: Watch,
    stall_s: float,
    messages: AsyncIterator[bytes],
) -> int:
    call = channel.stream_unary(method, None, None)(messages, metadata=metadata)
    try:
        answer = await unless_stalled(call, watch, stall_s=stall_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INTERNAL and "from Core" in (error.details() or ""):
            raise _CutOffError from None
        raise rebuild_error(error, connection.address) from None
    except asyncio.CancelledError:
        if not call.cancelled():  # we are being cancelled, not the call
            call.cancel()
            raise
        raise UnreachableError("the upload was cut off") from None
    if not isinstance(answer, bytes) or len(answer) != 8:
        raise MalformedMessageError("Append must answer with an offset of 8 bytes")
    return int.from_bytes(answer, "big")
