"""Free TCP ports of this machine, for processes that must be told the same ones before they start."""

from __future__ import annotations

import socket
from collections.abc import Set
from contextlib import ExitStack
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
    """Replaces ports that are 0 by free ones, all different and none that is named; registry ports in a row, one for
    each process. Raises OSError.
    """
    ports = {name: getattr(router, name) for name in ("http_port", "grpc_port")}
    taken = {port for port in (*ports.values(), *router.registry_ports) if port}
    with ExitStack() as held:
        for name, port in ports.items():
            if port == 0:
                (ports[name],) = _bind_row(router.host, 1, taken, held)
                taken.add(ports[name])
        row = router.registry_ports
        if router.registry_port == 0:
            row = _bind_row(router.host, router.processes, taken, held)
    return replace(router, **ports, registry_port=row[0])


def _bind_row(host: str, count: int, taken: Set[int], held: ExitStack) -> tuple[int, ...]:
    """Free ports that count up by one, none of them in `taken`; `held` keeps them, and those that would not do, so that
    they do not come again.
    """
    for _ in range(_ROW_TRIES):
        first = held.enter_context(bind(host, 0)).getsockname()[1]
        row = tuple(range(first, first + count))
        if not taken.isdisjoint(row):
            continue
        try:
            for port in row[1:]:
                held.enter_context(bind(host, port))
            return row
        except (OSError, OverflowError):
            continue
    if count == 1:
        raise OSError(f"no free port on {host}")
    raise OSError(f"registry_port: no {count} free ports in a row on {host}; name the first of them")
