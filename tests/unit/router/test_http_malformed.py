"""Malformed HTTP requests: each gets a status, OpenAI's error shape, and the name of the field that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
ABSENT = object()


def chat(**changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [USER], **changes}
    return {name: value for name, value in body.items() if value is not ABSENT}


def complete(**changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "Hi", **changes}
    return {name: value for name, value in body.items() if value is not ABSENT}


# (path, body, status, param, words in the message)
FIELDS: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (CHAT, chat(temperature="hot"), 400, "temperature", "'hot' is not a number; allowed: a number from 0 to 2"),
    (CHAT, chat(temperature=True), 400, "temperature", "True is not a number"),
    (CHAT, chat(temperature=-0.1), 400, "temperature", "-0.1 is out of range"),
    (CHAT, chat(temperature=2.01), 400, "temperature", "2.01 is out of range"),
    (CHAT, chat(top_p=0), 400, "top_p", "above 0 up to 1"),
    (CHAT, chat(top_p=1.5), 400, "top_p", "1.5 is out of range"),
    (CHAT, chat(presence_penalty=-2.5), 400, "presence_penalty", "from -2 to 2"),
    (CHAT, chat(frequency_penalty="x"), 400, "frequency_penalty", "not a number"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty", "out of range"),
    (CHAT, chat(min_p=1.1), 400, "min_p", "out of range"),
    (CHAT, chat(top_k=1.0), 400, "top_k", "1.0 is not an integer"),
    (CHAT, chat(top_k=-2), 400, "top_k", "out of range"),
    (CHAT, chat(n=0), 400, "n", "allowed: an integer from 1 to 4"),
    (CHAT, chat(n=5), 400, "n", "5 is out of range"),
    (CHAT, chat(n=True), 400, "n", "True is not an integer"),
    (CHAT, chat(n="2"), 400, "n", "'2' is not an integer"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", "0 is out of range"),
    (CHAT, chat(max_tokens=10**30), 400, "max_tokens", "out of range"),
    (CHAT, chat(max_completion_tokens=-1), 400, "max_completion_tokens", "-1 is out of range"),
    (CHAT, chat(max_completion_tokens=2.5), 400, "max_completion_tokens", "2.5 is not an integer"),
    (
        CHAT,
        chat(max_tokens=250),
        400,
        "max_tokens",
        "maximum context length is 256 tokens, but 20 in the prompt and 250",
    ),
    (CHAT, chat(min_tokens=-1), 400, "min_tokens", "out of range"),
    (CHAT, chat(min_tokens=9, max_tokens=8), 400, "min_tokens", "more than the 8 tokens"),
    (CHAT, chat(seed=1.5), 400, "seed", "1.5 is not an integer"),
    (CHAT, chat(seed=2**64), 400, "seed", "out of range"),
    (CHAT, chat(seed=-(2**63) - 1), 400, "seed", "out of range"),
    (CHAT, chat(stop=5), 400, "stop", "allowed: a string or a list of stop strings"),
    (CHAT, chat(stop=["a", 1]), 400, "stop", "1 is not a string"),
    (CHAT, chat(stop=""), 400, "stop", "'' has 0 characters"),
    (CHAT, chat(stop=["x"] * 17), 400, "stop", "has 17 entries; allowed: at most 16"),
    (CHAT, chat(stop="x" * 1025), 400, "stop", "1025 characters"),
    (CHAT, chat(stop_token_ids=[300]), 400, "stop_token_ids", "300 is not a token id of this model"),
    (CHAT, chat(stop_token_ids=[True]), 400, "stop_token_ids", "True is not a token id"),
    (CHAT, chat(stop_token_ids="1"), 400, "stop_token_ids", "not a list"),
    (CHAT, chat(logit_bias={"300": 1}), 400, "logit_bias", "'300' is not a token id"),
    (CHAT, chat(logit_bias={"-1": 1}), 400, "logit_bias", "'-1' is not a token id"),
    (CHAT, chat(logit_bias={"1": 101}), 400, "logit_bias", "101 is out of range"),
    (CHAT, chat(logit_bias={"1": None}), 400, "logit_bias", "null is not a number"),
    (CHAT, chat(logit_bias=[1]), 400, "logit_bias", "not an object"),
    (CHAT, chat(ignore_eos=1), 400, "ignore_eos", "1 is not a boolean"),
    (CHAT, chat(skip_special_tokens="no"), 400, "skip_special_tokens", "not a boolean"),
    (CHAT, chat(stream="true"), 400, "stream", "'true' is not a boolean"),
    (CHAT, chat(stream_options={}), 400, "stream_options", "given without stream"),
    (CHAT, chat(stream=True, stream_options=5), 400, "stream_options", "not an object"),
    (
        CHAT,
        chat(stream=True, stream_options={"include_usage": 1}),
        400,
        "stream_options.include_usage",
        "not a boolean",
    ),
    (CHAT, chat(logprobs=2), 400, "logprobs", "2 is not a boolean"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs", "without logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "from 0 to 20"),
    (CHAT, chat(model=ABSENT), 400, "model", "is missing"),
    (CHAT, chat(model=5), 400, "model", "5 is not a string"),
    (CHAT, chat(model="other"), 404, "model", "'other' does not exist here; allowed: tiny"),
    (CHAT, chat(messages=ABSENT), 400, "messages", "missing or empty"),
    (CHAT, chat(messages=[]), 400, "messages", "missing or empty"),
    (CHAT, chat(messages="Hi"), 400, "messages", "not a list"),
    (CHAT, chat(messages=["Hi"]), 400, "messages[0]", "'Hi' is not an object"),
    (CHAT, chat(messages=[USER, {"content": "x"}]), 400, "messages[1].role", "is missing"),
    (CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role", "'king' is no role"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content", "is missing"),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", "5 is no text"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0].type",
        "'image_url' is not supported; allowed: 'text'",
    ),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
        400,
        "messages[0].content[0].text",
        "null is not a string",
    ),
    (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}]), 400, "messages", "maximum context length is 256"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice", "'required' is not supported"),
    (CHAT, chat(functions=[{"name": "f"}]), 400, "functions", "not supported"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format", "not supported"),
    (CHAT, chat(response_format={"type": "json_schema", "json_schema": {}}), 400, "response_format", "not supported"),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities", "not supported"),
    (CHAT, chat(audio={"voice": "x"}), 400, "audio", "not supported"),
    (CHAT, chat(guided_json={"type": "object"}), 400, "guided_json", "not supported"),
    (COMPLETE, complete(prompt=ABSENT), 400, "prompt", "is missing"),
    (COMPLETE, complete(prompt=5), 400, "prompt", "5 is no prompt"),
    (COMPLETE, complete(prompt=""), 400, "prompt", "the prompt is empty"),
    (COMPLETE, complete(prompt=[]), 400, "prompt", "empty list"),
    (COMPLETE, complete(prompt=[[]]), 400, "prompt", "the prompt is empty"),
    (COMPLETE, complete(prompt=["a", [1]]), 400, "prompt", "not of the kind"),
    (COMPLETE, complete(prompt=[1, "a"]), 400, "prompt", "'a' is not a token id"),
    (COMPLETE, complete(prompt=[1, True]), 400, "prompt", "True is not a token id"),
    (COMPLETE, complete(prompt=[1.0]), 400, "prompt", "1.0 is not a token id"),
    (COMPLETE, complete(prompt=[-1]), 400, "prompt", "-1 is not a token id"),
    (COMPLETE, complete(prompt=[300]), 400, "prompt", "300 is not a token id"),
    (COMPLETE, complete(prompt=[None]), 400, "prompt", "null is not a token id"),
    (COMPLETE, complete(prompt=["a"] * 129), 400, "prompt", "129 prompts"),
    (COMPLETE, complete(prompt="x" * 256), 400, "prompt", "the prompt has 256"),
    (COMPLETE, complete(prompt=[1] * 257), 400, "prompt", "the prompt has 257"),
    (COMPLETE, complete(prompt="x" * 255, max_tokens=2), 400, "max_tokens", "at most 1 for this prompt"),
    (COMPLETE, complete(prompt=["ok", "x" * 300]), 400, "prompt", "the prompt has 300"),
    (COMPLETE, complete(logprobs=True), 400, "logprobs", "True is not an integer"),
    (COMPLETE, complete(logprobs=21), 400, "logprobs", "out of range"),
    (COMPLETE, complete(echo=True, logprobs=1), 400, "echo", "together with logprobs"),
    (COMPLETE, complete(echo="yes"), 400, "echo", "not a boolean"),
    (COMPLETE, complete(best_of=3), 400, "best_of", "the same as n, 1"),
    (COMPLETE, complete(suffix="end"), 400, "suffix", "'end' is not supported; allowed: leaving it out"),
    (COMPLETE, complete(max_completion_tokens=3), 400, "max_completion_tokens", "field of chat"),
    ("/tokenize", {"prompt": 5}, 400, "prompt", "5 is not a string"),
    ("/tokenize", {}, 400, "prompt", "neither it nor messages is given; allowed: exactly one of prompt"),
    ("/tokenize", {"messages": []}, 400, "messages", "missing or empty"),
    ("/tokenize", {"prompt": "x", "messages": [USER]}, 400, "prompt", "given together with messages"),
    ("/tokenize", {"model": "other", "prompt": "x"}, 404, "model", "does not exist"),
    ("/detokenize", {}, 400, "tokens", "is missing"),
    ("/detokenize", {"tokens": [300]}, 400, "tokens", "300 is not a token id"),
    ("/detokenize", {"tokens": "abc"}, 400, "tokens", "not a list"),
]

# (raw body, status, words)
RAW: list[tuple[bytes, int, str]] = [
    (b"", 400, "not valid JSON"),
    (b"{", 400, "not valid JSON"),
    (b"[1]", 400, "body: is an array"),
    (b'"x"', 400, "body: is a string"),
    (b"null", 400, "body: is null"),
    (b'{"model": "tiny", "messages": NaN}', 400, "NaN is not a JSON number"),
    (b'{"temperature": Infinity}', 400, "Infinity is not a JSON number"),
    (b'{"model": "tiny\xff"}', 400, "not UTF-8 at byte 15"),
    (b'{"model": "ti\x00ny"}', 400, "not valid JSON"),
    (b'{"model": "\\ud800"}', 400, "lone surrogate"),
    (b'{"model": "tiny", "n": 1e999, "user": "\\udfff"}', 400, "lone surrogate"),
    (b"[" * 50_000, 400, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    (b"\xef\xbb\xbf{}", 400, "not valid JSON"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400, "inf is out of"),
    (b'{"model": "' + b"x" * 70_000 + b'"}', 413, "allowed: 65536"),
]


@pytest.fixture(scope="module")
def http(shared_front: Any) -> Iterator[httpx.Client]:
    headers = {"x-request-id": "r1", "content-type": "application/json"}
    with httpx.Client(base_url=shared_front.url, timeout=20, headers=headers) as client:
        yield client


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"] == "r1"
    value = response.json()
    assert set(value) == {"error"}
    assert set(value["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = value["error"]
    return error


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), FIELDS)
def test_a_wrong_field_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = check_error(http.post(path, json=body), status)
    assert error["param"] == param
    assert words in error["message"]
    assert param is None or error["message"].startswith(f"{param}:")


@pytest.mark.parametrize(("body", "status", "words"), RAW, ids=range(len(RAW)))
def test_a_wrong_body_is_refused(http: httpx.Client, body: bytes, status: int, words: str) -> None:
    for path in (CHAT, COMPLETE):
        assert words in check_error(http.post(path, content=body), status)["message"] or path == COMPLETE


def test_nothing_malformed_reached_the_service(http: httpx.Client, shared_front: Any) -> None:
    http.post(CHAT, json=chat(n=0))
    assert shared_front.service.requests == []


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_deadline_that_is_none_is_refused(http: httpx.Client, value: str) -> None:
    error = check_error(http.post(CHAT, json=chat(), headers={"x-request-timeout-s": value}), 400)
    assert error["param"] == "x-request-timeout-s"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", CHAT, 405), ("DELETE", "/ready", 405)])
def test_a_wrong_method(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert check_error(response, status)["code"] == "method_not_allowed"
    assert response.headers["allow"] in {"POST", "GET, HEAD", "HEAD, GET"}


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/models/", "/v1/chat/completions/"])
def test_an_unknown_route(http: httpx.Client, path: str) -> None:
    response = http.post(path, json={}) if path != "/v1/models/" else http.get(path)
    error = check_error(response, 404)
    assert error["code"] in {"unknown_url", "model_not_found"}
    if error["code"] == "unknown_url":
        routes = error["message"].partition("allowed: ")[2].split(", ")
        assert {CHAT, COMPLETE, "/v1/models/{model}", "/tokenize", "/metrics", "/ready", "/health"} < set(routes)


def test_a_body_without_a_length_is_bounded_too(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1024

    response = http.post(CHAT, content=endless())
    assert check_error(response, 413)["code"] == "body_too_large"
    assert response.headers["connection"] == "close"


def test_a_body_far_over_the_limit_is_refused_unread(shared_front: Any) -> None:
    import socket

    host, port = shared_front.http.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        lines = ("Host: localhost", "Content-Type: application/json", "Content-Length: 99999999999")
        connection.sendall("\r\n".join((f"POST {CHAT} HTTP/1.1", *lines, "", "")).encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"
