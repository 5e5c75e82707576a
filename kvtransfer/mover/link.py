"""Calls between two processes over one socket pair, both ways at once: `u32 length | msgpack [kind, call, …]`.

A call names a method and is answered by items, at most `WINDOW` of them ahead of its caller, then by its end or by a
refusal. A caller that leaves early cancels; the end that comes then says that the handler has ended, so that whatever
it wrote to is the caller's again. Bounded: calls of each direction, items on their way, the length of a message.

The socket's end is the other process's end: every call under way is refused PEER_LOST. One event loop an end.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
import struct
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, cast

import msgpack

from ..ticket import HandoffRefused, RefusalReason
from ..uncancelled import to_its_end

log = logging.getLogger(__name__)

Handler = Callable[[bytes], AsyncGenerator[bytes, None]]
MAX_CALLS = 8192
"""Under way in one direction."""
MAX_MESSAGE_BYTES = 2**22
MAX_UNSENT_BYTES = 2**24
"""Written and not taken by the other end's process (it stands still, perhaps): no more calls begin, and no more items
are made, beyond it.
"""
WINDOW = 2
"""Items of a call that its caller has not taken."""
CANCEL_S = 5.0
"""How long a call that was cancelled may take to end."""
_LENGTH = struct.Struct("<I")
_TEXT = 2048


class _Kind(enum.IntEnum):
    CALL, NEXT, ITEM, DONE, REFUSED, CANCEL = range(6)


class _Call:
    """A call of this end, and its items that wait to be taken."""

    def __init__(self) -> None:
        self.items: deque[bytes] = deque()
        self.news = asyncio.Event()
        self.over: asyncio.Future[HandoffRefused | None] = asyncio.get_running_loop().create_future()
        """The other end has ended the call, and why where it refused it."""

    def end(self, refusal: HandoffRefused | None) -> None:
        if not self.over.done():
            self.over.set_result(refusal)
        self.news.set()


class _Served:
    """A call of the other end."""

    def __init__(self) -> None:
        self.room = asyncio.Semaphore(WINDOW)
        self.task: asyncio.Task[None] | None = None


class Link(asyncio.Protocol):
    """One end. `join` it to its socket on the loop that it shall live on."""

    def __init__(
        self,
        name: str,
        handlers: Mapping[str, Handler],
        *,
        on_lost: Callable[[], None],
        on_stuck: Callable[[], None] | None = None,
        cancel_s: float = CANCEL_S,
    ) -> None:
        """`name`: of the other end, in refusals. `on_lost`: once, when the socket has ended, whoever closed it.
        `on_stuck`: a call that was cancelled did not end within `cancel_s`; whatever it does must end the socket. None:
        callers do not wait for the end of what they cancel.
        """
        self._name = name
        self._handlers = handlers
        self._on_lost = on_lost
        self._on_stuck = on_stuck
        self._cancel_s = cancel_s
        self._calls: dict[int, _Call] = {}
        self._served: dict[int, _Served] = {}
        self._last = 0
        self._bytes = bytearray()
        self._transport: asyncio.Transport | None = None
        self._heard_s = 0.0
        self._taken = asyncio.Event()
        """The other end takes what is written to it."""
        self._taken.set()

    async def join(self, end: socket.socket) -> None:
        """Takes over one end of a socket pair."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    def close(self) -> None:
        """Ends the socket; calls under way are refused. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def silence_s(self) -> float:
        """Seconds since the other end last said anything."""
        return asyncio.get_running_loop().time() - self._heard_s

    def give_up(self) -> None:
        """Refuses every call under way PEER_LOST: the other end does not answer. It is told, for when it wakes up."""
        for number, call in list(self._calls.items()):
            if not call.over.done():
                self._send(_Kind.CANCEL, number)
                call.end(HandoffRefused(RefusalReason.PEER_LOST, f"{self._name} does not answer"))

    async def ask(self, method: str, body: bytes, *, timeout_s: float) -> bytes:
        """A call with one item for an answer, with which its handler ends. `HandoffRefused`: the other end's reason,
        DEADLINE, PEER_LOST, LIMIT.
        """
        number, call = self._call(method, body)
        try:
            await asyncio.wait({call.over}, timeout=timeout_s)
            if call.items:
                return call.items.popleft()
            if not call.over.done():
                raise HandoffRefused(RefusalReason.DEADLINE, f"{self._name}: no answer to {method}")
            if (refusal := call.over.result()) is not None:
                raise refusal
            raise HandoffRefused(RefusalReason.PEER_LOST, f"{self._name} did not answer {method}")
        finally:
            await self._leave(number, call)

    async def stream(self, method: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The items of a call. Close it: with `on_stuck`, that returns when the handler at the other end has ended."""
        number, call = self._call(method, body)
        try:
            while True:
                while call.items:
                    yield call.items.popleft()
                    if not call.over.done():
                        self._send(_Kind.NEXT, number)
                if call.over.done():
                    if (refusal := call.over.result()) is not None:
                        raise refusal
                    return
                await call.news.wait()
                call.news.clear()
        finally:
            await self._leave(number, call)

    def _call(self, method: str, body: bytes) -> tuple[int, _Call]:
        """Begins a call; `_leave` follows."""
        if self._transport is None or self._transport.is_closing():
            raise self._lost()
        if len(self._calls) >= MAX_CALLS:
            raise HandoffRefused(RefusalReason.LIMIT, f"{MAX_CALLS} calls to {self._name} are under way")
        if not self._taken.is_set():
            text = f"{self._name} has yet to take {self._transport.get_write_buffer_size()} bytes"
            raise HandoffRefused(RefusalReason.LIMIT, text)
        self._last += 1
        number, call = self._last, _Call()
        self._calls[number] = call
        self._send(_Kind.CALL, number, method, body)
        return number, call

    async def _leave(self, number: int, call: _Call) -> None:
        try:
            if not call.over.done():
                await self._cancel(number, call)
        finally:
            self._calls.pop(number, None)

    async def _cancel(self, number: int, call: _Call) -> None:
        """Cancels a call and waits until the other end has ended it, whatever is cancelled here meanwhile."""
        self._send(_Kind.CANCEL, number)
        if self._on_stuck is None:
            return
        stuck = asyncio.get_running_loop().call_later(self._cancel_s, self._on_stuck)
        try:
            await to_its_end(call.over)
        finally:
            stuck.cancel()

    # The socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop, once."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        self._heard_s = asyncio.get_running_loop().time()
        self._transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)

    def pause_writing(self) -> None:
        """Called by the loop: MAX_UNSENT_BYTES wait to be taken."""
        self._taken.clear()

    def resume_writing(self) -> None:
        """Called by the loop: most of them were."""
        self._taken.set()

    def data_received(self, data: bytes) -> None:
        """Called by the loop; whole messages are taken at once."""
        self._bytes += data
        self._heard_s = asyncio.get_running_loop().time()
        begin = 0
        try:
            while len(self._bytes) >= begin + _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._bytes, begin)
                if length > MAX_MESSAGE_BYTES:
                    raise ValueError(f"a message of {length} bytes")
                end = begin + _LENGTH.size + length
                if len(self._bytes) < end:
                    break
                self._take(msgpack.unpackb(bytes(self._bytes[begin + _LENGTH.size : end])))
                begin = end
        except (ValueError, TypeError, msgpack.UnpackException):
            log.exception("%s does not keep to the protocol", self._name)
            self.close()
            return
        del self._bytes[:begin]

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop, once: refuses every call of this end and ends every call of the other."""
        self._taken.set()
        for call in list(self._calls.values()):
            call.end(self._lost())
        for served in list(self._served.values()):
            if served.task is not None:
                served.task.cancel()
        self._on_lost()

    def _take(self, message: list[Any]) -> None:
        kind, number, *rest = message
        if kind == _Kind.CALL:
            self._begin(number, *rest)
        elif kind in (_Kind.NEXT, _Kind.CANCEL):
            served = self._served.get(number)
            if served is None or served.task is None:
                return
            if kind == _Kind.NEXT:
                served.room.release()
            else:
                served.task.cancel()
        elif (call := self._calls.get(number)) is not None:
            if kind == _Kind.ITEM:
                (item,) = rest
                call.items.append(item)
                call.news.set()
            elif kind == _Kind.REFUSED:
                reason, text = rest
                call.end(HandoffRefused(RefusalReason(reason), text))
            else:
                call.end(None)

    def _begin(self, number: int, method: str, body: bytes) -> None:
        """Serves a call of the other end."""
        handler = self._handlers.get(method)
        if handler is None:
            self._send(_Kind.REFUSED, number, RefusalReason.INVALID.value, f"no method {method}")
        elif len(self._served) >= MAX_CALLS:
            self._send(_Kind.REFUSED, number, RefusalReason.LIMIT.value, f"{MAX_CALLS} calls are under way")
        else:
            served = self._served[number] = _Served()
            served.task = asyncio.create_task(self._serve(number, served, handler(body)), name=f"{method} {number}")
            served.task.add_done_callback(lambda task: self._ended(number, task))

    async def _serve(self, number: int, served: _Served, items: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(items):
            await served.room.acquire()
            async for item in items:
                await self._taken.wait()
                self._send(_Kind.ITEM, number, item)
                await served.room.acquire()

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        """The handler is over, its generator included: what is said now is said after its last effect."""
        del self._served[number]
        error = None if task.cancelled() else task.exception()
        if error is None:
            self._send(_Kind.DONE, number)
            return
        if isinstance(error, HandoffRefused):
            reason, text = error.reason, error.message
        else:
            log.error("a call of %s failed", self._name, exc_info=error)
            reason, text = RefusalReason.INVALID, f"{type(error).__name__}: {error}"
        self._send(_Kind.REFUSED, number, reason.value, text[:_TEXT])

    def _send(self, *message: object) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        packed = msgpack.packb(message)
        self._transport.write(_LENGTH.pack(len(packed)) + packed)

    def _lost(self) -> HandoffRefused:
        return HandoffRefused(RefusalReason.PEER_LOST, f"{self._name} has ended")
