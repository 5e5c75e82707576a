"""One HTTP/1.1 connection on httptools, with bounds on everything that a client may take or keep: the size of a head,
the time it takes, bodies, requests sent ahead, clients that do not read.

A connection owes a request from its first moment and again after every answer; what is late is closed by `sweep`, which
the server calls several times a second over all connections, so that none has timers of its own. What is no HTTP is
answered in OpenAI's error shape. Requests are answered one after the other, each by a task of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import unquote

import httptools

from .errors import InvalidRequest, ServiceError, Unavailable
from .http_errors import error_headers, error_json
from .http_message import Message, head_bytes

_log = logging.getLogger(__name__)

MAX_PIPELINED = 16
"""Requests that a client may send ahead of its answers."""
MAX_AHEAD_BYTES = 32 * 1024
"""Of the body of such a request: below where a connection is no longer read, and nobody would see its client go."""

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
    handshakes: int = 1024
    """TLS handshakes under way at once; the oldest gives way to the next one. Never more than HANDSHAKE_FD_SHARE of the
    process's file descriptors."""
    handshake_timeout_s: float = 10.0
    """From the connection's beginning to the end of its TLS handshake."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The server, as a connection needs it."""

    limits: HttpLimits
    admit: Callable[[HttpConnection], bool]
    """A connection began; False: there are too many."""
    leave: Callable[[HttpConnection], None]
    """It ended."""
    handle: Callable[[Message], None]
    """Begins to answer, in a task."""
    date: Callable[[], bytes]


