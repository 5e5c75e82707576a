"""Streams on the wire, clients that go away, draining, stopping, keys, readiness, metrics, token endpoints."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
import uvloop
from tandem.cluster.config import ConfigError, RouterConfig
from tandem.cluster.metrics import RouterMetrics
from tandem.cluster.types import SampledToken
from tandem.router import http_exchange, http_generate
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.client import TandemClient
from tandem.router.errors import Unavailable
from tandem.router.frontend import Frontend
from tandem.router.service import Delta, GenerateRequest, ModelCard
from waits import WAIT_S, wait_until

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def post_raw(front: Any, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """Sends a request and leaves its answer unread."""
    host, port = front.http.split(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    data = json.dumps(body).encode()
    connection.sendall(head_of(path, len(data)) + data)
    return connection


def head_of(path: str, body_bytes: int, *more: str) -> bytes:
    """A request's head as it goes over the wire; `more`: whole header lines."""
    lines = ("Host: localhost", "Content-Type: application/json", *more, f"Content-Length: {body_bytes}")
    return "\r\n".join((f"POST {path} HTTP/1.1", *lines, "", "")).encode()


def test_a_stream_on_the_wire(front: Any) -> None:
    front.service.text = "ab"
    response = httpx.post(f"{front.url}{CHAT}", json={**BODY, "stream": True}, timeout=WAIT_S)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert choices == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {"content": "b"}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"},
    ]
    assert response.headers["x-request-id"] == json.loads(events[0])["id"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hang_at", [0, 3])
def test_a_client_that_goes_away_cancels_its_request_while_no_token_comes(
    front: Any, stream: bool, hang_at: int
) -> None:
    front.service.hang_at = hang_at
    connection = post_raw(front, {**BODY, "stream": stream})
    assert front.service.hanging.wait(WAIT_S)
    connection.close()
    assert front.service.canceled.wait(WAIT_S)
    wait_until(lambda: front.service.running == 0)


def test_a_client_that_goes_away_cancels_all_prompts(front: Any) -> None:
    front.service.hang_at = 2
    connection = post_raw(front, {"model": "tiny", "prompt": ["a", "b", "c"]}, "/v1/completions")
    wait_until(lambda: front.service.running == 3)
    connection.close()
    wait_until(lambda: front.service.running == 0)


def test_a_client_that_does_not_read_is_ended_at_its_deadline(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service may have finished or not: what counts is that nothing of the request stays because of the client."""
    ended = threading.Event()

    async def endless(request: GenerateRequest, tap: Any) -> AsyncGenerator[Delta, None]:
        try:
            while True:
                yield Delta(choice=0, text="x" * 100_000, tokens=(SampledToken(120),))
        finally:
            ended.set()

    monkeypatch.setattr(front.service, "generate", endless)
    monkeypatch.setattr(http_generate, "DEADLINE_GRACE_S", 0.1)
    monkeypatch.setattr(http_exchange, "ERROR_SEND_TIMEOUT_S", 0.1)
    host, port = front.http.split(":")
    data = json.dumps({**BODY, "stream": True}).encode()
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(head_of(CHAT, len(data), "x-request-timeout-s: 0.2") + data)
        assert ended.wait(WAIT_S)
        assert front.run(front.frontend.drain(WAIT_S))


def test_uvloop_serves_both(start_front: Callable[..., Any]) -> None:
    front = start_front(loop=uvloop.new_event_loop())
    assert httpx.post(f"{front.url}{CHAT}", json=BODY, timeout=WAIT_S).status_code == 200
    with TandemClient(front.grpc) as client:
        assert client.generate("Hi").collect().text == front.service.text
    front.service.hang_at = 1
    post_raw(front, BODY).close()
    assert front.service.canceled.wait(WAIT_S)


def test_one_failing_prompt_ends_the_others(front: Any) -> None:
    front.service.error, front.service.fail_at = Unavailable("lost"), 4
    response = httpx.post(f"{front.url}/v1/completions", json={"model": "tiny", "prompt": ["a", "b"]}, timeout=WAIT_S)
    assert (response.status_code, response.json()["error"]["message"]) == (503, "lost")
    wait_until(lambda: front.service.running == 0)


def test_a_client_that_goes_away_while_it_sends_its_body_leaves_nothing(front: Any) -> None:
    host, port = front.http.split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(head_of(CHAT, 100) + b"{")
    assert front.run(front.frontend.drain(WAIT_S))
    assert front.service.requests == []


def test_an_error_event_ends_a_stream_without_done(front: Any) -> None:
    front.service.error, front.service.fail_at = Unavailable("the decode worker is lost"), 2
    response = httpx.post(f"{front.url}{CHAT}", json={**BODY, "stream": True}, timeout=WAIT_S)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.status_code == 200
    assert json.loads(events[-1])["error"]["code"] == "unavailable"
    assert "[DONE]" not in events


def test_an_unexpected_error_says_nothing_of_the_inside(front: Any, caplog: pytest.LogCaptureFixture) -> None:
    front.service.error = ValueError("secret")
    response = httpx.post(f"{front.url}{CHAT}", json=BODY, timeout=WAIT_S)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret" in caplog.text


def test_drain_lets_running_requests_finish_and_refuses_new_ones(front: Any) -> None:
    front.service.hang_at = 1
    connection = post_raw(front, BODY)
    assert front.service.hanging.wait(WAIT_S)
    drained = front.submit(front.frontend.drain(WAIT_S))
    wait_until(lambda: httpx.get(f"{front.url}/ready").status_code == 503)
    refused = httpx.post(f"{front.url}{CHAT}", json=BODY, timeout=WAIT_S)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert httpx.get(f"{front.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{front.url}/ready").json()["reason"] == "draining"
    assert not drained.done()
    connection.close()
    assert drained.result(WAIT_S) is True


def test_drain_gives_up_after_its_time(front: Any) -> None:
    front.service.hang_at = 0
    with post_raw(front, BODY):
        assert front.service.hanging.wait(WAIT_S)
        assert front.run(front.frontend.drain(0.01)) is False


@pytest.mark.parametrize("stream", [True, False])
def test_stop_tells_running_requests_and_frees_the_ports(front: Any, stream: bool) -> None:
    front.service.hang_at = 2
    with post_raw(front, {**BODY, "stream": stream}) as connection:
        assert front.service.hanging.wait(WAIT_S)
        front.run(front.frontend.stop())
        answer = connection.makefile("rb").read()
    assert b"the router is shutting down" in answer
    assert b"[DONE]" not in answer
    assert front.service.running == 0
    front.run(front.frontend.stop())
    for address in (front.http, front.grpc):
        host, port = address.split(":")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, int(port)), timeout=WAIT_S)


def test_a_taken_port_is_named_and_nothing_stays_bound(start_front: Callable[..., Any], front: Any) -> None:
    port = int(front.http.split(":")[1])
    with pytest.raises(OSError, match=f"127.0.0.1:{port} for HTTP"):
        start_front(http_port=port)
    port = int(front.grpc.split(":")[1])
    with pytest.raises(OSError, match=f"127.0.0.1:{port} for gRPC"):
        start_front(grpc_port=port)


def test_a_key_is_wanted_where_one_is_set(start_front: Callable[..., Any]) -> None:
    front = start_front(api_key="s3cret")
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "s3cret"}):
        response = httpx.post(f"{front.url}{CHAT}", json=BODY, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{front.url}/v1/models", headers=headers).status_code == 401
    good = {"authorization": "Bearer s3cret"}
    assert httpx.post(f"{front.url}{CHAT}", json=BODY, headers=good).status_code == 200
    assert {httpx.get(f"{front.url}{path}").status_code for path in ("/health", "/ready")} == {200}


def test_beyond_loopback_a_key_is_required(front: Any) -> None:
    with pytest.raises(ConfigError, match=r"host: '0\.0\.0\.0' is not allowed; allowed: a loopback address"):
        Frontend(front.service, ByteTokenizer(300), RouterConfig(host="0.0.0.0"), RouterMetrics())
    Frontend(front.service, ByteTokenizer(300), RouterConfig(host="0.0.0.0", insecure=True), RouterMetrics())
    Frontend(front.service, ByteTokenizer(300), RouterConfig(host="0.0.0.0", api_key="k" * 16), RouterMetrics())


IDLE = {"requests_inside": 0, "choices_waiting": {}}


def test_ready_says_why_not(front: Any) -> None:
    answer = httpx.get(f"{front.url}/ready").json()
    router = {"pid": os.getpid(), **IDLE, "client_keys": {"configured": 0, "file": None}}
    assert answer == {"ready": True, "reason": "", "workers": [], "router": router}
    front.service.ready = False
    response = httpx.get(f"{front.url}/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "no decode worker")


def test_no_model_yet_is_unavailable(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front.service.ready = False
    monkeypatch.setattr(front.service, "models", tuple)
    response = httpx.post(f"{front.url}{CHAT}", json=BODY)
    assert (response.status_code, response.json()["error"]["message"]) == (503, "no decode worker")


def test_metrics_count_what_the_door_refuses(front: Any) -> None:
    httpx.post(f"{front.url}{CHAT}", json={**BODY, "n": 0})
    httpx.post(f"{front.url}{CHAT}", json=BODY)
    response = httpx.get(f"{front.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    assert 'tandem:request_refusals_total{model_name="tiny",reason="invalid_request_error"} 1.0' in lines
    gaps = len("Héllo, wörld".encode()) - 1
    assert f'tandem:inter_token_latency_seconds_count{{model_name="tiny"}} {gaps}.0' in lines


def test_tokenize_and_back(front: Any) -> None:
    text = "naïve 🙂"
    tokens = httpx.post(f"{front.url}/tokenize", json={"model": "tiny", "prompt": text}).json()
    assert tokens == {"count": len(text.encode()), "max_model_len": 256, "tokens": list(text.encode())}
    back = httpx.post(f"{front.url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    chat = httpx.post(f"{front.url}/tokenize", json={"messages": BODY["messages"], "add_generation_prompt": False})
    assert bytes(chat.json()["tokens"]) == b"user: Hi\n"


@pytest.mark.parametrize(("chars", "on_loop"), [(4096, True), (4097, False), (100_000, False)])
def test_a_long_text_is_tokenized_off_the_loop(
    start_front: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, chars: int, on_loop: bool
) -> None:
    """A short one pays no change of threads."""
    front = start_front(max_body_bytes=2**20)
    encode, threads = front.tokenizer.encode, []

    def encode_there(text: str, *, add_special: bool) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(text, add_special=add_special)

    monkeypatch.setattr(front.tokenizer, "encode", encode_there)
    answer = httpx.post(f"{front.url}/tokenize", json={"prompt": "x" * chars}, timeout=WAIT_S).json()
    assert answer["count"] == chars
    assert [name == "front" for name in threads] == [on_loop]


def test_a_prompt_may_carry_any_character(front: Any) -> None:
    text = "\u0000\u2028🙂"
    response = httpx.post(f"{front.url}/v1/completions", json={"model": "tiny", "prompt": text})
    assert response.status_code == 200
    assert front.service.requests[0].prompt_token_ids == tuple(text.encode())


@pytest.mark.parametrize(
    ("changes", "prompt_tokens", "max_tokens"),
    [({}, 56, 200), ({"max_tokens": 200}, 56, 200), ({"min_tokens": 9}, 250, 6), ({}, 255, 1)],
)
def test_max_tokens_settled(front: Any, changes: dict[str, int], prompt_tokens: int, max_tokens: int) -> None:
    body = {"model": "tiny", "prompt": [65] * prompt_tokens, **changes}
    response = httpx.post(f"{front.url}/v1/completions", json=body)
    if changes.get("min_tokens", 0) > max_tokens:
        assert response.status_code == 400
    else:
        assert front.service.requests[0].sampling.max_tokens == max_tokens


def test_max_tokens_default(start_front: Callable[..., Any]) -> None:
    for configured, expected in ((None, 1024), (10, 10)):
        front = start_front(default_max_tokens=configured)
        front.service.models = lambda: (ModelCard(id="tiny", max_model_len=8192, created_unix_s=0),)
        httpx.post(f"{front.url}{CHAT}", json=BODY)
        assert front.service.requests[0].sampling.max_tokens == expected
