"""Bulk data: uploads of integer vectors in, blobs out, in raw messages without protobuf.

An upload is announced by its signed header, resumed by either side after a crash, and handed in
once: the ledger takes header and phase in one transaction, so the same upload twice is one upload
and another upload for the same attempt is refused. Normative text: protocols/spec/upload.md.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from coordinator.blobs import Blobs
from coordinator.clock import Clock
from coordinator.layouts import Layouts
from coordinator.leaves import log_late, take_leaf
from coordinator.ledger import Ledger, Tx
from coordinator.rounds import advance
from coordinator.secure_sum import check_uploaded
from coordinator.services.caller import Callers
from coordinator.spool import AHEAD, MAX_MESSAGE, Arriving, Spool, upload_path
from policies.privacy.claim import claim_of
from protocols.decimals import read_decimal
from protocols.errors import (
    ConflictingUploadError,
    MalformedMessageError,
    NotFoundError,
    NotListedError,
    NotReadyError,
    WrongPhaseError,
)
from protocols.gen import bulk_pb2, bulk_pb2_grpc
from protocols.identifiers import Digest, NodeId, RoundId
from protocols.plan import Plan
from protocols.round_vector import round_ring
from protocols.rounds import NOBODY, Nodes, Phase, UploadArrived, Uploading
from protocols.tensors.units import digest_of_units, unit_count
from protocols.tlog.kinds import UpdateCommit
from protocols.upload import UploadHeader, check_unit_hashes, verify_header
from protocols.wire import read_bytes, read_digest_bytes

_MAX_BLOB = 2**42  # bytes
_MAX_PUTS = 64  # announced blobs that are remembered: each may have megabytes of hashes
BATCH = 4 * 2**20  # bytes of a stream after which the caller is looked at again
Context: TypeAlias = grpc.aio.ServicerContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the header of an upload must say, from the ledger and the plan."""

    plan: Plan
    model: Digest
    coordinates: int
    size: int  # bytes


def check_header(header: UploadHeader, node: NodeId, expected: Expected) -> None:
    """Compare a verified header with what the round asks for.

    Raises:
        NotListedError: somebody else's header.
        MalformedMessageError: another plan, model or size; the sentence says which.
    """
    if header.node != node:
        raise NotListedError(f"{node} sent a header of {header.node}")
    pairs = (
        ("federation", header.federation, expected.plan.federation),
        ("plan", header.plan, expected.plan.digest),
        ("model", header.model, expected.model),
        ("ring", header.ring, expected.plan.vector.ring_bits),
        ("coordinates", header.coordinates, expected.coordinates),
        ("size", header.size, expected.size),
    )
    for name, got, want in pairs:
        if got != want:
            raise MalformedMessageError(f"the upload's {name} is {got}, the round's is {want}")


def check_may_upload(phase: Phase, header: UploadHeader) -> None:
    """An upload may begin in its attempt, by a ready node, before the deadline closes the phase.

    Raises:
        WrongPhaseError, NotListedError.
    """
    round_ = header.round_id
    if not isinstance(phase, Uploading):
        name = type(phase).__name__
        raise WrongPhaseError(f"round {round_} is {name}: cannot take an update")
    if phase.attempt != header.attempt:
        raise WrongPhaseError(
            f"round {round_} is at attempt {phase.attempt}, the upload at {header.attempt}"
        )
    if header.node not in phase.ready:
        raise NotListedError(f"{header.node} is not in the ready set of round {round_}")


def _still_to_come(phase: Phase) -> Nodes:
    """Whose updates are waited for."""
    return phase.ready - phase.received if isinstance(phase, Uploading) else NOBODY


