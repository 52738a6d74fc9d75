"""A coordinator's bulk service in memory, over real mutual TLS, that fails when it is told to.

It keeps what it acknowledged (whole units) and forgets the rest when a stream breaks, as the real
one does after a crash. Faults are used up one by one; ``fired`` says how many struck, so that a
test can show that its fault really happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives import serialization

from coordinator.ca import key_pem, new_tls_key
from coordinator.services.errors import ErrorInterceptor
from node_agent.client import Connection
from node_agent.keys import KeyStore
from protocols.crypto.identity import Identity
from protocols.errors import NotFoundError, NotReadyError, OffsetError
from protocols.gen import bulk_pb2, bulk_pb2_grpc
from protocols.identifiers import Digest
from protocols.tensors.sizes import UNIT
from protocols.tensors.units import digest_of_units, unit_hashes
from protocols.tlog.merkle import leaf_hash
from protocols.upload import UploadHeader
from tests.support.node import Authority, rng

MESSAGE = 2**20


@dataclass
class Faults:
    """What goes wrong, in order of use; an empty list: nothing."""

    cut_up_after: list[int] = field(default_factory=list)  # bytes received, then UNAVAILABLE
    cut_down_after: list[int] = field(default_factory=list)  # bytes sent
    lose: list[str] = field(default_factory=list)  # method whose next answer is lost
    refuse: list[tuple[str, Exception]] = field(default_factory=list)  # method, error
    flip_at: int | None = None  # byte of a download that is inverted
    stall_up: int = 0  # appends that read nothing
    fired: int = 0


@dataclass
class BulkServer(bulk_pb2_grpc.BulkServicer):  # type: ignore[misc]
    """Uploads in ``kept``, blobs in ``blobs``."""

    faults: Faults = field(default_factory=Faults)
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    hashes: dict[Digest, tuple[bytes, ...]] = field(default_factory=dict)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    kept: dict[bytes, bytes] = field(default_factory=dict)  # durable bytes of each upload
    units: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    received: int = 0  # bytes of all appends, also of those that were cut
    sent: int = 0  # bytes of all fetches

    def put(self, data: bytes) -> Digest:
        """Offer a blob."""
        hashes = unit_hashes(data)
        digest = digest_of_units(hashes)
        self.blobs[digest], self.hashes[digest] = data, hashes
        return digest

    def _refused(self, method: str) -> None:
        if self.faults.refuse and self.faults.refuse[0][0] == method:
            self.faults.fired += 1
            raise self.faults.refuse.pop(0)[1]

    async def _answered(self, method: str, context: Any) -> None:
        if self.faults.lose and self.faults.lose[0] == method:
            self.faults.lose.pop(0)
            self.faults.fired += 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")

    async def BeginUpload(self, request: Any, context: Any) -> Any:
        self._refused("BeginUpload")
        header = UploadHeader.from_bytes(request.header)
        self.headers.setdefault(header.upload_id, request.header)
        self.units[header.upload_id] = tuple(request.unit_hashes)
        durable = len(self.kept.setdefault(header.upload_id, b""))
        await self._answered("BeginUpload", context)
        return bulk_pb2.UploadState(
            upload_id=header.upload_id, durable=durable, total=header.size, complete=False
        )

    async def FinishUpload(self, request: Any, context: Any) -> Any:
        self._refused("FinishUpload")
        header = UploadHeader.from_bytes(self.headers[request.upload_id])
        if len(self.kept[request.upload_id]) != header.size:
            raise NotReadyError("send the rest first", retry_after_s=0.0)
        await self._answered("FinishUpload", context)
        return bulk_pb2.Receipt(receipt=header.receipt)

    async def append(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        """Raw: keeps whole units that have their hash."""
        self._refused("Append")
        metadata = dict(context.invocation_metadata())
        upload_id = metadata["minga-upload-bin"]
        total = UploadHeader.from_bytes(self.headers[upload_id]).size
        kept = bytearray(self.kept[upload_id])
        if int(metadata["minga-offset"]) != len(kept):
            raise OffsetError("elsewhere", expected=len(kept))
        if self.faults.stall_up:
            self.faults.stall_up -= 1
            self.faults.fired += 1
            await asyncio.sleep(3600)
        taken, whole = 0, len(kept)
        cuts = self.faults.cut_up_after
        async for message in messages:
            assert len(message) <= MESSAGE
            kept += message
            taken += len(message)
            self.received += len(message)
            while whole < len(kept) and (len(kept) - whole >= UNIT or len(kept) == total):
                unit = bytes(kept[whole : whole + UNIT])
                assert leaf_hash(unit) == self.units[upload_id][whole // UNIT]
                whole += len(unit)
                self.kept[upload_id] = bytes(kept[:whole])
            if cuts and taken >= cuts[0]:
                cuts.pop(0)
                self.faults.fired += 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        await self._answered("Append", context)
        return whole.to_bytes(8, "big")

    async def DescribeBlob(self, request: Any, context: Any) -> Any:
        self._refused("DescribeBlob")
        digest = Digest(request.digest.hex())
        if digest not in self.blobs:
            raise NotFoundError("no such blob")
        await self._answered("DescribeBlob", context)
        return bulk_pb2.BlobInfo(
            digest=request.digest, size=len(self.blobs[digest]), unit_hashes=self.hashes[digest]
        )

    async def fetch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Raw: the bytes of a blob from an offset on."""
        self._refused("Fetch")
        digest, offset = Digest(request[:32].hex()), int.from_bytes(request[32:], "big")
        data = bytearray(self.blobs[digest])
        if self.faults.flip_at is not None:
            data[self.faults.flip_at] ^= 0xFF
            self.faults.flip_at = None
            self.faults.fired += 1
        cuts, given = self.faults.cut_down_after, 0
        for at in range(offset, len(data), MESSAGE):
            message = bytes(data[at : at + MESSAGE])
            yield message
            given += len(message)
            self.sent += len(message)
            if cuts and given >= cuts[0]:
                cuts.pop(0)
                self.faults.fired += 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")


