"""Free TCP ports of this machine, for processes that must be told the same ones before they start."""

from __future__ import annotations

import socket
from dataclasses import replace

from .config import RouterConfig

_ROW_TRIES = 64


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port (0: any free one) until it is closed; it does not listen. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def pin_ports(router: RouterConfig) -> RouterConfig:
    """Replaces ports that are 0 by free ones; registry ports in a row, one for each process. Raises OSError."""
    taken = [bind(router.host, 0) for name in ("http_port", "grpc_port") if getattr(router, name) == 0]
    free = iter([sock.getsockname()[1] for sock in taken])
    ports = {name: getattr(router, name) or next(free) for name in ("http_port", "grpc_port")}
    try:
        row = _bind_row(router.host, router.processes) if router.registry_port == 0 else []
    finally:
        for sock in taken:
            sock.close()
    first = row[0].getsockname()[1] if row else router.registry_port
    for sock in row:
        sock.close()
    return replace(router, **ports, registry_port=first)


def _bind_row(host: str, count: int) -> list[socket.socket]:
    """Sockets on free ports that count up by one."""
    for _ in range(_ROW_TRIES):
        row = [bind(host, 0)]
        try:
            while len(row) < count:
                row.append(bind(host, row[-1].getsockname()[1] + 1))
            return row
        except (OSError, OverflowError):
            for sock in row:
                sock.close()
    raise OSError(f"registry_port: no {count} free ports in a row on {host}; name the first of them")
