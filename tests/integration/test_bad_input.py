"""Malformed requests through real sockets at a router with real workers: each gets its status and a message that says
what is wrong, and after each the cluster is as healthy as before.

What the checks of single fields say is in tests/unit/router; here is what a stranger could send, end to end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import SamplingParams

WAIT_S = 30
CHAT, COMPLETE, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
USER = {"role": "user", "content": "Hi"}
PROMPT = list(range(40, 80))
JSON = "Content-Type: application/json\r\n"
FULL_EVERY = 8
"""A whole request with its tokens checked after every so many bad ones; a light look after each."""


def chat(**changes: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [USER], **changes}).encode()


def complete(**changes: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 2, **changes}).encode()


def message(**changes: Any) -> bytes:
    return chat(messages=[{**USER, **changes}])


def raw_chat(text: str | bytes) -> bytes:
    """A chat body with one more member, written as it stands."""
    extra = text.encode() if isinstance(text, str) else text
    return b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], ' + extra + b"}"


DEEP_LIST, DEEP_OBJECT = "[" * 20_000 + "]" * 20_000, '{"a":' * 8_000 + "1" + "}" * 8_000

# (path, body, status, words of the message)
BODIES: list[tuple[str, bytes, int, str]] = [
    # types
    (CHAT, chat(temperature="hot"), 400, "temperature: 'hot' is not a number"),
    (CHAT, chat(temperature=[0]), 400, "temperature: [0] is not a number"),
    (CHAT, chat(temperature={"a": 1}), 400, "temperature: {'a': 1} is not a number"),
    (CHAT, chat(n=1.0), 400, "n: 1.0 is not an integer"),
    (CHAT, chat(n="1"), 400, "n: '1' is not an integer"),
    (CHAT, chat(stream="yes"), 400, "stream: 'yes' is not a boolean"),
    (CHAT, chat(stream=1), 400, "stream: 1 is not a boolean"),
    (CHAT, chat(model=None), 400, "model: is missing"),
    (CHAT, chat(model=["tiny"]), 400, "model: ['tiny'] is not a string"),
    (CHAT, chat(stop={"a": 1}), 400, "stop:"),
    (CHAT, chat(stop=[["x"]]), 400, "stop:"),
    (CHAT, chat(logit_bias="x"), 400, "logit_bias: 'x' is not an object"),
    (CHAT, chat(logit_bias={"a": 1}), 400, "logit_bias: 'a' is not a token id"),
    (CHAT, chat(messages={"role": "user"}), 400, "messages: {'role': 'user'} is not a list"),
    (CHAT, chat(messages=[[]]), 400, "messages[0]: [] is not an object"),
    (CHAT, chat(messages=[None]), 400, "messages[0]: null is not an object"),
    (CHAT, chat(stream=True, stream_options=[]), 400, "stream_options: [] is not an object"),
    # ranges, huge and negative numbers
    (CHAT, chat(temperature=-1), 400, "temperature: -1 is out of range"),
    (CHAT, chat(temperature=10**400), 400, "temperature: 1000"),
    (CHAT, chat(top_p=-0.0), 400, "top_p: -0.0 is out of range"),
    (CHAT, chat(top_k=-5), 400, "top_k: -5 is out of range"),
    (CHAT, chat(top_k=2**63), 400, "top_k: 9223372036854775808 is out of range"),
    (CHAT, chat(n=0), 400, "n: 0 is out of range"),
    (CHAT, chat(n=10**9), 400, "n: 1000000000 is out of range"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens: 0 is out of range"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens: -1 is out of range"),
    (CHAT, chat(max_tokens=2**64), 400, "max_tokens: 18446744073709551616 is out of range"),
    (CHAT, chat(max_tokens=10_000), 400, "maximum context length is 512 tokens"),
    (CHAT, chat(min_tokens=5, max_tokens=4), 400, "min_tokens:"),
    (CHAT, chat(seed=2**64), 400, "seed: 18446744073709551616 is out of range"),
    (CHAT, chat(seed=-(2**64)), 400, "seed: -18446744073709551616 is out of range"),
    (CHAT, chat(frequency_penalty=2.1), 400, "frequency_penalty: 2.1 is out of range"),
    (CHAT, chat(repetition_penalty=-1), 400, "repetition_penalty: -1 is out of range"),
    (CHAT, chat(logit_bias={"99999999": 1}), 400, "logit_bias: '99999999' is not a token id"),
    (CHAT, chat(stop_token_ids=[2**40]), 400, "stop_token_ids: 1099511627776 is not a token id"),
    (CHAT, chat(stop=["x"] * 1000), 400, "stop: has 1000 entries"),
    (CHAT, chat(stop="x" * 5000), 400, "stop: "),
    (CHAT, chat(logprobs=True, top_logprobs=1000), 400, "top_logprobs: 1000 is out of range"),
    (CHAT, raw_chat('"temperature": NaN'), 400, "NaN is not a JSON number"),
    (CHAT, raw_chat('"temperature": Infinity'), 400, "Infinity is not a JSON number"),
    (CHAT, raw_chat('"temperature": -Infinity'), 400, "-Infinity is not a JSON number"),
    (CHAT, raw_chat('"temperature": 1e400'), 400, "temperature: inf is out of range"),
    (CHAT, raw_chat('"max_tokens": 1e3'), 400, "max_tokens: 1000.0 is not an integer"),
    (CHAT, raw_chat('"n": ' + "9" * 10_000), 400, "not valid JSON"),
    (CHAT, raw_chat('"n": 0x10'), 400, "not valid JSON"),
    (CHAT, raw_chat('"n": 01'), 400, "not valid JSON"),
    # JSON itself
    (CHAT, b"", 400, "body: not valid JSON"),
    (CHAT, b" \r\n\t ", 400, "body: not valid JSON"),
    (CHAT, b"\x00", 400, "body: not valid JSON"),
    (CHAT, b"{", 400, "body: not valid JSON"),
    (CHAT, b"{}{}", 400, "body: not valid JSON"),
    (CHAT, b"{'model': 'tiny'}", 400, "body: not valid JSON"),
    (CHAT, b'{"model": "tiny",}', 400, "body: not valid JSON"),
    (CHAT, b"[]", 400, "body: is an array"),
    (CHAT, b"true", 400, "body: is a boolean"),
    (CHAT, b"1", 400, "body: is a number"),
    (CHAT, b"{}", 400, "model: is missing"),
    (CHAT, b'{"model": "tiny", "model": "tiny"}', 400, "the key 'model' comes twice"),
    (CHAT, raw_chat('"a": {"b": 1, "b": 2}'), 400, "the key 'b' comes twice"),
    (CHAT, b"\xef\xbb\xbf" + chat(), 400, "body: not valid JSON"),
    (CHAT, chat().decode().encode("utf-16"), 400, "body: not UTF-8 at byte 0"),
    (CHAT, raw_chat(b'"user": "\xc3\x28"'), 400, "body: not UTF-8"),
    (CHAT, raw_chat(b'"user": "\xed\xa0\x80"'), 400, "body: not UTF-8"),
    (CHAT, raw_chat(b'"user": "\xc0\xaf"'), 400, "body: not UTF-8"),
    (CHAT, raw_chat('"user": "\\ud800"'), 400, "lone surrogate"),
    (CHAT, raw_chat('"user": {"\\udc00": 1}'), 400, "lone surrogate"),
    (CHAT, raw_chat('"user": "\\x41"'), 400, "body: not valid JSON"),
    (CHAT, raw_chat('"user": "a\nb"'), 400, "body: not valid JSON"),
    (CHAT, raw_chat('"user": "a\x00b"'), 400, "body: not valid JSON"),
    (CHAT, DEEP_LIST.encode(), 400, "nested too deeply; allowed: 64 levels"),
    (CHAT, raw_chat(f'"a": {DEEP_LIST}'), 400, "nested too deeply"),
    (CHAT, raw_chat(f'"a": {DEEP_OBJECT}'), 400, "nested too deeply"),
    (CHAT, raw_chat(f'"temperature": {"[" * 200}{"]" * 200}'), 400, "nested too deeply"),
    (CHAT, raw_chat(f'"temperature": {"[" * 60}{"]" * 60}'), 400, "is not a number"),
    (CHAT, b"[" * 60_000, 400, "nested too deeply"),
    (CHAT, chat(user="x" * 70_000), 413, "allowed: 65536"),
    (COMPLETE, complete(prompt="x" * 70_000), 413, "allowed: 65536"),
    # messages
    (CHAT, chat(messages=[]), 400, "messages: is missing or empty"),
    (CHAT, chat(messages=[USER] * 4097), 413, "allowed: 65536"),
    (CHAT, message(role="root"), 400, "messages[0].role: 'root' is no role"),
    (CHAT, message(role=""), 400, "messages[0].role: '' is no role"),
    (CHAT, message(role=1), 400, "messages[0].role: 1 is not a string"),
    (CHAT, message(role="user\x00"), 400, "messages[0].role: 'user\\x00' is no role"),
    (CHAT, message(content=None), 400, "messages[0].content: is missing"),
    (CHAT, message(content=5), 400, "messages[0].content: 5 is no text"),
    (CHAT, message(content={"type": "text"}), 400, "messages[0].content: {'type': 'text'} is no text"),
    (CHAT, message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400, "'text'"),
    (CHAT, message(content=[{"type": "text", "text": 5}]), 400, "messages[0].content[0].text: 5 is not a string"),
    (CHAT, message(content=["Hi"]), 400, "messages[0].content[0]: 'Hi' is not an object"),
    (CHAT, message(content="x" * 3000), 400, "maximum context length is 512"),
    (CHAT, message(role="assistant", content=None, tool_calls=[1]), 400, "messages[0].tool_calls[0]"),
    (CHAT, message(role="assistant", tool_calls=[{"function": {"arguments": "{"}}]), 400, "arguments"),
    # prompts
    (COMPLETE, complete(prompt=None), 400, "prompt: is missing"),
    (COMPLETE, complete(prompt=""), 400, "prompt: the prompt is empty"),
    (COMPLETE, complete(prompt=[]), 400, "prompt: is an empty list"),
    (COMPLETE, complete(prompt=[-1]), 400, "prompt: -1 is not a token id"),
    (COMPLETE, complete(prompt=[512]), 400, "prompt: 512 is not a token id"),
    (COMPLETE, complete(prompt=[2**70]), 400, "is not a token id"),
    (COMPLETE, complete(prompt=[1] * 513), 400, "maximum context length is 512"),
    (COMPLETE, complete(prompt=[1] * 512), 400, "maximum context length is 512"),
    (COMPLETE, complete(prompt=[[1], "a"]), 400, "not of the kind of the first prompt"),
    (COMPLETE, complete(prompt=[[[1]]]), 400, "prompt: [1] is not a token id"),
    (COMPLETE, complete(prompt=["a"] * 1000), 400, "prompt: has 1000 prompts"),
    (COMPLETE, complete(best_of=2), 400, "best_of:"),
    (COMPLETE, complete(model="../../etc/passwd"), 404, "does not exist here; allowed: tiny"),
    (CHAT, chat(model="x" * 5000), 404, "does not exist here"),
    (TOKENIZE, b'{"prompt": 5}', 400, "prompt: 5 is not a string"),
    (DETOKENIZE, b'{"tokens": [-1]}', 400, "tokens: -1 is not a token id"),
    (DETOKENIZE, b'{"tokens": {"a": 1}}', 400, "tokens: {'a': 1} is not a list"),
]


def head(rest: str, *, line: str = f"POST {CHAT} HTTP/1.1", host: str = "Host: localhost\r\n") -> bytes:
    return f"{line}\r\n{host}{rest}\r\n".encode()


# (bytes on a connection, status or None where the server may only close, words of the message)
WIRE: dict[str, tuple[bytes, int | None, str]] = {
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "not a valid HTTP request"),
    "nul bytes": (b"\x00" * 100, 400, "not a valid HTTP request"),
    "an http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "not a valid HTTP request"),
    "an unknown method": (head("", line="BREW / HTTP/1.1"), 400, "not a valid HTTP request"),
    "a version of the future": (head("", line="GET / HTTP/9.9"), 400, "not a valid HTTP request"),
    "a target that is none": (head("", line="GET :: HTTP/1.1"), 400, "not a valid HTTP request"),
    "a target in latin-1": (b"GET /\xe4 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "not"),
    "a proxy's connect": (head("", line="CONNECT localhost:80 HTTP/1.1"), 400, "not a valid HTTP request"),
    "a header without colon": (head("nonsense\r\n"), 400, "not a valid HTTP request"),
    "a folded header": (head("a: b\r\n c\r\n"), None, ""),
    "a header with nul": (head("a: b\x00c\r\n"), 400, "not a valid HTTP request"),
    "a length that is a word": (head(f"{JSON}Content-Length: ten\r\n"), 400, "not a valid HTTP request"),
    "a negative length": (head(f"{JSON}Content-Length: -5\r\n"), 400, "not a valid HTTP request"),
    "a length beyond 64 bits": (head(f"{JSON}Content-Length: {10**30}\r\n"), 400, "not a valid HTTP request"),
    "two lengths": (head(f"{JSON}Content-Length: 5\r\nContent-Length: 6\r\n"), 400, "not a valid HTTP request"),
    "a length and chunks": (
        head(f"{JSON}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
        400,
        "not a valid HTTP request",
    ),
    "chunks of nonsense": (
        head(f"{JSON}Transfer-Encoding: chunked\r\n") + b"zz\r\nhello\r\n",
        400,
        "not a valid HTTP request",
    ),
    "a chunk longer than it says": (
        head(f"{JSON}Transfer-Encoding: chunked\r\n") + b"2\r\nhello\r\n",
        400,
        "not a valid HTTP request",
    ),
    "a chunk of 2^64 bytes": (
        head(f"{JSON}Transfer-Encoding: chunked\r\n") + b"ffffffffffffffffff\r\n",
        400,
        "not a valid HTTP request",
    ),
    "an unknown coding": (head(f"{JSON}Transfer-Encoding: gzip\r\n"), None, ""),
    "a body far too long": (head(f"{JSON}Content-Length: {2**40}\r\n"), 413, "allowed: 65536"),
    "headers too many": (head("a: b\r\n" * 1000), 431, "more than 128 headers"),
    "a header too long": (head(f"a: {'b' * 70_000}\r\n"), 431, "over 65536 bytes"),
    "a target too long": (head("", line=f"GET /{'x' * 70_000} HTTP/1.1"), 431, "over 65536 bytes"),
    "no host": (head(JSON, host=""), 400, "host: is missing"),
    "another host": (head(JSON, host="Host: evil.example\r\n"), 421, "host: 'evil.example'"),
    "no content type": (head("Content-Length: 2\r\n") + b"{}", 415, "content-type: is missing"),
    "a form": (
        head("Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 2\r\n") + b"{}",
        415,
        "allowed: application/json",
    ),
    "an upgrade with a body": (
        head(f"{JSON}Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n") + b"{}",
        400,
        "upgrade: a request with a body",
    ),
    "a wrong method": (head("", line=f"GET {CHAT} HTTP/1.1"), 405, "method not allowed; allowed: POST"),
    "an unknown route": (head("", line="GET /admin HTTP/1.1"), 404, "no such route"),
    "a route with dots": (head("", line="GET /v1/../../etc/passwd HTTP/1.1"), 404, "no such route"),
    "a model with percents": (head("", line="GET /v1/models/%00%ff%2e%2e HTTP/1.1"), 404, "does not exist here"),
    "a deadline that is none": (
        head(f"{JSON}x-request-timeout-s: -1\r\nContent-Length: {len(chat())}\r\n") + chat(),
        400,
        "x-request-timeout-s",
    ),
}

# What a client sends before it goes away without a word, or half-closes.
LEFT: dict[str, bytes] = {
    "nothing": b"",
    "half a head": b"POST /v1/chat",
    "a head": head(f"{JSON}Content-Length: 100\r\n"),
    "half a body": head(f"{JSON}Content-Length: 100\r\n") + b'{"model": ',
    "half a chunk": head(f"{JSON}Transfer-Encoding: chunked\r\n") + b"ff\r\n{",
    "a whole request": head(f"{JSON}Content-Length: {len(complete(max_tokens=400))}\r\n") + complete(max_tokens=400),
    "a stream": head(f"{JSON}Content-Length: {len(complete(max_tokens=400, stream=True))}\r\n")
    + complete(max_tokens=400, stream=True),
    "two requests": 2 * (head(f"{JSON}Content-Length: {len(complete(max_tokens=400))}\r\n") + complete(max_tokens=400)),
}


@dataclass
class Target:
    """The cluster under test, and what its router's process had before the first bad request."""

    cluster: Any
    wait: Callable[..., None]
    counted: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.check_answer()
        self.tasks, self.descriptors = self.router_tasks(), descriptors()

    def connect(self) -> socket.socket:
        host, port = self.cluster.router.http_address.split(":")
        return socket.create_connection((host, int(port)), timeout=WAIT_S)

    def exchange(self, data: bytes) -> bytes:
        """What comes back until the server closes or has answered whole."""
        with self.connect() as connection:
            connection.sendall(data)
            answer = b""
            try:
                while not whole(answer) and (part := connection.recv(65536)):
                    answer += part
            except ConnectionResetError:
                pass
        return answer

    def check_answer(self) -> None:
        """A good request gets the right tokens."""
        config = resolve_model("dummy:tiny-llama").config
        params = SamplingParams(max_tokens=6, temperature=0.0)
        wanted = expected_tokens(PROMPT, 6, params, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        answer = self.cluster.grpc.generate(token_ids=PROMPT, max_tokens=6, temperature=0).collect()
        assert answer.token_ids == list(wanted)

    def check_healthy(self) -> None:
        """After a bad request."""
        assert self.exchange(head("", line="GET /health HTTP/1.1")).startswith(b"HTTP/1.1 200")
        if next(self.counted) % FULL_EVERY == 0:
            self.check_answer()

    def router_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks())

        return self.cluster.router._host.call(count(), WAIT_S)

    def check_nothing_left(self) -> None:
        """No block, stream, task, connection, descriptor or byte of a body."""
        self.cluster.wait_clean()
        frontend = self.cluster.router.runtime.frontend
        self.wait(lambda: not frontend._http.connections, "connections to close")
        self.wait(lambda: frontend._door.bodies.held_bytes == 0, "bodies to be given back")
        self.wait(lambda: self.router_tasks() <= self.tasks, "the router's tasks to end")
        self.wait(lambda: descriptors() <= self.descriptors, "descriptors to close")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def whole(answer: bytes) -> bool:
    top, _, body = answer.partition(b"\r\n\r\n")
    length = next((line for line in top.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
    return length is not None and len(body) >= int(length.partition(b":")[2])


def error_of(answer: bytes) -> tuple[int, str]:
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)["error"]["message"]


@pytest.fixture(scope="module")
def target(module_split: Any, module_wait: Callable[..., None]) -> Target:
    return Target(module_split, module_wait)


@pytest.mark.parametrize(("path", "body", "status", "words"), BODIES, ids=range(len(BODIES)))
def test_a_bad_body_is_refused(target: Target, path: str, body: bytes, status: int, words: str) -> None:
    request = head(f"{JSON}Content-Length: {len(body)}\r\n", line=f"POST {path} HTTP/1.1") + body
    found, text = error_of(target.exchange(request))
    assert (found, words in text) == (status, True), text
    assert len(text) < 1000
    target.check_healthy()


@pytest.mark.parametrize("name", WIRE)
def test_bad_http_is_refused(target: Target, name: str) -> None:
    data, status, words = WIRE[name]
    answer = target.exchange(data)
    if status is not None:
        found, text = error_of(answer)
        assert (found, words in text) == (status, True), text
    else:
        assert not answer or answer.startswith(b"HTTP/1.1 4")
    target.check_healthy()


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("name", LEFT)
def test_a_client_that_goes_away_leaves_nothing(target: Target, name: str, half_closed: bool) -> None:
    """A half-closed connection is a client that went: HTTP/1.1 servers need not tell the two apart."""
    with target.connect() as connection:
        connection.sendall(LEFT[name])
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
            try:
                while connection.recv(65536):
                    pass
            except ConnectionResetError:
                pass
    target.check_healthy()
    target.check_nothing_left()


def test_nothing_is_left_of_all_of_them(target: Target) -> None:
    assert len(BODIES) + len(WIRE) + 2 * len(LEFT) >= 120
    target.check_answer()
    target.check_nothing_left()