@dataclass
class Served:
    """A bulk server that listens and a node's connection to it."""

    server: BulkServer
    connection: Connection
    authority: Authority
    keys: KeyStore
    address: str


def server_credentials(
    authority: Authority, *, role: str = "coordinator", hosts: tuple[str, ...] = ("127.0.0.1",)
) -> grpc.ServerCredentials:
    """Mutual TLS with a certificate of the authority."""
    key = new_tls_key()
    identity = Identity(role, role if role == "coordinator" else "b")  # type: ignore[arg-type]
    certificate = authority.ca.issue(
        key.public_key(),
        identity,
        now=datetime.now(UTC),
        lifetime=timedelta(days=1),
        hosts=hosts if role == "coordinator" else (),
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return grpc.ssl_server_credentials(
        [(key_pem(key), pem)], root_certificates=authority.root, require_client_auth=True
    )


@asynccontextmanager
async def bulk_server(
    folder: Path,
    *,
    authority: Authority | None = None,
    credentials: Callable[[Authority], grpc.ServerCredentials] = server_credentials,
) -> AsyncIterator[Served]:
    """Serve on a free port; the node's key store is in ``folder``."""
    authority = authority or Authority.create()
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    service = BulkServer()
    bulk_pb2_grpc.add_BulkServicer_to_server(service, server)
    raw = {
        "Append": grpc.stream_unary_rpc_method_handler(service.append, None, None),
        "Fetch": grpc.unary_stream_rpc_method_handler(service.fetch, None, None),
    }
    handler = grpc.method_handlers_generic_handler("minga.v1.Bulk", raw)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_secure_port("127.0.0.1:0", credentials(authority))
    await server.start()
    keys = KeyStore(folder / "keys")
    identity = authority.enrol(keys)
    address = f"127.0.0.1:{port}"
    connection = Connection(address, identity, rng=rng())
    try:
        yield Served(service, connection, authority, keys, address)
    finally:
        await connection.close()
        await server.stop(None)