class BulkService(bulk_pb2_grpc.BulkServicer):
    """Control part and raw part of bulk data."""

    def __init__(
        self,
        *,
        callers: Callers,
        ledger: Ledger,
        clock: Clock,
        spool: Spool,
        blobs: Blobs,
        layouts: Layouts,
    ) -> None:
        self._callers = callers
        self._ledger = ledger
        self._clock = clock
        self._spool = spool
        self._blobs = blobs
        self._layouts = layouts
        self._puts: dict[Digest, Arriving] = {}

    # -- uploads -----------------------------------------------------------------------------

    async def BeginUpload(
        self, request: bulk_pb2.BeginUploadRequest, context: Context
    ) -> bulk_pb2.UploadState:
        """Announce an upload, or ask how far it got."""
        node = await self._callers.node(context)
        row = await self._ledger.read("signing_key", lambda tx: tx.node(node))
        if row is None:
            raise NotFoundError(f"{node} is not enrolled")
        header = verify_header(row.signing_key, request.header, request.signature)
        unit_hashes = tuple(request.unit_hashes)
        check_unit_hashes(header, unit_hashes)
        plan, start, index = await self._round_of(header.round_id)
        layout = self._layouts.of(plan, index)
        size = layout.packed_size(round_ring(plan))
        expected = Expected(plan=plan, model=start, coordinates=layout.coordinates, size=size)
        check_header(header, node, expected)
        arriving = Arriving(path=self._path(header), total=header.size, unit_hashes=unit_hashes)
        begun = await self._ledger.read("upload", lambda tx: tx.upload_by_id(header.upload_id))
        if begun is None:
            self._spool.check_room(header.size)

        def begin(tx: Tx) -> bool:
            known = tx.upload_by_id(header.upload_id)
            if known is not None:
                if known.header != request.header:
                    raise ConflictingUploadError(
                        f"{node} announced another upload for attempt {header.attempt} of round"
                        f" {header.round_id} before"
                    )
                return known.receipt is not None
            check_may_upload(tx.lock_round(header.round_id).phase, header)
            tx.add_upload(
                id=header.upload_id,
                round_id=header.round_id,
                attempt=header.attempt,
                node=node,
                header=request.header,
                signature=request.signature,
                unit_hashes=unit_hashes,
                total=header.size,
            )
            return False

        complete = await self._ledger.run("begin_upload", begin)
        durable = header.size if complete else await self._spool.durable(arriving)
        others = _still_to_come(await self._phase(header.round_id)) - {node}
        return bulk_pb2.UploadState(
            upload_id=header.upload_id,
            durable=durable,
            total=header.size,
            complete=complete,
            streams=self._spool.allow_streams(arriving, expected=len(others)),
            ahead=AHEAD,
        )

    async def FinishUpload(
        self, request: bulk_pb2.FinishUploadRequest, context: Context
    ) -> bulk_pb2.Receipt:
        """Hand in a complete upload: the moment from which it counts."""
        node = await self._callers.node(context)
        header, arriving, receipt = await self._find_upload(request.upload_id, node)
        if receipt is not None:  # an answer was lost; the receipt is the same
            return bulk_pb2.Receipt(receipt=receipt)
        durable = await self._spool.durable(arriving)
        now = self._clock.now()

        def finish(tx: Tx) -> bytes:
            row = tx.upload_by_id(header.upload_id)
            if row is None:
                raise NotFoundError("there is no such upload of yours; announce it first")
            if row.receipt is not None:
                return row.receipt  # another call was faster
            if durable != header.size:
                raise NotReadyError(
                    f"{durable} of {header.size} bytes arrived; send the rest first",
                    retry_after_s=0.0,
                )
            if tx.run(header.run).plan.secagg is not None:
                check_uploaded(tx, header.round_id, node, header.attempt, header.root, header.size)
            leaf = take_leaf(
                tx,
                request.leaf,
                node=node,
                round_id=header.round_id,
                kind=UpdateCommit,
                attempt=header.attempt,
                upload_root=header.root,
                bytes=header.size,
                privacy=self._claim(tx, header.round_id) if tx.logs else None,
            )
            receipt = header.receipt if leaf is None else bytes.fromhex(leaf)
            advance(
                tx,
                header.round_id,
                UploadArrived(node, header.attempt),
                now,
                transaction="accept_upload",
                node=node,
            )
            tx.finish_upload(header.upload_id, receipt, now)
            return receipt

        try:
            receipt = await self._ledger.run("accept_upload", finish)
        except WrongPhaseError:
            if request.leaf and self._ledger.logs:
                await log_late(self._ledger, node, request.leaf)
            raise
        self._spool.forget(arriving)
        return bulk_pb2.Receipt(receipt=receipt)

    def _claim(self, tx: Tx, round_id: RoundId) -> dict[str, Any] | None:
        """What an update of a round must say that it costs; None: it costs nothing."""
        row, plan = tx.round(round_id), tx.run(round_id.run).plan
        if row is None or plan.privacy is None:
            return None
        coordinates = self._layouts.of(plan, row.index).model_coordinates
        claim = claim_of(plan, row.index, coordinates)
        return None if claim is None else claim.to_value()

    async def append(self, messages: AsyncIterator[bytes], context: Context) -> bytes:
        """Raw: the bytes of an upload from an offset on. Answers the durable offset."""
        node = await self._callers.node(context)
        metadata = _metadata(context)
        upload_id = read_bytes(_binary(metadata, "minga-upload-bin"), what="an upload id", size=32)
        offset, end = _offset(metadata), _end(metadata)
        header, arriving, _ = await self._find_upload(upload_id, node)
        check_may_upload((await self._phase(header.round_id)), header)
        self._spool.check_room(max(0, (header.size if end is None else end) - offset))
        received = _Counted(messages, lambda: self._callers.node(context))
        try:
            durable = await self._spool.receive(
                arriving, offset, received, end=end, source=context.peer()
            )
        finally:
            if received.bytes:
                await self._ledger.run(
                    "traffic",
                    lambda tx: tx.add_traffic(header.round_id, node, received.bytes, 0),
                )
        return durable.to_bytes(8, "big")

    # -- blobs -------------------------------------------------------------------------------

    async def DescribeBlob(
        self, request: bulk_pb2.DescribeBlobRequest, context: Context
    ) -> bulk_pb2.BlobInfo:
        """Size and unit hashes of a blob."""
        await self._callers.any(context)
        reader = self._blobs.open(read_digest_bytes(request.digest))
        return bulk_pb2.BlobInfo(
            digest=request.digest, size=reader.size, unit_hashes=reader.unit_hashes
        )

    async def fetch(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """Raw: the bytes of a blob from an offset on."""
        identity = await self._callers.any(context)
        if len(request) != 40:
            raise MalformedMessageError("a fetch is 32 bytes of digest and 8 bytes of offset")
        reader = self._blobs.open(read_digest_bytes(request[:32]))
        offset = int.from_bytes(request[32:], "big")
        if offset > reader.size:
            raise MalformedMessageError(f"the blob has {reader.size} bytes, not {offset}")
        round_ = _metadata(context).get("minga-round")
        sent = 0
        fd = os.open(reader.path, os.O_RDONLY)
        try:
            ahead = asyncio.create_task(asyncio.to_thread(os.pread, fd, MAX_MESSAGE, offset))
            while data := await ahead:
                offset += len(data)
                ahead = asyncio.create_task(asyncio.to_thread(os.pread, fd, MAX_MESSAGE, offset))
                yield data
                sent += len(data)
                if sent % BATCH == 0:  # a stream may outlive the right to it
                    await self._callers.any(context)
            if offset != reader.size:
                raise NotFoundError("the blob was removed while it was read")
        finally:
            await asyncio.wait([ahead])
            os.close(fd)
            if sent and identity.role == "node" and isinstance(round_, str):
                await self._count_down(round_, NodeId(identity.name), sent)

    async def BeginPut(self, request: bulk_pb2.BlobInfo, context: Context) -> bulk_pb2.UploadState:
        """Operators: announce a blob, or ask how far it got."""
        await self._callers.operator(context)
        digest = read_digest_bytes(request.digest)
        hashes = tuple(request.unit_hashes)
        if request.size > _MAX_BLOB or len(hashes) != unit_count(request.size):
            raise MalformedMessageError("the number of unit hashes does not fit the size")
        if any(len(item) != 32 for item in hashes) or digest_of_units(hashes) != digest:
            raise MalformedMessageError("the unit hashes do not have the root that names the blob")
        if self._blobs.has(digest):
            return bulk_pb2.UploadState(
                upload_id=request.digest, durable=request.size, total=request.size, complete=True
            )
        arriving = Arriving(
            path=self._spool.root / "put" / digest, total=request.size, unit_hashes=hashes
        )
        self._spool.check_room(request.size)
        self._puts.pop(digest, None)
        self._puts[digest] = arriving
        if len(self._puts) > _MAX_PUTS:  # whoever announced that one announces it again
            del self._puts[next(iter(self._puts))]
        durable = await self._spool.durable(arriving)
        if durable == request.size:  # complete, but the answer or the naming was lost
            await self._adopt(arriving, digest)
        return bulk_pb2.UploadState(
            upload_id=request.digest,
            durable=durable,
            total=request.size,
            complete=durable == request.size,
            streams=self._spool.allow_streams(arriving),
            ahead=AHEAD,
        )

    async def put(self, messages: AsyncIterator[bytes], context: Context) -> bytes:
        """Raw: the bytes of an announced blob from an offset on."""
        await self._callers.operator(context)
        metadata = _metadata(context)
        digest = read_digest_bytes(_binary(metadata, "minga-digest-bin"))
        arriving = self._puts.get(digest)
        if arriving is None:
            raise NotFoundError("announce the blob with BeginPut first")
        durable = await self._spool.receive(
            arriving, _offset(metadata), messages, end=_end(metadata), source=context.peer()
        )
        # The stream that brings the last part names the blob; others see it complete as well.
        # Somebody may have asked how far it got meanwhile, so it need not be this announcement.
        if durable == arriving.total and self._puts.pop(digest, None) is not None:
            await self._adopt(arriving, digest)
        return durable.to_bytes(8, "big")

    # -- helpers -----------------------------------------------------------------------------

    async def _adopt(self, arriving: Arriving, digest: Digest) -> None:
        if arriving.total == 0:
            arriving.path.parent.mkdir(parents=True, exist_ok=True)
            arriving.path.touch()
        await asyncio.to_thread(self._blobs.adopt, arriving.path, digest, arriving.unit_hashes)
        self._spool.forget(arriving)
        self._puts.pop(digest, None)

    def _path(self, header: UploadHeader) -> Path:
        return upload_path(self._spool.root, header.round_id, header.attempt, header.node)

    async def _round_of(self, round_id: RoundId) -> tuple[Plan, Digest, int]:
        def find(tx: Tx) -> tuple[Plan, Digest, int]:
            row = tx.round(round_id)
            if row is None:
                raise NotFoundError(f"there is no round {round_id}")
            return tx.run(round_id.run).plan, row.start_root, row.index

        return await self._ledger.read("round_of_upload", find)

    async def _phase(self, round_id: RoundId) -> Phase:
        row = await self._ledger.read("phase", lambda tx: tx.round(round_id))
        if row is None:
            raise NotFoundError(f"there is no round {round_id}")
        return row.phase

    async def _find_upload(
        self, upload_id: bytes, node: NodeId
    ) -> tuple[UploadHeader, Arriving, bytes | None]:
        row = await self._ledger.read("upload", lambda tx: tx.upload_by_id(upload_id))
        if row is None or row.node != node:
            raise NotFoundError("there is no such upload of yours; announce it first")
        header = UploadHeader.from_bytes(row.header)
        arriving = Arriving(path=self._path(header), total=row.total, unit_hashes=row.unit_hashes)
        return header, arriving, row.receipt

    async def _count_down(self, round_text: str, node: NodeId, sent: int) -> None:
        def count(tx: Tx) -> None:
            round_id = RoundId.parse(round_text)
            if tx.round(round_id) is not None:
                tx.add_traffic(round_id, node, 0, sent)

        await self._ledger.run("traffic", count)


class _Counted:
    """Passes messages on, counts their bytes, and asks with every batch who sends them."""

    def __init__(
        self, messages: AsyncIterator[bytes], still: Callable[[], Awaitable[object]]
    ) -> None:
        self._messages = messages
        self._still = still
        self._asked = 0
        self.bytes = 0

    def __aiter__(self) -> _Counted:
        return self

    async def __anext__(self) -> bytes:
        message = await self._messages.__anext__()
        self.bytes += len(message)
        if self.bytes - self._asked >= BATCH:
            self._asked = self.bytes
            await self._still()
        return message


def raw_handlers(service: BulkService) -> grpc.GenericRpcHandler:
    """The methods that protoc cannot describe: raw bytes in both directions."""
    return grpc.method_handlers_generic_handler(
        "minga.v1.Bulk",
        {
            "Append": grpc.stream_unary_rpc_method_handler(service.append, None, None),
            "Put": grpc.stream_unary_rpc_method_handler(service.put, None, None),
            "Fetch": grpc.unary_stream_rpc_method_handler(service.fetch, None, None),
        },
    )


def _metadata(context: Context) -> dict[str, str | bytes]:
    return {item[0]: item[1] for item in context.invocation_metadata() or ()}


def _binary(metadata: dict[str, str | bytes], name: str) -> bytes:
    value = metadata.get(name, b"")
    return value if isinstance(value, bytes) else b""


def _offset(metadata: dict[str, str | bytes]) -> int:
    return _bytes(metadata.get("minga-offset"), "minga-offset")


def _end(metadata: dict[str, str | bytes]) -> int | None:
    text = metadata.get("minga-end")
    return None if text is None else _bytes(text, "minga-end")


def _bytes(text: str | bytes | None, name: str) -> int:
    number = read_decimal(text, most=_MAX_BLOB) if isinstance(text, str) else None
    if number is None:
        raise MalformedMessageError(f"metadata {name} must be a decimal number of bytes")
    return number
