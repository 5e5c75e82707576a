"""The HTTP server: a listening socket, its connections (`http_protocol`), and their end. Nothing of what is served.

start -> connections -> stop. Signals are not its business: who owns the process decides what Ctrl-C means.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate

from .http_message import Message
from .http_protocol import Host, HttpConnection, HttpLimits
from .tls_door import TlsDoor

_log = logging.getLogger(__name__)

BACKLOG_CONNECTIONS = 2048
FD_SHARE = 0.75
"""Of the process's file descriptors, how many may be HTTP connections: accepting must not fail for want of one."""
HANDSHAKE_FD_SHARE = 0.125
"""The same of TLS handshakes under way, which are no connections yet."""
SWEEP_S = 0.1
STOP_TIMEOUT_S = 5.0
"""For answers under way when the server stops."""

App = Callable[[Message], Awaitable[None]]


def connection_limit(limits: HttpLimits) -> int:
    """Connections to grant in this process."""
    return _within_share(limits.connections, FD_SHARE)


def _within_share(most: int, share: float) -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, int(soft * share)))


class HttpServer:
    """Answers every request by `app`, which must complete its message. Used from one event loop."""

    def __init__(self, app: App, limits: HttpLimits, context: ssl.SSLContext | None = None) -> None:
        """`context`: for https."""
        self.connections: set[HttpConnection] = set()
        """Requests, so far."""
        self.host = Host(limits=limits, admit=self._admit, leave=self._leave, handle=self._handle, date=self._date_line)
        self._app = app
        self.tls: TlsDoor | None = None
        """What connections pass before they are one, for https."""
        if context is not None:
            self.tls = TlsDoor(
                context,
                self._connection,
                most=_within_share(limits.handshakes, HANDSHAKE_FD_SHARE),
                timeout_s=limits.handshake_timeout_s,
            )
        self._max_connections = connection_limit(limits)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        """That of http."""
        self._serving = False
        self._sweeping: asyncio.Task[None] | None = None
        self.answered = 0
        """Requests whose task has ended."""
        self._empty = asyncio.Event()
        """Set when it stops and nobody is left."""
        self._date_s = 0
        self._date = b""

    async def start(self, listener: socket.socket) -> None:
        """Serves on `listener`, which it closes in the end."""
        self._serving = True
        if self.tls is not None:
            self.tls.open(listener)
        else:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._connection, sock=listener, backlog=BACKLOG_CONNECTIONS)
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Accepts no more connections, lets answers under way end for STOP_TIMEOUT_S, and ends the rest. Idempotent."""
        if not self._serving or self._sweeping is None:
            return
        self._serving = False
        if self._server is not None:
            self._server.close()
        if self.tls is not None:
            await self.tls.close()
        for connection in list(self.connections):
            connection.finish()
        self._tell_if_empty()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._empty.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self.connections):  # clients that took no answer
            connection.transport.abort()
        self._sweeping.cancel()
        await asyncio.gather(self._sweeping, return_exceptions=True)

    def _connection(self) -> HttpConnection:
        return HttpConnection(self.host)

    def _admit(self, connection: HttpConnection) -> bool:
        if not self._serving or len(self.connections) >= self._max_connections:
            return False
        self.connections.add(connection)
        return True

    def _leave(self, connection: HttpConnection) -> None:
        self.connections.discard(connection)
        self._tell_if_empty()

    def _handle(self, message: Message) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        if not self._serving and not self.connections and not self._tasks:
            self._empty.set()

    async def _answer(self, message: Message) -> None:
        try:
            await self._app(message)
        except Exception:
            _log.exception("an HTTP request ended without an answer")
        finally:
            self.answered += 1
            message.abandon()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = time.monotonic()
            for connection in list(self.connections):
                try:
                    connection.sweep(now_s)
                except Exception:  # of one: the others are owed their sweep
                    _log.exception("an HTTP connection could not be looked at")

    def _date_line(self) -> bytes:
        now_s = int(time.time())
        if now_s != self._date_s:
            self._date_s, self._date = now_s, f"date: {formatdate(now_s, usegmt=True)}\r\n".encode()
        return self._date


def tls_context(cert: str, key: str, client_ca: str | None) -> ssl.SSLContext:
    """Of PEM files that were checked before; `client_ca`: who signs the certificates that clients must show."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.expanduser(cert), os.path.expanduser(key))
    if client_ca is not None:
        context.load_verify_locations(os.path.expanduser(client_ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening TCP socket; port 0 takes any free one. `shared`: other processes of this user may listen there too,
    and the kernel gives each connection to one of them (Linux: SO_REUSEPORT). Raises OSError naming the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG_CONNECTIONS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port} for HTTP: {error.strerror}") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """`host:port` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
