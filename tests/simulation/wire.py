"""The network: real servicers behind real error interceptor and real (de)serialisers, no sockets.

It implements as much of ``grpc.aio`` as Minga uses, on both sides, so ``coordinator.app.serve``
and ``node_agent.client.Connection`` run unchanged. A call carries the caller's certificate, as TLS
does. The next calls of a node may be lost before or after the handler ran, arrive twice, or late.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any
from unittest import mock

import grpc
import grpc.aio

from coordinator.services.errors import ErrorInterceptor
from tests.simulation.engine import PROCESS, Loop, Process

LATENCY = 0.002  # seconds, one way
BROKEN = 0.3  # seconds until a caller notices that a connection is gone
_VIEWS = ("/Sync", "/Follow", "/NextCheckpoint")  # asked for again anyway
Tap = Callable[[str, str, bytes], None]  # (caller, method, request)
EOF = grpc.aio.EOF


def _error(code: grpc.StatusCode, details: str, trailing: Any = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


def lost() -> grpc.aio.AioRpcError:
    """What a caller sees of a broken connection."""
    return _error(grpc.StatusCode.UNAVAILABLE, "connection lost")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one call."""

    kind: str  # "request" | "answer" | "twice" | "late"
    seconds: float = 0.0
    method: str = ""  # the next call of this method; empty: the next call

    def hits(self, method: str) -> bool:
        """Whether it is meant for a call."""
        return method.endswith(f"/{self.method}") if self.method else not method.endswith(_VIEWS)


@dataclass(slots=True)
class Link:
    """The connection of one client."""

    name: str
    faults: list[Fault] = field(default_factory=list)
    cut_until: float = 0.0
    streams: set[Stream] = field(default_factory=set)


class Network:
    """Who listens where, and what goes wrong on the way."""

    def __init__(self, loop: Loop, rng: Random) -> None:
        self.loop = loop
        self.rng = rng
        self.servers: dict[str, Server] = {}
        self.links: dict[str, Link] = {}
        self.taps: list[Tap] = []
        self.fired: Counter[str] = Counter()
        self.internal: list[str] = []  # answers that mean a bug of the coordinator

    def link(self, name: str) -> Link:
        """The connection of a client."""
        return self.links.setdefault(name, Link(name))

    def seen(self, caller: str, method: str, request: bytes) -> None:
        """A request left its sender, whether it arrives or not."""
        for tap in self.taps:
            tap(caller, method, request)

    def next_fault(self, link: Link, method: str) -> Fault | None:
        """What happens to this call."""
        if link.cut_until > self.loop.time():
            self.fired["cut"] += 1
            return Fault("request")
        fault = next((each for each in link.faults if each.hits(method)), None)
        if fault is not None:
            link.faults.remove(fault)
            self.fired[fault.kind] += 1
        return fault

    def reachable(self, address: str) -> Server:
        """Raises: AioRpcError: nobody listens there."""
        server = self.servers.get(address)
        if server is None or server.process.dead:
            raise lost()
        return server

    def drop(self, process: Process) -> None:
        """A process died: its peers notice."""
        for address, server in list(self.servers.items()):
            if server.process is process:
                del self.servers[address]
                for reply in server.replies:
                    if not reply.done():
                        reply.set_exception(lost())
                        reply.exception()
                server.replies.clear()
        for link in self.links.values():
            for stream in list(link.streams):
                if process in (stream.client, stream.server.process):
                    stream.broken()

    def cut(self, name: str, seconds: float) -> None:
        """No packet of a client gets through for a while."""
        link = self.link(name)
        link.cut_until = self.loop.time() + seconds
        for stream in list(link.streams):
            stream.broken()


