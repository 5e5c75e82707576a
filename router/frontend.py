"""Serves both front ends in one event loop: HTTP on uvicorn, gRPC on grpc.aio, one `Door` between them and the core.

start -> requests -> drain (no new requests, those inside finish) -> stop. uvicorn's signal handling stays off: who owns
the process decides what Ctrl-C means.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import uvicorn
from grpc import aio

from ..cluster.auth import check_clients, open_port
from ..cluster.config import RouterConfig
from ..cluster.metrics import RouterMetrics
from ..cluster.tls import Identity, load_ca, load_identity
from .api_keys import ApiKeys
from .door import Door
from .grpc_api import build_grpc_server
from .http_app import build_http_app
from .http_protocol import BoundedProtocol, HttpLimits, connection_limit, sweep
from .service import GenerationService
from .siblings import Siblings
from .tokenizer_base import Tokenizer

BACKLOG_CONNECTIONS = 2048
STOP_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where clients reach the router, `host:port`."""

    http: str
    grpc: str


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with a way to await its start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()

    async def on_tick(self, counter: int) -> bool:
        sweep(self.server_state.connections, time.monotonic())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets=sockets)
        for connection in list(self.server_state.connections):  # clients that took no answer
            connection.transport.abort()


class Frontend:
    """Both front ends. Used from one event loop.

    Raises ConfigError for files of keys and certificates that cannot be used, and where `config.host` is beyond
    loopback, clients need neither key nor certificate, and nobody said `insecure`.
    """

    def __init__(
        self,
        service: GenerationService,
        tokenizer: Tokenizer,
        config: RouterConfig,
        metrics: RouterMetrics,
        *,
        limits: HttpLimits | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._limits = limits or HttpLimits()
        keys = ApiKeys.from_config(config)
        check_clients(config)
        self._identity, self._client_ca = _load_tls(config)
        self._config = config
        self._door = Door(service, tokenizer, config, metrics, keys=keys, siblings=siblings)
        self._http: _Server | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._grpc: aio.Server | None = None
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> Addresses:
        """Binds both ports and serves. Raises OSError naming the address that is taken; then nothing is left bound."""
        try:
            http = await self._start_http()
            grpc = await self._start_grpc()
        except BaseException:
            await self.stop()
            raise
        return Addresses(http, grpc)

    @property
    def warning(self) -> str:
        """One line for the operator about what keeps all clients out; else empty. From the event loop, never blocks."""
        return self._door.warning

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests with 503 / UNAVAILABLE and waits for those inside; False if some remain."""
        return await self._door.drain(timeout_s)

    async def stop(self) -> None:
        """Ends what still runs, each with an error its client can read, and frees both ports. Idempotent."""
        await self._door.close()
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
            self._health_task = None
        if self._grpc is not None:
            server, self._grpc = self._grpc, None
            await server.stop(grace=0.5)
        if self._http_task is not None:
            assert self._http is not None
            self._http.should_exit = True
            task, self._http_task = self._http_task, None
            await task

    async def _start_http(self) -> str:
        listener = bind(self._config.host, self._config.http_port, shared=self._config.processes > 1)
        max_connections = connection_limit(self._limits)
        self._http = _Server(
            uvicorn.Config(
                build_http_app(self._door),
                http=cast("type[asyncio.Protocol]", partial(BoundedProtocol, self._limits, max_connections)),
                timeout_keep_alive=math.ceil(self._limits.idle_timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nobody asks for a client's address
                server_header=False,
                backlog=BACKLOG_CONNECTIONS,
                timeout_graceful_shutdown=STOP_TIMEOUT_S,
                ssl_certfile=_expanded(self._config.tls_cert),
                ssl_keyfile=_expanded(self._config.tls_key),
                ssl_ca_certs=_expanded(self._config.tls_client_ca),
                ssl_cert_reqs=ssl.CERT_NONE if self._client_ca is None else ssl.CERT_REQUIRED,
            )
        )
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listener]))
        listening = asyncio.create_task(self._http.listening.wait())
        await asyncio.wait({listening, self._http_task}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._http_task.done():
            listener.close()
            self._http_task.result()
            raise RuntimeError("the HTTP server ended while it started")
        return address_of(listener)

    async def _start_grpc(self) -> str:
        server, readiness = build_grpc_server(self._door)
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = open_port(server, f"{host}:{self._config.grpc_port}", self._identity, self._client_ca)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{self._config.grpc_port} for gRPC: {error}") from None
        await server.start()
        self._grpc = server
        self._health_task = asyncio.create_task(readiness.poll())
        return f"{host}:{port}"


def _load_tls(config: RouterConfig) -> tuple[Identity | None, bytes | None]:
    """The router's certificate and who signs its clients', where the configuration names them. Raises ConfigError."""
    if config.tls_cert is None or config.tls_key is None:
        return None, None
    client_ca = None if config.tls_client_ca is None else load_ca(config.tls_client_ca, "tls_client_ca")
    return load_identity(config.tls_cert, config.tls_key), client_ca


def _expanded(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)


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
