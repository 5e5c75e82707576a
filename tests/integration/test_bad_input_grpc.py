"""Malformed calls through real sockets at the gRPC door of a router with real workers: each gets its status and a
message that says what is wrong, and after each the cluster is as healthy as before.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.types import SamplingParams

WAIT_S = 30
PROMPT = list(range(40, 80))
GENERATE, MODELS = "/tandem.v1.Tandem/Generate", "/tandem.v1.Tandem/ListModels"
FULL_EVERY = 6
INVALID, INTERNAL = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL
NAN, INF = float("nan"), float("inf")


def ask(*, model: str = "", prompt: dict[str, Any] | None = None, **sampling: Any) -> bytes:
    fields: dict[str, Any] = {"tokens": pb.TokenPrompt(token_ids=PROMPT)} if prompt is None else prompt
    options = pb.SamplingOptions(**{"max_tokens": 2, **sampling})
    data: bytes = pb.GenerateRequest(model=model, sampling=options, **fields).SerializeToString()
    return data


def tokens(*ids: int) -> dict[str, Any]:
    return {"tokens": pb.TokenPrompt(token_ids=ids)}


def messages(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=content) for role, content in pairs])}


def field(number: int, wire_type: int, payload: bytes) -> bytes:
    """One protobuf field, written by hand."""
    return bytes([number << 3 | wire_type]) + payload


def text_field(number: int, payload: bytes) -> bytes:
    return field(number, 2, bytes([len(payload)]) + payload)


# name: (method, request bytes, status, words of the message)
CALLS: dict[str, tuple[str, bytes, grpc.StatusCode, str]] = {
    "no bytes": (GENERATE, b"", INVALID, "prompt: is missing"),
    "random bytes": (GENERATE, b"\xde\xad\xbe\xef" * 10, INVALID, "not a tandem.v1.GenerateRequest"),
    "cut short": (GENERATE, ask()[:-1], INVALID, "not a tandem.v1.GenerateRequest"),
    "a length that lies": (GENERATE, b"\x12\xff\xff\xff\xff\x0f", INVALID, "not a tandem.v1.GenerateRequest"),
    "an endless varint": (GENERATE, b"\x08" + b"\xff" * 100, INVALID, "not a tandem.v1.GenerateRequest"),
    "a text that is not utf-8": (GENERATE, text_field(2, b"\xff\xfe"), INVALID, "not a tandem.v1.GenerateRequest"),
    "a lone surrogate": (GENERATE, text_field(2, b"\xed\xa0\x80"), INVALID, "not a tandem.v1.GenerateRequest"),
    "a group that never ends": (GENERATE, b"\x0b" * 500, INVALID, "not a tandem.v1.GenerateRequest"),
    "nesting without end": (GENERATE, b"\x2a\x02" * 200, INVALID, "not a tandem.v1.GenerateRequest"),
    "unknown fields alone": (GENERATE, field(15, 0, b"\x01") * 50, INVALID, "prompt: is missing"),
    "bytes where none are due": (MODELS, b"\xff\xff", INVALID, "not a tandem.v1.ListModelsRequest"),
    "an empty text": (GENERATE, ask(prompt={"text": ""}), INVALID, "text: the prompt is empty"),
    "a text too long": (GENERATE, ask(prompt={"text": "x" * 3000}), INVALID, "maximum context length is 512"),
    "no tokens": (GENERATE, ask(prompt=tokens()), INVALID, "tokens.token_ids: the prompt is empty"),
    "a token beyond the vocabulary": (GENERATE, ask(prompt=tokens(512)), INVALID, "512 is not a token id"),
    "the largest token": (GENERATE, ask(prompt=tokens(2**32 - 1)), INVALID, "4294967295 is not a token id"),
    "tokens too many": (GENERATE, ask(prompt=tokens(*[1] * 600)), INVALID, "maximum context length is 512"),
    "no messages": (GENERATE, ask(prompt=messages()), INVALID, "chat.messages: is missing or empty"),
    "a wrong role": (
        GENERATE,
        ask(prompt=messages(("king", "x"))),
        INVALID,
        "chat.messages[0].role: 'king' is no role",
    ),
    "a role with nul": (GENERATE, ask(prompt=messages(("user\0", "x"))), INVALID, "is no role"),
    "no role": (GENERATE, ask(prompt=messages(("", "x"))), INVALID, "chat.messages[0].role: '' is no role"),
    "a chat too long": (GENERATE, ask(prompt=messages(("user", "x" * 3000))), INVALID, "maximum context length"),
    "an unknown model": (GENERATE, ask(model="gpt"), grpc.StatusCode.NOT_FOUND, "model: 'gpt' does not exist here"),
    "temperature NaN": (GENERATE, ask(temperature=NAN), INVALID, "sampling.temperature: nan is out of range"),
    "temperature infinite": (GENERATE, ask(temperature=INF), INVALID, "sampling.temperature: inf is out of range"),
    "temperature negative": (GENERATE, ask(temperature=-1), INVALID, "sampling.temperature: -1.0 is out of range"),
    "top_p NaN": (GENERATE, ask(top_p=NAN), INVALID, "sampling.top_p: nan is out of range"),
    "top_k negative": (GENERATE, ask(top_k=-(2**31)), INVALID, "sampling.top_k: -2147483648 is out of range"),
    "penalty infinite": (GENERATE, ask(presence_penalty=-INF), INVALID, "sampling.presence_penalty: -inf"),
    "repetition zero": (GENERATE, ask(repetition_penalty=0), INVALID, "sampling.repetition_penalty: 0.0"),
    "bias NaN": (GENERATE, ask(logit_bias={1: NAN}), INVALID, "sampling.logit_bias"),
    "bias of no token": (GENERATE, ask(logit_bias={2**31: 1.0}), INVALID, "sampling.logit_bias"),
    "no output": (GENERATE, ask(max_tokens=0), INVALID, "sampling.max_tokens: 0 is out of range"),
    "output too long": (GENERATE, ask(max_tokens=2**32 - 1), INVALID, "sampling.max_tokens: 4294967295"),
    "output over the context": (GENERATE, ask(max_tokens=500), INVALID, "maximum context length is 512"),
    "min over max": (GENERATE, ask(min_tokens=3), INVALID, "sampling.min_tokens"),
    "no choices": (GENERATE, ask(n=0), INVALID, "sampling.n: 0 is out of range"),
    "choices too many": (GENERATE, ask(n=2**32 - 1), INVALID, "sampling.n: 4294967295 is out of range"),
    "logprobs too many": (GENERATE, ask(top_logprobs=21), INVALID, "sampling.top_logprobs: 21 is out of range"),
    "an empty stop": (GENERATE, ask(stop=[""]), INVALID, "sampling.stop: '' has 0 characters"),
    "stops too many": (GENERATE, ask(stop=["x"] * 99), INVALID, "sampling.stop: has 99 entries"),
    "stop ids of no token": (GENERATE, ask(stop_token_ids=[2**31]), INVALID, "sampling.stop_token_ids"),
    "a message too large": (
        GENERATE,
        ask(prompt={"text": "x" * 70_000}),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "larger than max",
    ),
    "an unknown method": ("/tandem.v1.Tandem/Erase", b"", grpc.StatusCode.UNIMPLEMENTED, ""),
    "an unknown service": ("/tandem.internal.v1.Worker/Prefill", ask(), grpc.StatusCode.UNIMPLEMENTED, ""),
    "a method that is a path": ("/../../etc/passwd", b"", grpc.StatusCode.UNIMPLEMENTED, ""),
}

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113 section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


# Bytes of a client that does not speak HTTP/2, or badly; the server only has to close or to wait for the rest.
WIRE: dict[str, bytes] = {
    "nothing": b"",
    "http/1.1": b"POST /tandem.v1.Tandem/Generate HTTP/1.1\r\nHost: x\r\n\r\n",
    "half a preface": PREFACE[:10],
    "no settings": PREFACE,
    "zeros": bytes(1000),
    "a frame too large": PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(20_000),
    "headers that are no hpack": PREFACE + SETTINGS + frame(1, 4, 1, b"\xff" * 50),
    "data before headers": PREFACE + SETTINGS + frame(0, 1, 1, b"x" * 50),
    "an even stream": PREFACE + SETTINGS + frame(1, 4, 2, b"\x82"),
    "a continuation of nothing": PREFACE + SETTINGS + frame(9, 4, 1, b"x"),
    "pings without end": PREFACE + SETTINGS + frame(6, 0, 0, bytes(8)) * 1000,
    "settings without end": PREFACE + SETTINGS * 2000,
    "resets without end": PREFACE + SETTINGS + frame(3, 0, 1, bytes(4)) * 1000,
}


class Target:
    """The cluster under test and a channel that sends bytes as they are."""

    def __init__(self, cluster: Any, wait: Callable[..., None]) -> None:
        self.cluster = cluster
        self.wait = wait
        self.channel = grpc.insecure_channel(cluster.router.grpc_address, options=[("grpc.max_metadata_size", 2**20)])
        self.count = itertools.count()

    def call(self, method: str, data: bytes, **options: Any) -> list[bytes]:
        stub = self.channel.unary_stream(method, request_serializer=None, response_deserializer=None)
        return list(stub(data, timeout=options.pop("timeout", WAIT_S), **options))

    def refused(self, method: str, data: bytes, **options: Any) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, data, **options)
        return caught.value

    def check_healthy(self) -> None:
        assert pb.ListModelsResponse.FromString(self.call(MODELS, b"")[0]).models[0].id == "tiny"
        if next(self.count) % FULL_EVERY == 0:
            self.check_answer()

    def check_answer(self) -> None:
        config = resolve_model("dummy:tiny-llama").config
        params = SamplingParams(max_tokens=6, temperature=0.0)
        wanted = expected_tokens(PROMPT, 6, params, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        answer = self.cluster.grpc.generate(token_ids=PROMPT, max_tokens=6, temperature=0).collect()
        assert answer.token_ids == list(wanted)

    def check_nothing_left(self) -> None:
        self.cluster.wait_clean()
        door = self.cluster.router.runtime.frontend._door
        self.wait(lambda: not door._tasks and not door.bodies.held_bytes, "requests to leave")


@pytest.fixture(scope="module")
def target(module_split: Any, module_wait: Callable[..., None]) -> Iterator[Target]:
    target = Target(module_split, module_wait)
    yield target
    target.channel.close()


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_refused(target: Target, name: str) -> None:
    method, data, code, words = CALLS[name]
    error = target.refused(method, data)
    assert (error.code(), words in (error.details() or "")) == (code, True), error.details()
    assert len(error.details() or "") < 1000
    target.check_healthy()


@pytest.mark.parametrize("name", WIRE)
def test_bad_http2_hurts_nobody(target: Target, name: str) -> None:
    host, port = target.cluster.router.grpc_address.split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(WIRE[name])
        with contextlib.suppress(OSError):  # the server may have cut it off already
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    target.check_healthy()


@pytest.mark.parametrize(
    "metadata",
    [
        [("x-long", "y" * 20_000)],
        [(f"x-{index}", "y" * 100) for index in range(500)],
        [("x-long", "y" * 500_000)],
    ],
    ids=["long", "many", "huge"],
)
def test_metadata_is_bounded(target: Target, metadata: list[tuple[str, str]]) -> None:
    size_bytes = sum(len(key) + len(value) for key, value in metadata)
    if size_bytes < 32 * 1024:
        assert target.call(GENERATE, ask(), metadata=metadata)
    else:
        assert target.refused(GENERATE, ask(), metadata=metadata).code() is not grpc.StatusCode.OK
    target.check_healthy()


@pytest.mark.parametrize("timeout_s", [0.0, 1e-6, -1.0])
def test_a_deadline_that_is_over(target: Target, timeout_s: float) -> None:
    error = target.refused(GENERATE, ask(max_tokens=400), timeout=timeout_s)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    target.check_healthy()
    target.check_nothing_left()


def test_no_message_or_two_where_one_is_due(target: Target) -> None:
    stub = target.channel.stream_stream(GENERATE, request_serializer=None, response_deserializer=None)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub(iter([]), timeout=0.5))
    # gRPC's own server waits for the message, and so long for the client's deadline.
    assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED)
    target.check_healthy()
    answers = [pb.GenerateResponse.FromString(data) for data in stub(iter([ask(), ask()]), timeout=WAIT_S)]
    assert answers[-1].usage.completion_tokens == 2  # the first is answered, the second never read
    target.check_healthy()
    target.check_nothing_left()


def test_a_client_that_cancels_or_vanishes_leaves_nothing(target: Target) -> None:
    for leave in ("cancel", "close"):
        channel = grpc.insecure_channel(
            target.cluster.router.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        stub = channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)
        call = stub(ask(max_tokens=400), timeout=WAIT_S)
        next(iter(call))
        call.cancel() if leave == "cancel" else channel.close()
        target.check_nothing_left()
        channel.close()
        target.check_healthy()


def test_nothing_is_left_of_all_of_them(target: Target) -> None:
    assert len(CALLS) + len(WIRE) + 10 >= 60
    target.check_answer()
    target.check_nothing_left()