class ServerContext:
    """What a handler sees of a call."""

    def __init__(
        self, pem: bytes, metadata: tuple[tuple[str, Any], ...], up: asyncio.Queue[Any]
    ) -> None:
        self._pem, self._metadata, self._up = pem, metadata, up

    async def read(self) -> Any:
        """The next raw message; EOF again and again at the end."""
        item = await self._up.get()
        if item is EOF:
            self._up.put_nowait(EOF)
        return item

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem]} if self._pem else {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> None:
        raise _error(code, details, trailing)


@dataclass(frozen=True, slots=True)
class _Details:
    method: str
    invocation_metadata: tuple[Any, ...] = ()


class Server:
    """As ``grpc.aio.server`` makes one."""

    def __init__(self, network: Network, interceptor: ErrorInterceptor) -> None:
        process = PROCESS.get()
        assert process is not None
        self.network, self.process, self._interceptor = network, process, interceptor
        interceptor._guard._clock = network.loop.time
        self.replies: set[asyncio.Future[Any]] = set()
        self._generic: list[Any] = []
        self._addresses: list[str] = []
        self._wrapped: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._generic.extend(handlers)

    def add_registered_method_handlers(self, _service: str, _handlers: Any) -> None: ...

    def add_secure_port(self, address: str, _credentials: Any) -> int:
        self._addresses.append(address)
        return 1

    async def start(self) -> None:
        self.network.servers.update(dict.fromkeys(self._addresses, self))

    async def stop(self, _grace: float | None = None) -> None:
        for address in self._addresses:
            self.network.servers.pop(address, None)

    async def handler(self, method: str) -> Any:
        """The handler of a method behind the interceptor, or UNIMPLEMENTED."""
        if method not in self._wrapped:
            details = _Details(method)

            async def look(details: Any) -> Any:
                found = (generic.service(details) for generic in self._generic)
                return next((each for each in found if each is not None), None)

            self._wrapped[method] = await self._interceptor.intercept_service(look, details)
        if self._wrapped[method] is None:
            raise _error(grpc.StatusCode.UNIMPLEMENTED, method)
        return self._wrapped[method]

    def begin(
        self, method: str, request: bytes, pem: bytes, metadata: Any
    ) -> tuple[asyncio.Future[Any], asyncio.Task[Any]]:
        """Answer a unary call in a task of this process."""
        reply: asyncio.Future[Any] = self.network.loop.create_future()
        self.replies.add(reply)
        reply.add_done_callback(self.replies.discard)

        async def answer() -> None:
            up: asyncio.Queue[Any] = asyncio.Queue()
            up.put_nowait(request)
            up.put_nowait(EOF)
            try:
                handler = await self.handler(method)
                made = await handler.stream_unary(None, ServerContext(pem, metadata, up))
                outcome: Any = _write(handler.response_serializer, made)
            except grpc.aio.AioRpcError as error:
                self.note(method, error)
                outcome = error
            if not reply.done():
                reply.set_result(outcome)

        return reply, self.process.spawn(answer(), f"serve {method}")

    def note(self, method: str, error: grpc.aio.AioRpcError) -> None:
        """INTERNAL is a bug."""
        if error.code() is grpc.StatusCode.INTERNAL:
            self.network.internal.append(f"{method}: {error.details()}")


def _read(codec: Any, data: bytes) -> Any:
    return data if codec is None else codec(data)


def _write(codec: Any, message: Any) -> bytes:
    return message if codec is None else codec(message)


class Channel:
    """As ``grpc.aio.secure_channel`` makes one, for the process that asks."""

    def __init__(self, network: Network, name: str, address: str, pem: bytes) -> None:
        process = PROCESS.get()
        assert process is not None
        self.network, self.process = network, process
        self.link, self.address, self.pem = network.link(name), address, pem

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def close(self, _grace: float | None = None) -> None: ...

    def unary_unary(self, method: str, *codecs: Any, **named: Any) -> Any:
        write, read = _codecs(codecs, named)

        def call(request: Any, *, timeout: float | None = None, metadata: Any = ()) -> Any:
            return self._unary(method, _write(write, request), tuple(metadata), timeout, read)

        return call

    def stream_unary(self, method: str, *codecs: Any, **named: Any) -> Any:
        return _Multi(self, method, *_codecs(codecs, named), one_answer=True)

    def unary_stream(self, method: str, *codecs: Any, **named: Any) -> Any:
        return _Multi(self, method, *_codecs(codecs, named), one_request=True)

    def stream_stream(self, method: str, *codecs: Any, **named: Any) -> Any:
        return _Multi(self, method, *_codecs(codecs, named))

    async def _unary(
        self, method: str, request: bytes, metadata: Any, within: float | None, read: Any
    ) -> Any:
        network, rng = self.network, self.network.rng
        network.seen(self.link.name, method, request)
        fault = network.next_fault(self.link, method)
        kind = fault.kind if fault else ""
        if kind == "request":
            await asyncio.sleep(BROKEN)
            raise lost()
        await asyncio.sleep(LATENCY * (1 + rng.random()))
        if kind == "late":  # the caller gives up; the request arrives after later ones
            self._again(method, request, metadata, fault.seconds)
            await asyncio.sleep(BROKEN)
            raise lost()
        server = network.reachable(self.address)
        if kind == "twice":
            self._again(method, request, metadata, fault.seconds)
        reply, task = server.begin(method, request, self.pem, metadata)
        try:
            async with asyncio.timeout(within):
                outcome = await reply
        except TimeoutError:
            raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "timed out") from None
        finally:
            if not reply.done():
                task.cancel()  # as gRPC does when its caller is gone
        if kind == "answer":
            await asyncio.sleep(BROKEN)
            raise lost()
        await asyncio.sleep(LATENCY)
        if isinstance(outcome, grpc.aio.AioRpcError):
            raise outcome
        return _read(read, outcome)

    def _again(self, method: str, request: bytes, metadata: Any, seconds: float) -> None:
        """The same request once more, after a while; nobody waits for its answer."""

        def arrive() -> None:
            server = self.network.servers.get(self.address)
            if server is not None and not server.process.dead:
                server.begin(method, request, self.pem, metadata)

        self.network.loop.call_later(max(seconds, LATENCY), arrive)


