"""TLS handshakes at the HTTP door: counted from the moment that a connection is accepted, bounded in number and time.

accept -> handshake, in a task -> a connection, which the server then counts as its own. asyncio's own servers tell
nobody of a connection before its handshake is done, so that half-done ones would be bounded by nothing.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

GRACE_S = 1.0
"""A handshake is left in peace so long, however many come behind it."""
ACCEPTS = 64
"""Connections accepted in one turn of the loop."""
ACCEPT_AGAIN_S = 1.0
"""After one could not be accepted: there are no file descriptors, or no memory."""


class _Handshake:
    """One that is under way."""

    __slots__ = ("came_s", "client", "task")

    def __init__(self, client: socket.socket) -> None:
        self.came_s = time.monotonic()
        self.client: socket.socket | None = client
        """None once a transport has it, which closes it."""
        self.task: asyncio.Task[None] | None = None


class TlsDoor:
    """What a server makes of connections that have yet to show that they speak TLS. Used from one event loop."""

    def __init__(
        self, context: ssl.SSLContext, connection: Callable[[], asyncio.Protocol], *, most: int, timeout_s: float
    ) -> None:
        """`connection`: made of each handshake that is done. `most`: handshakes under way; where there are so many, the
        oldest gives way to the next connection once it has had GRACE_S, and before that the next one is closed.
        """
        self._context = context
        self._connection = connection
        self._most = most
        self._timeout_s = timeout_s
        self._under_way: dict[_Handshake, None] = {}
        """In the order in which they came."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._again: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Handshakes under way."""
        return len(self._under_way)

    def open(self, listener: socket.socket) -> None:
        """Accepts on `listener`, which must not block, and which `close` closes."""
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    async def close(self) -> None:
        """Accepts no more, and ends every handshake; idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()
        if self._again is not None:
            self._again.cancel()
        for handshake in list(self._under_way):
            self._end(handshake)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            if self._listener is None:
                return
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("an HTTP connection could not be accepted: %s", error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listener)
                self._again = loop.call_later(ACCEPT_AGAIN_S, self.open, self._listener)
                return
            client.setblocking(False)
            if self._has_room():
                self._begin(client)
            else:
                client.close()

    def _has_room(self) -> bool:
        if len(self._under_way) < self._most:
            return True
        oldest = next(iter(self._under_way))
        if time.monotonic() - oldest.came_s < GRACE_S:
            return False
        self._end(oldest)
        return True

    def _begin(self, client: socket.socket) -> None:
        handshake = _Handshake(client)
        self._under_way[handshake] = None
        task = handshake.task = asyncio.get_running_loop().create_task(self._shake_hands(handshake))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._over(handshake, task))

    def _end(self, handshake: _Handshake) -> None:
        self._under_way.pop(handshake, None)
        assert handshake.task is not None
        handshake.task.cancel()

    async def _shake_hands(self, handshake: _Handshake) -> None:
        client, handshake.client = handshake.client, None
        assert client is not None
        await asyncio.get_running_loop().connect_accepted_socket(
            self._connection, client, ssl=self._context, ssl_handshake_timeout=self._timeout_s
        )

    def _over(self, handshake: _Handshake, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._under_way.pop(handshake, None)
        if handshake.client is not None:  # canceled before its first step
            handshake.client.close()
        error = None if task.cancelled() else task.exception()
        if isinstance(error, OSError):
            _log.debug("a TLS handshake failed: %s", error)
        elif error is not None:
            _log.error("a TLS handshake failed", exc_info=error)