class HttpConnection(asyncio.Protocol):
    """What the server makes of each connection. Also the `Wire` of its messages."""

    def __init__(self, host: Host) -> None:
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # until connection_made
        self.date = host.date
        self._host = host
        self._limits = host.limits
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._arriving: Message | None = None
        """The request that came last."""
        self._answering: Message | None = None
        self._ahead: deque[Message] = deque()
        """Requests that came before the answers to those before them; bounded by MAX_PIPELINED."""
        self._owed_since_s: float | None = None
        """Since when the client owes the head of a request; None while one is being answered."""
        self._idle_since_s: float | None = None
        """Since when it has sent nothing behind its last answer."""
        self._stalled_since_s: float | None = None
        self._closing_since_s: float | None = None
        self._head_bytes = 0
        """Received since the last byte that was of use: heads, trailers and chunk headers must come to an end."""
        self._refusal: ServiceError | None = None
        self._waiting: list[asyncio.Future[None]] = []
        """Those that wait for the client to take what was sent: of one answer, or of the one before it as well."""
        self._held = False

    # -- the transport's calls --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admits the connection or ends it."""
        self.transport = cast("asyncio.Transport", transport)
        if not self._host.admit(self):
            self._refuse(Unavailable("the router has too many open connections", retry_after_s=1.0))
            return
        self._owed_since_s = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the request being answered."""
        self._host.leave(self)
        self.resume_writing()
        self._let_go()

    def data_received(self, data: bytes) -> None:
        """Parses; a client that sends no HTTP, or too much of a head, is told and cut off."""
        self._idle_since_s = None
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._arriving is not None:
                self._arriving.keep_alive = False  # answered as plain HTTP/1.1; what follows is not parsed
        except httptools.HttpParserError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._refuse(self._refusal or InvalidRequest(f"not a valid HTTP request: {reason}"))
            return
        if self._head_bytes > self._limits.head_bytes:
            self._refuse(self._too_large())

    def pause_writing(self) -> None:
        """The client does not take what is written."""
        self._stalled_since_s = time.monotonic()
        if self._answering is not None:
            self._answering.taking = False

    def resume_writing(self) -> None:
        """It does again."""
        self._stalled_since_s = None
        if self._answering is not None:
            self._answering.taking = True
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    # -- the parser's calls; what they raise ends in `data_received` ------------------------------------------------

    def on_message_begin(self) -> None:
        """A request."""
        self._url, self._headers = b"", []

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bounded in number; trailers count too."""
        if len(self._headers) >= self._limits.headers:
            raise self._no(HeadTooLarge(f"more than {self._limits.headers} headers; allowed: {self._limits.headers}"))
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Begins a request whose head is within bounds."""
        if len(self._url) + sum(len(name) + len(value) for name, value in self._headers) > self._limits.head_bytes:
            raise self._no(self._too_large())
        if not self._url.isascii():
            raise self._no(InvalidRequest("the request's target is not ASCII; allowed: percent-encoded UTF-8"))
        headers = dict(self._headers)
        if self._parser.should_upgrade() and any(name in headers for name in _BODY_HEADERS):
            text = "a request with a body cannot change the protocol; allowed: HTTP/1.1 without an Upgrade header"
            raise self._no(InvalidRequest(f"upgrade: {text}"))
        if len(self._ahead) >= MAX_PIPELINED:
            raise self._no(InvalidRequest(f"more than {MAX_PIPELINED} requests were sent ahead of their answers"))
        self._owed_since_s = None
        version = self._parser.get_http_version()
        message = self._arriving = Message(
            self,
            self._parser.get_method().decode("ascii"),
            unquote(httptools.parse_url(self._url).path.decode("ascii")),
            headers,
            version=version,
            keep_alive=version != "1.0" and self._parser.should_keep_alive(),
        )
        if self._answering is None:
            self._answer(message)
        else:
            self._ahead.append(message)

    def on_body(self, body: bytes) -> None:
        """A part of the body: of use."""
        self._head_bytes = 0
        assert self._arriving is not None
        self._arriving.arrived(body)
        if self._ahead and sum(message.unread_bytes for message in self._ahead) > MAX_AHEAD_BYTES:
            text = f"more than {MAX_AHEAD_BYTES} bytes of bodies were sent ahead of answers"
            raise self._no(InvalidRequest(text))

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._head_bytes = 0
        assert self._arriving is not None
        self._arriving.arrived_whole()

    def _no(self, refusal: ServiceError) -> ValueError:
        """What a parser's call raises to end the connection with this answer."""
        self._refusal = refusal
        return ValueError(refusal.message)

    # -- the messages' calls ----------------------------------------------------------------------------------------

    async def drain(self) -> None:
        while self._stalled_since_s is not None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    def hold_reading(self) -> None:
        if not self._held:
            self._held = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._held:
            self._held = False
            self.transport.resume_reading()

    def answered(self) -> None:
        """The client owes the next request, unless it has sent it already."""
        message, self._answering = self._answering, None
        if message is None or self.transport.is_closing():
            return
        if not message.keep_alive:
            self.transport.close()
            return
        self.resume_reading()
        if self._ahead:
            self._answer(self._ahead.popleft())
        else:
            self._owed_since_s = self._idle_since_s = time.monotonic()

    def _answer(self, message: Message) -> None:
        self._answering = message
        message.taking = self._stalled_since_s is None
        self._host.handle(message)

    # -- endings ----------------------------------------------------------------------------------------------------

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(f"request line and headers are over {self._limits.head_bytes} bytes")

    def _refuse(self, error: ServiceError) -> None:
        """Answers and closes; in the middle of an answer it can only cut off."""
        if self.transport.is_closing():
            return
        if self._answering is not None and self._answering.started:
            self.transport.abort()
            return
        body = json.dumps(error_json(error)).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error_headers(error),
        }
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.transport.write(head_bytes(error.http_status, pairs, self.date()) + body)
        self.transport.close()
        self._let_go()

    def _let_go(self) -> None:
        """Nobody reads another answer."""
        self._ahead.clear()
        message, self._answering = self._answering, None
        if message is not None:
            message.lost()

    def finish(self) -> None:
        """The server stops: nothing more is answered here than what is being answered."""
        self._ahead.clear()
        if self._answering is None:
            self.transport.close()
        else:
            self._answering.keep_alive = False

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
        elif self._idle_since_s is not None and now_s - self._idle_since_s > limits.idle_timeout_s:
            self.transport.close()
        elif self._owed_since_s is not None and now_s - self._owed_since_s > limits.head_timeout_s:
            if self._head_bytes:
                self._refuse(HeadTimeout(f"no complete request head came within {limits.head_timeout_s:g} s"))
            else:
                self.transport.close()
