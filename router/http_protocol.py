"""One HTTP connection with bounds on everything a client may take or keep: uvicorn's protocol over httptools leaves out
the size of a head, the time it takes, the number of connections, and clients that do not read.

A connection owes a request from its first moment and again after every answer; what is late is closed by `sweep`, which
the server calls several times a second over all connections, so that none has timers of its own. What is no HTTP is
answered in OpenAI's error shape.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .errors import InvalidRequest, ServiceError, Unavailable
from .http_exchange import GONE, Gone, error_headers, error_json

_log = logging.getLogger(__name__)

MAX_PIPELINED = 16
"""Requests that a client may send ahead of its answers."""
MAX_AHEAD_BYTES = 32 * 1024
"""Of the body of such a request: below where uvicorn stops reading, and with it seeing that the client went."""
FD_SHARE = 0.75
"""Of the process's file descriptors, how many may be HTTP connections: accepting must not fail for want of one."""

_BODY_HEADERS = (b"content-length", b"transfer-encoding")


class HeadTooLarge(ServiceError):
    """Request line and headers (or trailers) over `HttpLimits`."""

    http_status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class HeadTimeout(ServiceError):
    """The head did not arrive within `HttpLimits.head_timeout_s`."""

    http_status = 408
    type = "timeout"
    code = "headers_timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one router grants its HTTP clients."""

    connections: int = 4096
    """Open at once; the next one is told 503. Never more than FD_SHARE of the process's file descriptors."""
    head_bytes: int = 64 * 1024
    """Request line and headers."""
    headers: int = 128
    head_timeout_s: float = 15.0
    """From the connection's beginning, or the end of the last answer, to the end of the next request's head."""
    idle_timeout_s: float = 10.0
    """A connection without a request, before its next one begins."""
    write_stall_s: float = 60.0
    """How long a client may take nothing of what is written to it; a stream's request is canceled then."""
    linger_s: float = 5.0
    """How long a closed connection may still take what was written."""


def connection_limit(limits: HttpLimits) -> int:
    """Connections to grant in this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limits.connections if soft == resource.RLIM_INFINITY else min(limits.connections, int(soft * FD_SHARE))


class BoundedProtocol(HttpToolsProtocol):
    """What uvicorn makes of each connection."""

    def __init__(self, limits: HttpLimits, max_connections: int, **of_server: Any) -> None:
        super().__init__(**of_server)
        self._limits = limits
        self._max_connections = max_connections
        self._owed_since_s: float | None = None
        """Since when the client owes the head of a request; None while one is being answered."""
        self._stalled_since_s: float | None = None
        self._closing_since_s: float | None = None
        self._head_bytes = 0
        """Received since the last byte that was of use: heads, trailers and chunk headers must come to an end."""
        self._refusal: ServiceError | None = None
        self._answering: RequestResponseCycle | None = None

    # -- bounds that are looked at when something happens -----------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admits the connection or ends it."""
        if len(self.connections) >= self._max_connections:
            self.transport, self.flow = transport, FlowControl(transport)
            self._refuse(Unavailable("the router has too many open connections", retry_after_s=1.0))
            return
        super().connection_made(transport)
        self._owed_since_s = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Parses; a client that sends no HTTP, or too much of a head, is told and cut off."""
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # answered as plain HTTP/1.1; what follows is not parsed
        except httptools.HttpParserError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._refuse(self._refusal or InvalidRequest(f"not a valid HTTP request: {reason}"))
            return
        if self._head_bytes > self._limits.head_bytes:
            self._refuse(self._too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bounded in number; trailers count too."""
        if len(self.headers) >= self._limits.headers:
            self._refusal = HeadTooLarge(f"more than {self._limits.headers} headers; allowed: {self._limits.headers}")
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begins a request whose head is within bounds."""
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.head_bytes:
            self._refusal = self._too_large()
            raise ValueError("head too large")
        if not self.url.isascii():
            self._refusal = InvalidRequest("the request's target is not ASCII; allowed: percent-encoded UTF-8")
            raise ValueError("target not ASCII")
        if self.parser.should_upgrade() and any(name in _BODY_HEADERS for name, _ in self.headers):
            self._refusal = InvalidRequest(
                "upgrade: a request with a body cannot change the protocol; allowed: HTTP/1.1 without an Upgrade header"
            )
            raise ValueError("upgrade with a body")
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = InvalidRequest(f"more than {MAX_PIPELINED} requests were sent ahead of their answers")
            raise ValueError("too many requests ahead")
        self._owed_since_s = None
        super().on_headers_complete()
        self.flow.resume_reading()  # also behind a request sent ahead: else nobody would see the client go

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cast("dict[str, Any]", cycle.scope)[GONE] = Gone()
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the request being answered; uvicorn tells only the one that came last."""
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
            cast("dict[str, Any]", self._answering.scope)[GONE].leave()
        super().connection_lost(exc)

    def on_body(self, body: bytes) -> None:
        """A part of the body: of use."""
        self._head_bytes = 0
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > MAX_AHEAD_BYTES:
            self._refusal = InvalidRequest(f"more than {MAX_AHEAD_BYTES} bytes of a body were sent ahead of answers")
            raise ValueError("too much sent ahead")

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The client owes the next request, unless it has sent it already."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._owed_since_s = time.monotonic()

    def pause_writing(self) -> None:
        """The client does not take what is written."""
        self._stalled_since_s = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self._stalled_since_s = None
        super().resume_writing()

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(f"request line and headers are over {self._limits.head_bytes} bytes")

    def _refuse(self, error: ServiceError) -> None:
        """Answers and closes; in the middle of an answer it can only cut off."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = json.dumps(error_json(error)).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error_headers(error),
        }
        head = f"HTTP/1.1 {error.http_status} {http.HTTPStatus(error.http_status).phrase}\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"{head}{lines}\r\n".encode() + body)
        self.transport.close()

    # -- bounds in time ---------------------------------------------------------------------------------------------

    def sweep(self, now_s: float) -> None:
        """Ends the connection where it is late with anything."""
        limits = self._limits
        if self.transport.is_closing():
            self._closing_since_s = self._closing_since_s or now_s
            if now_s - self._closing_since_s > limits.linger_s:
                self.transport.abort()
        elif self._stalled_since_s is not None and now_s - self._stalled_since_s > limits.write_stall_s:
            _log.debug("a client took nothing for %g s", limits.write_stall_s)
            self.transport.abort()
        elif self._owed_since_s is not None and now_s - self._owed_since_s > limits.head_timeout_s:
            if self._head_bytes:
                self._refuse(HeadTimeout(f"no complete request head came within {limits.head_timeout_s:g} s"))
            else:
                self.transport.close()


def sweep(connections: Iterable[Any], now_s: float) -> None:
    """Looks at every connection of a server."""
    for connection in list(connections):
        if isinstance(connection, BoundedProtocol):
            connection.sweep(now_s)
