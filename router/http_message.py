"""One HTTP request on its connection, as far as it has arrived, and its answer, written straight to the transport.

What is written leaves at once, a head together with the first part of its body. Whoever writes much waits in `drain`
for a client that takes it slowly.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable, Iterable
from typing import Protocol

READ_AHEAD_BYTES = 64 * 1024
"""Of a body that nobody has read yet; then the connection is not read either."""
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"

Headers = Iterable[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


class Wire(Protocol):
    """The connection, as a message needs it."""

    transport: asyncio.Transport
    date: Callable[[], bytes]
    """The header line of an answer that begins now."""

    async def drain(self) -> None:
        """Waits until the client takes what is written, or is gone."""

    def hold_reading(self) -> None:
        """The body is to wait."""

    def resume_reading(self) -> None:
        """It need not."""

    def answered(self) -> None:
        """The answer is complete."""


def head_bytes(status: int, headers: Headers, date: bytes) -> bytes:
    """Status line and headers of an answer."""
    return b"".join((_STATUS_LINES[status], date, *[b"%b: %b\r\n" % pair for pair in headers], b"\r\n"))


class Message:
    """The connection feeds it (`arrived`, `lost`); one task reads it and answers."""

    __slots__ = (
        *("_body", "_bodiless", "_can_chunk", "_chunked", "_head", "_news", "_wants_continue", "_whole", "_wire"),
        *("complete", "gone", "headers", "keep_alive", "method", "path", "started", "taking", "tell"),
    )

    def __init__(
        self, wire: Wire, method: str, path: str, headers: dict[bytes, bytes], *, version: str, keep_alive: bool
    ) -> None:
        self.method = method
        self.path = path
        """Percent-decoded, without the query."""
        self.headers = headers
        """By name in lower case; of one that came twice the last."""
        self.keep_alive = keep_alive
        """Whether the connection serves another request after this one."""
        self.started = False
        self.complete = False
        self.taking = True
        """Whether the client is there and takes what is written."""
        self.gone = False
        """The client has left."""
        self.tell: Callable[[], object] | None = None
        """Called when it leaves."""
        self._wire = wire
        self._body = bytearray()
        self._whole = False
        self._news: asyncio.Future[None] | None = None
        self._wants_continue = headers.get(b"expect", b"").lower() == b"100-continue"
        self._can_chunk = version != "1.0"
        self._chunked = False
        self._bodiless = method == "HEAD"
        self._head = b""

    # -- what the connection does -----------------------------------------------------------------------------------

    @property
    def unread_bytes(self) -> int:
        """Of the body that has arrived."""
        return len(self._body)

    def arrived(self, part: bytes) -> None:
        """A part of the body."""
        if self.complete:
            return
        self._body += part
        if len(self._body) > READ_AHEAD_BYTES:
            self._wire.hold_reading()
        self._wake()

    def arrived_whole(self) -> None:
        """The body has ended."""
        self._whole = True
        self._wake()

    def lost(self) -> None:
        """The connection is. Once."""
        self.gone, self.taking = True, False
        self._wake()
        if self.tell is not None:
            self.tell()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # -- what the request's task does -------------------------------------------------------------------------------

    @property
    def readable(self) -> bool:
        """Whether `read` would not wait."""
        return bool(self._body) or self._whole or self.gone

    async def read(self) -> tuple[bytes, bool]:
        """The body's next part, and whether it was the last. Waits for one. ClientGone."""
        while not self.readable:
            if self._wants_continue:
                self._wants_continue = False
                self._wire.transport.write(_CONTINUE)
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if self.gone:
            raise ClientGone
        part = bytes(self._body)
        self._body.clear()
        self._wire.resume_reading()
        return part, self._whole

    async def drain(self) -> None:
        """Waits until the client takes what is written, or is gone."""
        await self._wire.drain()

    def start(self, status: int, headers: Headers, length_bytes: int | None) -> None:
        """Begins the answer; None: its length is not known. It leaves with the first part of the body."""
        self.started = True
        framing = []
        if length_bytes is not None:
            framing.append((b"content-length", b"%d" % length_bytes))
        elif self._can_chunk:
            self._chunked = True
            framing.append((b"transfer-encoding", b"chunked"))
        else:
            self.keep_alive = False  # its end is the connection's
        if not self.keep_alive:
            framing.append((b"connection", b"close"))
        self._head = head_bytes(status, (*headers, *framing), self._wire.date())

    def write(self, data: bytes) -> None:
        """A part of the body. Never blocks."""
        if data and not (self.gone or self._bodiless):
            self._wire.transport.write(self._framed(data))

    def end(self, data: bytes = b"") -> None:
        """The last part of it. Once."""
        assert self.started
        assert not self.complete
        self.complete = True
        self._body.clear()
        if not self.gone:
            last = self._framed(b"" if self._bodiless else data)
            self._wire.transport.write(last + _LAST_CHUNK if self._chunked and not self._bodiless else last)
        self._wire.answered()

    def abandon(self) -> None:
        """Its task is over: an answer that is not complete by now never will be."""
        if not (self.complete or self.gone):
            self._wire.transport.abort()

    def _framed(self, data: bytes) -> bytes:
        """With what belongs before and behind it on the wire."""
        head, self._head = self._head, b""
        if self._chunked and data:
            return b"%b%x\r\n%b\r\n" % (head, len(data), data)
        return head + data
