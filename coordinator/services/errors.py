"""The one place where errors become gRPC statuses, and where a call is let in.

Services raise domain errors; this interceptor answers with the status of the error's family, the
sentence as details, and ``minga-code`` with the typed fields as trailing metadata. Anything else is
a bug: the caller gets INTERNAL and a reference, the traceback stays in our diagnostics.

Every method is served as one that takes a stream of raw messages, which on the wire is the same:
so the guard looks at the caller before a byte of the message is read, and bytes that are no message
of the method are refused by our own words.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from coordinator.limits import BULK, Limits
from coordinator.services.guard import Guard, caller_of
from protocols.errors import (
    FederationError,
    MalformedMessageError,
    TooManyRequestsError,
    error_details,
    grpc_status_name,
)

logger = logging.getLogger(__name__)
# Full name of the method that is being answered: what a caller may do depends on it.
METHOD: ContextVar[str] = ContextVar("method", default="")
Context: TypeAlias = grpc.aio.ServicerContext


async def _abort(context: Context, method: str, error: Exception) -> NoReturn:
    if isinstance(error, FederationError):
        trailing = [("minga-code", error.code)]
        trailing += [(f"minga-{k.replace('_', '-')}", v) for k, v in error_details(error).items()]
        # Whoever asks too much would also fill the diagnostics: the guard says it now and then.
        level = logging.DEBUG if isinstance(error, TooManyRequestsError) else logging.INFO
        logger.log(level, "%s: %s [%s]", method, error, error.code)
        status = grpc.StatusCode[grpc_status_name(error)]
        await context.abort(status, str(error), tuple(trailing))
    reference = secrets.token_hex(4)
    logger.error("%s: unexpected error %s", method, reference, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL,
        f"an error on the coordinator's side; its diagnostics have it as {reference}",
        (("minga-code", "internal"),),
    )
    raise AssertionError("abort raises")


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every method."""

    def __init__(self, guard: Guard | None = None) -> None:
        """Serve within the limits of ``guard``; None: the default ones."""
        self._guard = guard or Guard(Limits())

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give back the handler, guarded and with its errors translated."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        ask = _Asked(self._guard, method, handler)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                ask.stream, None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(ask.single, None, handler.response_serializer)


class _Asked:
    """One call of a method: let in, read, answered."""

    def __init__(self, guard: Guard, method: str, handler: grpc.RpcMethodHandler) -> None:
        self._guard = guard
        self._method = method
        self._parse = handler.request_deserializer
        self._streams_in = handler.request_streaming
        self._behaviour: Callable[[Any, Context], Any] = next(
            found
            for found in (
                handler.unary_unary,
                handler.stream_unary,
                handler.unary_stream,
                handler.stream_stream,
            )
            if found is not None
        )

    async def single(self, _: Any, context: Context) -> Any:
        """A method with one answer."""
        METHOD.set(self._method)
        try:
            caller = caller_of(context)
            await self._guard.place(self._method, caller)
            with self._guard.under_way(self._method, caller):
                await self._guard.admit(self._method, caller)
                return await self._behaviour(await self._request(context), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - this is where every error ends
            await _abort(context, self._method, error)

    async def stream(self, _: Any, context: Context) -> AsyncIterator[Any]:
        """A method with a stream of answers."""
        METHOD.set(self._method)
        try:
            caller = caller_of(context)
            await self._guard.place(self._method, caller)
            with self._guard.under_way(self._method, caller):
                await self._guard.admit(self._method, caller)
                async for answer in self._behaviour(await self._request(context), context):
                    yield answer
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - this is where every error ends
            await _abort(context, self._method, error)

    async def _request(self, context: Context) -> Any:
        if self._streams_in:
            return self._messages(context)
        raw = await self._guard.patient(context.read())
        if raw is grpc.aio.EOF:
            raise MalformedMessageError(f"{self._method} came without a message")
        return self._read(raw)

    async def _messages(self, context: Context) -> AsyncIterator[Any]:
        if self._method in BULK:
            async for raw in self._guard.steady(context.read):
                yield raw
            return
        while (raw := await context.read()) is not grpc.aio.EOF:  # a witness may be silent
            yield self._read(raw)

    def _read(self, raw: bytes) -> Any:
        if self._parse is None:
            return raw
        try:
            return self._parse(raw)
        except (DecodeError, UnicodeDecodeError, RecursionError):
            raise MalformedMessageError(f"the bytes are no message of {self._method}") from None
