"""Serves both front ends in one event loop: HTTP on `http_server`, gRPC on grpc.aio, one `Door` between them and the
core.

start -> requests -> drain (no new requests, those inside finish) -> stop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from grpc import aio

from ..cluster.auth import check_clients, open_port
from ..cluster.config import RouterConfig
from ..cluster.metrics import RouterMetrics
from ..cluster.tls import Identity, load_ca, load_identity
from .api_keys import ApiKeys
from .door import Door
from .grpc_api import build_grpc_server
from .http_app import build_http_app
from .http_protocol import HttpLimits
from .http_server import HttpServer, address_of, bind, tls_context
from .service import GenerationService
from .siblings import Siblings
from .tokenizer_base import Tokenizer


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where clients reach the router, `host:port`."""

    http: str
    grpc: str


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
        self._http: HttpServer | None = None
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
        if self._http is not None:
            await self._http.stop()

    async def _start_http(self) -> str:
        config, context = self._config, None
        if config.tls_cert is not None and config.tls_key is not None:
            context = tls_context(config.tls_cert, config.tls_key, config.tls_client_ca)
        listener = bind(config.host, config.http_port, shared=config.processes > 1)
        self._http = HttpServer(build_http_app(self._door), self._limits, context)
        try:
            await self._http.start(listener)
        except BaseException:
            listener.close()
            raise
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
