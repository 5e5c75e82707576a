"""The client of OpenAI-style HTTP: sends a request and notes when every piece of its answer came.

It shares the machine with what it measures, so it is thin: one asyncio protocol over httptools, whose connections are
used again, and which only stamps what arrives; the events are read as JSON when the answer has ended (`sse`).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

from ..tls import ClientTLS
from ..workload.datasets import BenchRequest
from ..workload.report import RequestRecord
from .sse import read_events, split_events

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_CLOSE_S = 1.0
MAX_IDLE = 1024
"""Connections kept for later requests."""

Send = Callable[[BenchRequest, float, str], Awaitable[RequestRecord]]
"""Sends one request now, that was due at a time, under an id; returns when its answer has ended, whatever it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to send. `endpoint` ends in /completions or /chat/completions; token ids only go to the former."""

    base_url: str
    model: str
    endpoint: str = COMPLETIONS
    api_key: str | None = None
    tls: ClientTLS = field(default_factory=ClientTLS)
    temperature: float | None = None
    """None: the server's default."""
    timeout_s: float = 600.0
    secure: ssl.SSLContext | None = field(default=None, init=False, compare=False)
    """Read from `tls` once, not for each of thousands of requests."""
    headers: tuple[tuple[str, str], ...] = ()
    """More of them, for every request."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the body; they win."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url: {self.base_url!r} is not allowed; allowed: http://host:port")
        if not (self.endpoint.startswith("/") and self.endpoint.endswith("/completions") and self.endpoint.isascii()):
            raise ValueError(f"endpoint: {self.endpoint!r} is not allowed; allowed: {COMPLETIONS}, {CHAT}")
        object.__setattr__(self, "secure", self.tls.context_for(self.base_url))
        for name, value in self.headers:
            if not (name and (name + value).isascii() and (name + value).isprintable() and not set(name) & set(": ")):
                raise ValueError(f"header: {name!r}: {value!r} cannot be sent; allowed: a token, and printable ASCII")

    @property
    def is_chat(self) -> bool:
        """Whether prompts are messages."""
        return self.endpoint.endswith("/chat/completions")


class StreamFailed(Exception):
    """The request did not come to its proper end."""


class _Connection(asyncio.Protocol):
    """One connection: a request at a time, and the pieces of its answer's body with the time at which they came."""

    def __init__(self, open_ones: set[_Connection]) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.status = 0
        self.reusable = False
        self.closed = asyncio.Event()
        self._open_ones = open_ones
        self._done: asyncio.Future[None] | None = None
        self._now_s = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None

    async def ask(self, request: bytes) -> None:
        """Sends a request and waits for the end of its answer. Raises StreamFailed."""
        assert self._transport is not None
        self.pieces, self.status, self.reusable = [], 0, False
        if self._transport.is_closing():
            raise StreamFailed("the connection ended early")
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._done = None

    def close(self) -> None:
        """Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass
        self._open_ones.add(self)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(StreamFailed(f"the answer is not HTTP ({error})"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self.closed.set()
        self._open_ones.discard(self)
        self._end(StreamFailed(f"the connection ended early ({error})" if error else "the connection ended early"))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Called by the parser with every piece of the body."""
        self.pieces.append((self._now_s, body))

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.reusable = self._parser.should_keep_alive()
        self._end(None)

    def _end(self, error: StreamFailed | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class HttpSender:
    """Sends requests to one target. `send` is a `Send`; close it at the end."""

    def __init__(self, target: Target) -> None:
        self._target = target
        parts = urlsplit(target.base_url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if target.secure else 80)
        head = [
            f"POST {parts.path.rstrip('/')}{target.endpoint} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
        ]
        if target.api_key:
            head.append(f"Authorization: Bearer {target.api_key}")
        head += [f"{name}: {value}" for name, value in target.headers]
        self._head = "\r\n".join([*head, ""]).encode()
        self._fixed: dict[str, Any] = {
            "model": target.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.temperature is not None:
            self._fixed["temperature"] = target.temperature
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def send(self, request: BenchRequest, due_s: float, request_id: str = "") -> RequestRecord:
        """Sends one request now and follows its answer to the end; what the server does wrong is in `error`.

        Raises ValueError where the endpoint cannot take such a prompt.
        """
        wire = self._wire(request, request_id)
        sent_s = time.monotonic()
        error = ""
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._target.timeout_s):
                connection = self._reuse()
                if connection is not None:
                    try:
                        await connection.ask(wire)
                    except StreamFailed:
                        if connection.status:
                            raise
                        connection = None  # it was closed while it lay idle
                if connection is None:
                    connection = await self._connect()
                    await connection.ask(wire)
        except TimeoutError:
            error = f"no end within {self._target.timeout_s:g} s"
        except (OSError, StreamFailed) as failure:
            error = str(failure) or type(failure).__name__
        if connection is not None:
            if connection.reusable and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
        ended_s = time.monotonic()
        return read_events(
            connection.status if connection else 0,
            split_events(connection.pieces) if connection else (),
            error,
            due_s=due_s,
            sent_s=sent_s,
            prompt_tokens=0 if isinstance(request.prompt, str) else len(request.prompt),
            ended_s=ended_s,
        )

    async def close(self) -> None:
        """Closes all connections, and waits a little for the other side to agree."""
        closing = list(self._open)
        for connection in closing:
            connection.close()
        if closing:
            waits = [asyncio.ensure_future(connection.closed.wait()) for connection in closing]
            _, late = await asyncio.wait(waits, timeout=_CLOSE_S)
            for wait in late:
                wait.cancel()

    def _reuse(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            partial(_Connection, self._open), self._host, self._port, ssl=self._target.secure
        )
        return connection

    def _wire(self, request: BenchRequest, request_id: str) -> bytes:
        """The HTTP request as bytes."""
        body = self._fixed | {"max_tokens": request.max_tokens}
        if self._target.is_chat:
            if not isinstance(request.prompt, str):
                raise ValueError(f"endpoint: {self._target.endpoint} takes text, not token ids; use {COMPLETIONS}")
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if request.ignore_eos:
            body["ignore_eos"] = True
        data = orjson.dumps(body | dict(self._target.extra_body))
        named = b"X-Request-Id: %b\r\n" % request_id.encode() if request_id else b""
        return b"%b%bContent-Length: %d\r\n\r\n%b" % (self._head, named, len(data), data)


async def send(target: Target, request: BenchRequest, due_s: float) -> RequestRecord:
    """Sends one request on a connection of its own; see `HttpSender.send`."""
    sender = HttpSender(target)
    try:
        return await sender.send(request, due_s)
    finally:
        await sender.close()
