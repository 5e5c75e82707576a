"""A worker's own Prometheus endpoint: prometheus-client's WSGI application on a small server with a thread of its own.

On loopback it is open; beyond it a scraper shows the cluster's secret (`Authorization: Bearer <secret>`).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from ..auth import MemberCredentials
from ..config import ConfigError, WorkerConfig, is_loopback

TIMEOUT_S = 10.0
"""Of one scrape, and of a client that says nothing."""

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class WorkerMetricsServer:
    """Listens from its construction on; raises ConfigError where strangers could read it, OSError for a taken port."""

    def __init__(self, config: WorkerConfig, registry: CollectorRegistry, credentials: MemberCredentials) -> None:
        assert config.metrics_port is not None
        app: Application = make_wsgi_app(registry)
        if not is_loopback(config.host) and not config.insecure:
            if credentials.token is None:
                allowed = "none, or a secret of the cluster that scrapers show: the metrics are read beyond loopback"
                raise ConfigError("metrics_port", config.metrics_port, allowed)
            app = _keyed(app, credentials)
        kind = _Server6 if ":" in config.host else _Server
        self._server = make_server(config.host, config.metrics_port, app, kind, _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="worker-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_port)

    def stop(self) -> None:
        """Blocks until the thread has ended."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT_S

    def log_message(self, *_: Any) -> None:
        """Scrapes are not news."""


def _keyed(app: Application, credentials: MemberCredentials) -> Application:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        scheme, _, shown = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        if scheme.lower() == "bearer" and credentials.is_secret(shown.strip()):
            return app(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"authorization: missing or wrong; allowed: 'Bearer <secret>' with the cluster's secret\n"]

    return answer
