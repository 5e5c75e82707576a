"""HTTP/1.1 as it goes over the wire: framing, HEAD, 100 Continue, pipelining."""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace
from typing import Any, cast

from tandem.router.http_protocol import HttpConnection, HttpLimits

WAIT_S = 20
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
JSON_HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def address(front: Any) -> tuple[str, int]:
    host, port = front.http.split(":")
    return host, int(port)


def answers(front: Any, request: str) -> bytes:
    """All that comes until the router closes the connection."""
    with socket.create_connection(address(front), timeout=WAIT_S) as connection:
        connection.sendall(request.encode())
        return connection.makefile("rb").read()


def test_a_client_of_http_1_0_gets_no_chunks(front: Any) -> None:
    """It knows no chunked coding (RFC 9112 section 6.1): the end of the connection is the end of the stream."""
    front.service.text = "ab"
    data = json.dumps({**BODY, "stream": True})
    head = JSON_HEAD.replace("HTTP/1.1", "HTTP/1.0")
    top, _, body = answers(front, f"{head}Content-Length: {len(data)}\r\n\r\n{data}").partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in top
    assert b"connection: close" in top
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_head_request_gets_a_head(front: Any) -> None:
    request = "Host: localhost\r\nConnection: close\r\n\r\n"
    got = answers(front, f"GET /health HTTP/1.1\r\n{request}")
    head = answers(front, f"HEAD /health HTTP/1.1\r\n{request}")
    assert head.endswith(b"\r\n\r\n")
    assert b"content-length: 15" in head
    assert got.partition(b"\r\n\r\n")[2] == b'{"status":"ok"}'


def test_a_body_that_waits_for_leave_gets_it(front: Any) -> None:
    data = json.dumps(BODY).encode()
    with socket.create_connection(address(front), timeout=WAIT_S) as connection:
        connection.sendall(f"{JSON_HEAD}Expect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n".encode())
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(data)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


def test_requests_sent_ahead_are_answered_in_order(front: Any) -> None:
    requests = [f"GET {path} HTTP/1.1\r\nHost: localhost\r\n" for path in ("/health", "/v1/models", "/nothing")]
    answer = answers(front, "\r\n".join(requests) + "Connection: close\r\n\r\n")
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]
    assert answer.index(b'"status"') < answer.index(b'"list"') < answer.index(b"unknown_url")


def test_whoever_waits_for_the_client_is_woken() -> None:
    """An answer that has ended and the one behind it may wait at the same time."""
    woken: list[str] = []
    host: Any = SimpleNamespace(limits=HttpLimits(), date=lambda: b"", admit=lambda _: True, leave=lambda _: None)

    async def scene(end: str) -> None:
        connection = HttpConnection(host)
        connection.connection_made(cast(Any, SimpleNamespace(is_closing=lambda: True)))
        connection.pause_writing()

        async def wait(name: str) -> None:
            await connection.drain()
            woken.append(name)

        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            group.create_task(wait("one"))
            group.create_task(wait("other"))
            await asyncio.sleep(0)
            assert not woken
            connection.resume_writing() if end == "resumed" else connection.connection_lost(None)

    for end in ("resumed", "lost"):
        woken.clear()
        asyncio.run(scene(end))
        assert sorted(woken) == ["one", "other"]
