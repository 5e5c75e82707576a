"""Ports that several processes are told before they start."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster import ports
from tandem.cluster.config import ConfigError, RouterConfig
from tandem.cluster.launch.checks import check_ports, check_shared_ports
from tandem.cluster.launch.state import LaunchError
from tandem.cluster.ports import bind, pin_ports
from tandem.router.http_server import bind as listen

FREE = RouterConfig(processes=3, http_port=0, grpc_port=0, registry_port=0)


def test_ports_that_are_zero_become_free_ones_and_the_rest_stays() -> None:
    pinned = pin_ports(FREE)
    first = pinned.registry_port
    assert pinned.registry_ports == (first, first + 1, first + 2)
    assert len({pinned.http_port, pinned.grpc_port, *pinned.registry_ports}) == 5
    for port in (pinned.http_port, pinned.grpc_port, *pinned.registry_ports):
        bind("127.0.0.1", port).close()  # free again
    assert pin_ports(pinned) == pinned
    check_ports(pinned)
    check_shared_ports(pinned)


def test_a_taken_registry_port_of_any_process_is_named() -> None:
    pinned = pin_ports(FREE)
    taken = pinned.registry_ports[2]
    with bind("127.0.0.1", taken) as holder:
        holder.listen()
        with pytest.raises(LaunchError, match=rf"^router\.registry_port: 127\.0\.0\.1:{taken} cannot be used"):
            check_ports(pinned)


def test_a_shared_port_is_not_free_for_another_cluster() -> None:
    with listen("127.0.0.1", 0, shared=True) as first:
        port = first.getsockname()[1]
        listen("127.0.0.1", port, shared=True).close()
        with pytest.raises(LaunchError, match="cannot be used"):
            check_ports(RouterConfig(processes=2, http_port=port, grpc_port=0, registry_port=0))
        with pytest.raises(OSError, match="cannot listen on"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("name", ["http_port", "grpc_port", "registry_port"])
def test_processes_that_share_ports_must_know_them(name: str) -> None:
    ports = {"http_port": 8000, "grpc_port": 8001, "registry_port": 8002, name: 0}
    check_shared_ports(RouterConfig(**ports))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^{name}: 0 is not allowed; allowed: a port that all 2 router processes"):
        check_shared_ports(RouterConfig(processes=2, **ports))  # type: ignore[arg-type]


def test_where_the_kernel_does_not_spread_connections_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    two = RouterConfig(processes=2)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"^processes: 2 is not allowed; allowed: 1 on darwin"):
        check_shared_ports(two)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(ConfigError, match=r"^processes: 2"):
        check_shared_ports(two)
    check_shared_ports(RouterConfig())


@pytest.mark.parametrize(
    ("named", "draws"),
    [
        ({"http_port": 21000}, [21000, 21100, 21200]),
        ({"grpc_port": 21000}, [21000, 21100, 21200]),
        ({}, [21100, 21000, 21098, 21200]),
        ({"registry_port": 21000}, [21002, 21100, 21200]),
    ],
)
def test_no_port_is_drawn_that_is_named_or_drawn_already(
    monkeypatch: pytest.MonkeyPatch, named: dict[str, int], draws: list[int]
) -> None:
    """All are free, and drawn in this order."""
    order = iter(draws)
    monkeypatch.setattr(ports, "_draw", lambda: next(order))
    monkeypatch.setattr(ports, "bind", lambda host, port: Bound(port))
    pinned = pin_ports(replace(FREE, **named))
    assert len({pinned.http_port, pinned.grpc_port, *pinned.registry_ports}) == 5
    assert {name: getattr(pinned, name) for name in named} == named
    assert next(order, None) is None


@pytest.mark.parametrize(("local", "drawn"), [("32768\t60999", True), ("1024\t65535", False), (None, True)])
def test_outgoing_connections_are_not_given_what_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local: str | None, drawn: bool
) -> None:
    table = tmp_path / "ip_local_port_range"
    if local is not None:
        table.write_text(local)
    monkeypatch.setattr(ports, "_LOCAL_PORTS", table)
    found = {ports._draw() for _ in range(200)}
    assert (found == {0}) is not drawn
    assert all(20_000 <= port < 32_768 for port in found) is drawn


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as holder:
        holder.listen()
        taken = holder.getsockname()[1]
        order = iter([taken, *(0 for _ in range(60))])
        monkeypatch.setattr(ports, "_draw", lambda: next(order))
        assert pin_ports(replace(FREE, processes=1)).http_port != taken
        monkeypatch.setattr(ports, "_draw", lambda: taken)
        with pytest.raises(OSError, match=r"^no free port on 127\.0\.0\.1"):
            pin_ports(replace(FREE, processes=1))


class Bound:
    """A socket that holds a port."""

    def __init__(self, port: int) -> None:
        self._port = port

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self._port

    def __enter__(self) -> Bound:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was bound."""
