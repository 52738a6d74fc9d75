"""The one place where errors become gRPC statuses.

Services raise domain errors; this interceptor answers with the status of the error's family, the
sentence as details, and ``minga-code`` with the typed fields as trailing metadata. Anything else is
a bug: the caller gets INTERNAL and a reference, the traceback stays in our diagnostics.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NoReturn, TypeAlias

import grpc

from protocols.errors import FederationError, error_details, grpc_status_name

logger = logging.getLogger(__name__)
# Full name of the method that is being answered: what a caller may do depends on it.
METHOD: ContextVar[str] = ContextVar("method", default="")
Context: TypeAlias = grpc.aio.ServicerContext


async def _abort(context: Context, method: str, error: Exception) -> NoReturn:
    if isinstance(error, FederationError):
        trailing = [("minga-code", error.code)]
        trailing += [(f"minga-{k.replace('_', '-')}", v) for k, v in error_details(error).items()]
        logger.info("%s: %s [%s]", method, error, error.code)
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

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give back the handler with its errors translated."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                _single(handler.unary_unary, method), **codec
            )
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                _single(handler.stream_unary, method), **codec
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, method), **codec
            )
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                _stream(handler.stream_stream, method), **codec
            )
        return handler


def _single(
    behaviour: Callable[[Any, Context], Awaitable[Any]], method: str
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        METHOD.set(method)
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - this is where every error ends
            await _abort(context, method, error)

    return call


def _stream(
    behaviour: Callable[[Any, Context], AsyncIterator[Any]], method: str
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        METHOD.set(method)
        try:
            async for answer in behaviour(request, context):
                yield answer
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - this is where every error ends
            await _abort(context, method, error)

    return call
