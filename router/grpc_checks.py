"""Requests that are no protobuf at the gRPC door: refused as INVALID_ARGUMENT, as every other bad input is; gRPC itself
would call them the server's INTERNAL error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request that did not parse."""

    reason: str


class RefuseMalformed(aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Wraps the handlers of Tandem's own services, all of which take one message."""

    def __init__(self, names: dict[str, str]) -> None:
        """`names`: method to the message that it takes, for the error."""
        self._names = names
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Called for every call."""
        method = details.method
        if method not in self._names:
            return await continuation(details)
        if method not in self._wrapped:
            self._wrapped[method] = _checked(await continuation(details), self._names[method])
        return self._wrapped[method]


def _checked(handler: Any, name: str) -> grpc.RpcMethodHandler:
    parse = handler.request_deserializer
    behave = handler.unary_stream or handler.unary_unary

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except (DecodeError, ValueError) as error:
            return _Malformed(f"not a {name}: {error}")

    async def checked(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason)
        return await behave(request, context)

    make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
    return make(checked, request_deserializer=parsed, response_serializer=handler.response_serializer)
