"""What a client of the HTTP door may take and keep: connections, heads, bodies, time, unread answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
import uvloop
from tandem.cluster.types import SampledToken
from tandem.router import http_exchange
from tandem.router.body_budget import BodyBudget
from tandem.router.errors import Overloaded
from tandem.router.http_app import check_host
from tandem.router.http_protocol import MAX_PIPELINED, HttpLimits
from tandem.router.service import Delta, GenerateRequest
from waits import WAIT_S, wait_until

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
SHORT = HttpLimits(head_timeout_s=0.3, idle_timeout_s=0.2, write_stall_s=0.3, linger_s=0.2)
JSON_HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(front: Any, *, receive_bytes: int | None = None) -> socket.socket:
    host, port = front.http.split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(WAIT_S)
    connection.connect((host, int(port)))
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """All that the server sends until it closes; a reset counts as closed."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def drips_until_cut_off(connection: socket.socket, data: bytes) -> bool:
    """Sends `data` again and again; whether the server ended that within WAIT_S."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            connection.sendall(data)
        except OSError:
            return True
        time.sleep(0.02)
    return False


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def open_connections(front: Any) -> int:
    return len(front.frontend._http.connections)


def test_a_connection_that_sends_nothing_is_closed(start_front: Callable[..., Any]) -> None:
    with connect(start_front(limits=SHORT)) as connection:
        assert until_closed(connection) == b""


def test_a_head_that_drips_is_answered_408(start_front: Callable[..., Any]) -> None:
    front = start_front(limits=SHORT)
    with connect(front) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\n")
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.02):
                try:
                    connection.sendall(b"x: y\r\n")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        answer = until_closed(connection)
        stop.set()
        dripping.join(WAIT_S)
    status, error = error_of(answer)
    assert (status, error["code"]) == (408, "headers_timeout")
    wait_until(lambda: open_connections(front) == 0)


def test_line_breaks_for_ever_are_no_request(start_front: Callable[..., Any]) -> None:
    """They are legal before a request line (RFC 9112 section 2.2), and each is a sign of life."""
    front = start_front(limits=SHORT)
    with connect(front) as connection:
        assert drips_until_cut_off(connection, b"\r\n")


def test_an_answered_request_whose_body_never_ends_is_closed(start_front: Callable[..., Any]) -> None:
    front = start_front(limits=SHORT)
    with connect(front) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert drips_until_cut_off(connection, b"x")
    wait_until(lambda: open_connections(front) == 0)


def test_a_kept_connection_is_closed_when_idle_and_serves_until_then(start_front: Callable[..., Any]) -> None:
    front = start_front(limits=HttpLimits(idle_timeout_s=1))
    with connect(front) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
        assert until_closed(connection) == b""


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (f"GET /{'x' * 70_000} HTTP/1.1\r\nHost: localhost\r\n\r\n", "over 65536 bytes"),
        (f"GET / HTTP/1.1\r\nHost: localhost\r\nx: {'y' * 70_000}\r\n\r\n", "over 65536 bytes"),
        (f"GET / HTTP/1.1\r\nHost: localhost\r\nx: {'y' * 700_000}", "over 65536 bytes"),
        ("GET / HTTP/1.1\r\nHost: localhost\r\n" + "a: b\r\n" * 200 + "\r\n", "more than 128 headers"),
        (f"{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\n" + "a: b\r\n" * 200, "more than 128 headers"),
        (f"{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\na: {'y' * 700_000}", "over 65536 bytes"),
        (f"{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n1;{'y' * 700_000}", "over 65536 bytes"),
    ],
    ids=["target", "header", "endless header", "headers", "trailers", "endless trailer", "endless chunk extension"],
)
def test_a_head_is_bounded(front: Any, head: str, words: str) -> None:
    with connect(front) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head.encode())
        answer = until_closed(connection)
    if answer:  # a client still sending may be reset before it reads
        status, error = error_of(answer)
        assert (status, error["code"]) == (431, "headers_too_large")
        assert words in error["message"]
    assert front.service.requests == []
    assert httpx.get(f"{front.url}/health").status_code == 200


def test_requests_ahead_of_their_answers_are_bounded(front: Any) -> None:
    front.service.hang_at = 0
    data = json.dumps(BODY).encode()
    request = f"{JSON_HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data
    with connect(front) as connection:
        connection.sendall(request * (MAX_PIPELINED + 4))
        status, error = error_of(until_closed(connection))
    assert (status, error["message"]) == (400, f"more than {MAX_PIPELINED} requests were sent ahead of their answers")
    wait_until(lambda: front.service.running == 0)


def test_a_client_that_sent_ahead_and_goes_away_cancels_its_request(front: Any) -> None:
    front.service.hang_at = 0
    data = json.dumps(BODY).encode()
    request = f"{JSON_HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data
    with connect(front) as connection:
        connection.sendall(request * 3)
        assert front.service.hanging.wait(WAIT_S)
    assert front.service.canceled.wait(WAIT_S)
    wait_until(lambda: front.service.running == 0 and open_connections(front) == 0)
    assert len(front.service.requests) == 1


def test_a_body_sent_ahead_is_bounded(front: Any) -> None:
    front.service.hang_at = 0
    data = json.dumps(BODY).encode()
    request = f"{JSON_HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data
    with connect(front) as connection:
        connection.sendall(request + f"{JSON_HEAD}Content-Length: 60000\r\n\r\n{' ' * 60_000}".encode())
        assert until_closed(connection).startswith(b"HTTP/1.1 400")
    wait_until(lambda: front.service.running == 0)


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop])
def test_connections_are_bounded(start_front: Callable[..., Any], loop: Callable[[], Any] | None) -> None:
    front = start_front(limits=HttpLimits(connections=2), loop=loop and loop())
    first, second = connect(front), connect(front)
    wait_until(lambda: open_connections(front) == 2)
    with connect(front) as third:
        third.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = until_closed(third)
    assert not answer or error_of(answer)[0] == 503
    first.close()
    wait_until(lambda: open_connections(front) == 1)
    assert httpx.get(f"{front.url}/health").status_code == 200
    second.close()


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop])
def test_a_client_that_takes_nothing_loses_its_stream(
    start_front: Callable[..., Any], loop: Callable[[], Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its deadline; and what waited for it stays within a few writes."""
    front = start_front(limits=SHORT, loop=loop and loop())
    ended, yielded = threading.Event(), [0]

    async def endless(request: GenerateRequest, tap: Any) -> AsyncGenerator[Delta, None]:
        try:
            while True:
                yielded[0] += 1
                yield Delta(choice=0, text="x" * 100_000, tokens=(SampledToken(120),))
        finally:
            ended.set()

    monkeypatch.setattr(front.service, "generate", endless)
    data = json.dumps({**BODY, "stream": True}).encode()
    with connect(front, receive_bytes=4096) as connection:
        connection.sendall(f"{JSON_HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert ended.wait(WAIT_S)
        wait_until(lambda: open_connections(front) == 0)
    assert yielded[0] < 200  # 20 MB: what the kernel's buffers took, not what the service could make


def test_an_answer_that_nobody_takes_keeps_no_connection(start_front: Callable[..., Any]) -> None:
    front = start_front(limits=SHORT, max_body_bytes=2**24)
    data = json.dumps({"prompt": "x" * 2**20}).encode()
    head = JSON_HEAD.replace(CHAT, "/tokenize")
    with connect(front, receive_bytes=4096) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(lambda: front.frontend._http.answered == 1)
        wait_until(lambda: open_connections(front) == 0)


def test_stop_waits_for_no_client(start_front: Callable[..., Any]) -> None:
    front = start_front()
    with connect(front) as idle, connect(front) as half:
        half.sendall(b"POST / HTTP/1.1\r\n")
        wait_until(lambda: open_connections(front) == 2)
        front.run(front.frontend.stop())
        assert (until_closed(idle), until_closed(half)) == (b"", b"")


@pytest.mark.parametrize("sent", [b"", b"{"])
def test_a_body_that_does_not_come_is_answered_408(front: Any, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(http_exchange, "BODY_PART_TIMEOUT_S", 0.1)
    with connect(front) as connection:
        connection.sendall(f"{JSON_HEAD}Content-Length: 10\r\n\r\n".encode() + sent)
        status, error = error_of(until_closed(connection))
    assert (status, error["code"]) == (408, "body_timeout")


def test_a_body_that_drips_is_answered_408(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "BODY_TIMEOUT_S", 0.3)
    with connect(front) as connection:
        connection.sendall(f"{JSON_HEAD}Content-Length: 100000\r\n\r\n".encode())
        connection.settimeout(0.02)
        answer, end_s = b"", time.monotonic() + WAIT_S
        while not answer and time.monotonic() < end_s:
            connection.sendall(b" ")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
    assert error_of(answer)[0] == 408


def test_bodies_are_bounded_together_and_given_back(start_front: Callable[..., Any]) -> None:
    front = start_front(max_body_bytes=1024)
    door = front.frontend._door
    door.bodies = BodyBudget(1500)
    with connect(front) as connection:
        connection.sendall(f"{JSON_HEAD}Content-Length: 1000\r\n\r\n{' ' * 900}".encode())
        wait_until(lambda: door.bodies.held_bytes == 900)
        refused = httpx.post(f"{front.url}{CHAT}", json={**BODY, "user": "x" * 700}, timeout=WAIT_S)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert httpx.post(f"{front.url}{CHAT}", json=BODY, timeout=WAIT_S).status_code == 200
    wait_until(lambda: door.bodies.held_bytes == 0)
    assert httpx.post(f"{front.url}{CHAT}", json={**BODY, "user": "x" * 700}, timeout=WAIT_S).status_code == 200
    wait_until(lambda: door.bodies.held_bytes == 0)


def test_a_budget_refuses_before_it_takes() -> None:
    budget = BodyBudget(10)
    with budget.holding(7):
        with pytest.raises(Overloaded, match="7 bytes of bodies are inside; allowed: 10"):
            budget.take(4)
        assert budget.held_bytes == 7
    assert budget.held_bytes == 0


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_a_body_must_say_that_it_is_json(front: Any, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = httpx.post(f"{front.url}{CHAT}", content=json.dumps(BODY).encode(), headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (415, "content-type")
    assert "allowed: application/json" in response.json()["error"]["message"]
    assert front.service.requests == []


def test_json_with_a_charset_is_json(front: Any) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert httpx.post(f"{front.url}{CHAT}", content=json.dumps(BODY).encode(), headers=headers).status_code == 200


def test_a_page_of_another_origin_gets_no_preflight(front: Any) -> None:
    headers = {"origin": "https://example.com", "access-control-request-method": "POST"}
    response = httpx.options(f"{front.url}{CHAT}", headers=headers)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "a.localhost"]
)
def test_names_of_this_machine_are_answered(front: Any, host: str) -> None:
    assert httpx.post(f"{front.url}{CHAT}", json=BODY, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_a_name_that_was_pointed_here_is_not(front: Any, host: str) -> None:
    response = httpx.post(f"{front.url}{CHAT}", json=BODY, headers={"host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (421, "wrong_host")
    assert front.service.requests == []


def test_with_a_key_any_name_will_do(start_front: Callable[..., Any]) -> None:
    front = start_front(api_key="k")
    headers = {"host": "tandem.example", "authorization": "Bearer k"}
    assert httpx.post(f"{front.url}{CHAT}", json=BODY, headers=headers).status_code == 200


def test_a_request_without_a_host_is_refused() -> None:
    with pytest.raises(Exception, match="host: is missing"):
        check_host(None)


def test_an_upgrade_is_answered_as_it_came(front: Any) -> None:
    """HTTP clients that could speak HTTP/2 ask for it; nobody must answer. The parser drops the body of such a
    request: that is said, not taken for an empty one.
    """
    data = json.dumps(BODY).encode()
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    with connect(front) as connection:
        connection.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n".encode())
        assert until_closed(connection).startswith(b"HTTP/1.1 200")
    with connect(front) as connection:
        connection.sendall(f"{JSON_HEAD}{upgrade}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status, error = error_of(until_closed(connection))
    assert status == 400
    assert error["message"].startswith("upgrade: a request with a body")


def test_no_task_is_left_of_bad_connections(start_front: Callable[..., Any]) -> None:
    front = start_front(limits=SHORT)

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    before = front.run(tasks())
    for sent in (b"", b"\x00", b"GET", b"GET / HTTP/1.1\r\n\r\n", f"{JSON_HEAD}Content-Length: 9\r\n\r\n{{".encode()):
        with connect(front) as connection:
            connection.sendall(sent)
    wait_until(lambda: open_connections(front) == 0 and front.run(tasks()) == before)