def _codecs(positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    if positional:
        return positional[0], positional[1]
    return named.get("request_serializer"), named.get("response_deserializer")


@dataclass(frozen=True, slots=True)
class _Multi:
    channel: Channel
    method: str
    write: Any
    read: Any
    one_request: bool = False
    one_answer: bool = False

    def __call__(self, requests: Any = None, *, metadata: Any = (), timeout: Any = None) -> Stream:
        return Stream(self, requests, tuple(metadata))


class Stream:
    """A call with a stream in one direction or both."""

    def __init__(self, multi: _Multi, requests: Any, metadata: tuple[Any, ...]) -> None:
        channel = multi.channel
        self.multi, self.metadata, self.client = multi, metadata, channel.process
        self.network, self.link = channel.network, channel.link
        self.up: asyncio.Queue[Any] = asyncio.Queue()
        self.down: asyncio.Queue[Any] = asyncio.Queue()
        self._over = False
        self._given_up = False
        self._task: asyncio.Task[Any] | None = None
        self._pump: asyncio.Task[Any] | None = None
        fault = self.network.next_fault(self.link, multi.method)
        self._lose = fault.kind if fault else ""
        try:
            if self._lose in ("request", "late"):
                raise lost()
            self.server = self.network.reachable(channel.address)
        except grpc.aio.AioRpcError as error:
            self._end(error)
            return
        self.link.streams.add(self)
        if multi.one_request:
            self.up.put_nowait(_write(multi.write, requests))
            self.up.put_nowait(EOF)
        elif requests is not None:
            self._pump = self.client.spawn(self._send_all(requests), "pump")
        self._task = self.server.process.spawn(self._serve(channel.pem), f"serve {multi.method}")

    # -- the client's side -------------------------------------------------------------------

    async def _send_all(self, requests: Any) -> None:
        async for message in requests:
            await asyncio.sleep(LATENCY)
            data = _write(self.multi.write, message)
            self.network.seen(self.link.name, self.multi.method, data)
            self.up.put_nowait(data)
        self.up.put_nowait(EOF)

    async def write(self, message: Any) -> None:
        if self._over:
            raise asyncio.InvalidStateError("the call is over")
        self.up.put_nowait(_write(self.multi.write, message))

    async def read(self) -> Any:
        item = await self.down.get()
        if isinstance(item, BaseException):
            self.down.put_nowait(item)
            raise item
        if item is EOF:
            self.down.put_nowait(EOF)
            return EOF
        return _read(self.multi.read, item)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items()

    async def _items(self) -> AsyncIterator[Any]:
        while (item := await self.read()) is not EOF:
            yield item

    def __await__(self) -> Any:
        return self._one().__await__()

    async def _one(self) -> Any:
        await asyncio.sleep(LATENCY)
        return await self.read()

    def cancel(self) -> bool:
        """The client gives up."""
        self._given_up = True
        self._close()
        return True

    def cancelled(self) -> bool:
        return self._given_up

    def _close(self) -> None:
        self._over = True
        self.link.streams.discard(self)
        for task in (self._task, self._pump):
            if task is not None and not task.done():
                task.cancel()

    def _end(self, item: Any) -> None:
        if not self._over:
            self.network.loop.call_soon(self.down.put_nowait, item)  # in order: no timers
        self._over = True
        self.link.streams.discard(self)

    def broken(self) -> None:
        """The connection is gone."""
        self._end(lost())
        self._close()

    # -- the server's side -------------------------------------------------------------------

    async def _serve(self, pem: bytes) -> None:
        multi, context = self.multi, ServerContext(pem, self.metadata, self.up)
        try:
            handler = await self.server.handler(multi.method)
            if multi.one_answer:
                made = await handler.stream_unary(None, context)
                self._answer(_write(handler.response_serializer, made))
            else:
                async for answer in handler.stream_stream(None, context):
                    self._answer(_write(handler.response_serializer, answer))
            self._end(EOF)
        except grpc.aio.AioRpcError as error:
            self.server.note(multi.method, error)
            self._end(error)

    def _answer(self, data: bytes) -> None:
        if self._lose == "answer":
            raise lost()
        if not self._over:
            self.network.loop.call_soon(self.down.put_nowait, data)


@contextmanager
def patched_grpc(network: Network) -> Iterator[None]:
    """Let whoever asks gRPC for a server or a channel get one of this network."""

    def server(*, interceptors: Any, **_: Any) -> Server:
        return Server(network, interceptors[0])

    def channel(address: str, credentials: Any, options: Any = None) -> Channel:
        process = PROCESS.get()
        name = process.name if process is not None else "nobody"
        return Channel(network, name, address, credentials)

    def credentials(
        root_certificates: Any = None, private_key: Any = None, certificate_chain: bytes = b""
    ) -> bytes:
        return certificate_chain

    with (
        mock.patch.object(grpc.aio, "server", server),
        mock.patch.object(grpc.aio, "secure_channel", channel),
        mock.patch.object(grpc, "ssl_channel_credentials", credentials),
        mock.patch.object(grpc, "ssl_server_credentials"),
    ):
        yield
