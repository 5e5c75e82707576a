"""Free TCP ports of this machine, for processes that must be told the same ones before they start."""

from __future__ import annotations

import random
import socket
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from .config import RouterConfig

_ROW_TRIES = 64
_FIRST_PORT = 20_000
_LAST_PORT = 32_767
_FEWEST_PORTS = 1_000
_LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Linux: the first and the last port that outgoing connections are given."""
_random = random.SystemRandom()


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
        try:
            first = held.enter_context(bind(host, _draw())).getsockname()[1]
            row = tuple(range(first, first + count))
            if not taken.isdisjoint(row):
                continue
            for port in row[1:]:
                held.enter_context(bind(host, port))
            return row
        except (OSError, OverflowError):
            continue
    if count == 1:
        raise OSError(f"no free port on {host}")
    raise OSError(f"registry_port: no {count} free ports in a row on {host}; name the first of them")


def _draw() -> int:
    """A port that the kernel gives to no outgoing connection, which might have it when its process comes to listen; 0,
    any free one, where there are too few of those.
    """
    try:
        first_local = int(_LOCAL_PORTS.read_text(encoding="ascii").split()[0])
    except OSError:  # not Linux, where they begin higher
        first_local = _LAST_PORT + 1
    end = min(first_local, _LAST_PORT + 1)
    return _random.randrange(_FIRST_PORT, end) if end - _FIRST_PORT >= _FEWEST_PORTS else 0
