"""TLS handshakes that are begun and not ended: they take no connection's place, and not one for long."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvloop
from tandem.cluster.tls import ClientTLS
from tandem.router import tls_door
from tandem.router.http_protocol import HttpLimits
from waits import WAIT_S, wait_until

LOOPS = pytest.mark.parametrize("loop", [None, uvloop.new_event_loop])
Loop = Callable[[], Any] | None
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def address(front: Any) -> tuple[str, int]:
    host, port = front.http.split(":")
    return host, int(port)


def handshakes(front: Any) -> int:
    return len(front.frontend._http.tls)


def connections(front: Any) -> int:
    return len(front.frontend._http.connections)


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends it within WAIT_S, having said nothing."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def received(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the server ended it"
    return data


def hello(context: ssl.SSLContext) -> bytes:
    """The first message of a client's handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.fixture
def half_done() -> Iterator[Callable[..., socket.socket]]:
    """`half_done(front, b"…")`: a connection that has sent this much of its handshake."""
    opened: list[socket.socket] = []

    def connect(front: Any, sent: bytes = b"") -> socket.socket:
        opened.append(socket.create_connection(address(front), timeout=WAIT_S))
        opened[-1].sendall(sent)
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def start_secure(start_front: Callable[..., Any], authority: Any) -> Callable[..., Any]:
    cert, key = authority.issue("router")

    def start(loop: Loop = None, **limits: Any) -> Any:
        return start_front(tls_cert=cert, tls_key=key, limits=HttpLimits(**limits), loop=loop and loop())

    return start


@LOOPS
def test_the_oldest_gives_way_to_who_comes(
    start_secure: Callable[..., Any], half_done: Any, authority: Any, monkeypatch: pytest.MonkeyPatch, loop: Loop
) -> None:
    monkeypatch.setattr(tls_door, "GRACE_S", 0.0)
    front = start_secure(loop, handshakes=20, connections=2)
    context = ClientTLS(ca=authority.ca).context()
    first = half_done(front, hello(context))
    wait_until(lambda: handshakes(front) == 1)
    others = [half_done(front, (b"", hello(context)[:100], hello(context))[n % 3]) for n in range(60)]
    wait_until(lambda: handshakes(front) == 20)
    assert is_closed(others[1])
    with contextlib.suppress(ConnectionError):
        while first.recv(65536):  # the server's half of the handshake, perhaps
            pass
    assert connections(front) == 0
    with httpx.Client(verify=context, trust_env=False) as client:
        assert client.get(f"{front.url}/health").status_code == 200
    assert handshakes(front) <= 20


@LOOPS
def test_a_new_handshake_is_left_in_peace_and_the_next_connection_closed(
    start_secure: Callable[..., Any], half_done: Any, monkeypatch: pytest.MonkeyPatch, loop: Loop
) -> None:
    monkeypatch.setattr(tls_door, "GRACE_S", 3600.0)
    front = start_secure(loop, handshakes=2)
    begun = [half_done(front) for _ in range(2)]
    wait_until(lambda: handshakes(front) == 2)
    assert is_closed(half_done(front))
    assert handshakes(front) == 2
    begun[0].close()
    wait_until(lambda: handshakes(front) == 1)


@LOOPS
def test_a_handshake_must_come_to_an_end(start_secure: Callable[..., Any], half_done: Any, loop: Loop) -> None:
    front = start_secure(loop, handshake_timeout_s=0.1)
    assert is_closed(half_done(front))
    wait_until(lambda: handshakes(front) == 0)


@LOOPS
def test_no_tls_at_all_is_no_connection(start_secure: Callable[..., Any], half_done: Any, loop: Loop) -> None:
    front = start_secure(loop)
    plain = half_done(front, GET)
    with contextlib.suppress(ConnectionError):
        assert not plain.recv(65536).startswith(b"HTTP")
    wait_until(lambda: handshakes(front) == 0)
    assert connections(front) == 0


@LOOPS
def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(
    start_secure: Callable[..., Any], half_done: Any, authority: Any, loop: Loop
) -> None:
    front = start_secure(loop, connections=1)
    for end in ("served", "too many"):
        connection = half_done(front)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = ClientTLS(ca=authority.ca).context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(received(connection))
        client.write(GET)
        connection.sendall(outgoing.read())  # both in one
        answer = b""
        while b"\r\n\r\n" not in answer:
            try:
                answer += client.read(65536)
            except ssl.SSLWantReadError:
                incoming.write(received(connection))
        assert answer.startswith(b"HTTP/1.1 200" if end == "served" else b"HTTP/1.1 503")
        assert connections(front) == 1
        wait_until(lambda: handshakes(front) == 0)


@LOOPS
def test_stop_waits_for_no_handshake(start_secure: Callable[..., Any], half_done: Any, loop: Loop) -> None:
    front = start_secure(loop)
    begun = half_done(front)
    wait_until(lambda: handshakes(front) == 1)
    front.run(front.frontend.stop())
    assert is_closed(begun)
    assert handshakes(front) == 0
