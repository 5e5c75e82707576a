"""What a client of the gRPC door may take and keep: bytes of messages, unread answers, pings, calls without end."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.types import SampledToken
from tandem.router import grpc_api
from tandem.router.body_budget import BodyBudget
from tandem.router.client import TandemClient, TandemError
from tandem.router.service import Delta, GenerateRequest
from waits import WAIT_S, wait_until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def test_messages_are_bounded_together_and_given_back(front: Any) -> None:
    door = front.frontend._door
    door.bodies = BodyBudget(300)
    front.service.hang_at = 0
    with TandemClient(front.grpc) as client:
        call = client.generate("x" * 200)

        def collect() -> None:
            with contextlib.suppress(TandemError):  # it is canceled below
                call.collect()

        running = threading.Thread(target=collect)
        running.start()
        assert front.service.hanging.wait(WAIT_S)
        assert door.bodies.held_bytes > 200
        with pytest.raises(TandemError) as caught:
            client.generate("y" * 200).collect()
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.retry_after_s == 1.0
        call.cancel()
        running.join(WAIT_S)
    wait_until(lambda: door.bodies.held_bytes == 0 and front.service.running == 0)


def test_a_client_that_does_not_read_is_ended_at_its_deadline(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the service makes meanwhile stays within HTTP/2's windows."""
    ended, made = threading.Event(), [0]

    async def endless(request: GenerateRequest, tap: Any) -> AsyncGenerator[Delta, None]:
        try:
            while True:
                made[0] += 1
                yield Delta(choice=0, text="x" * 100_000, tokens=(SampledToken(120),))
        finally:
            ended.set()

    monkeypatch.setattr(front.service, "generate", endless)
    monkeypatch.setattr(grpc_api, "DEADLINE_GRACE_S", 0.1)
    with grpc.insecure_channel(front.grpc) as channel:
        stub = channel.unary_stream("/tandem.v1.Tandem/Generate", request_serializer=None, response_deserializer=None)
        call = stub(pb.GenerateRequest(text="Hi").SerializeToString(), timeout=1.0)
        assert ended.wait(WAIT_S)
        call.cancel()
    assert made[0] < 500


def test_pings_without_end_lose_their_connection(front: Any) -> None:
    host, port = front.grpc.split(":")
    ping = struct.pack(">I", 8)[1:] + b"\x06\x00\x00\x00\x00\x00" + bytes(8)
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(PREFACE + ping * 50)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    assert b"too_many_pings" in answer


@pytest.mark.parametrize("timeout_s", [0.5])
def test_a_call_without_its_message_ends_with_its_deadline(front: Any, timeout_s: float) -> None:
    with grpc.insecure_channel(front.grpc) as channel:
        stub = channel.stream_stream("/tandem.v1.Tandem/Generate", request_serializer=None, response_deserializer=None)
        release = threading.Event()

        def never() -> Any:
            release.wait(WAIT_S)
            yield from ()

        with pytest.raises(grpc.RpcError) as caught:
            list(stub(never(), timeout=timeout_s))
        release.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert front.service.requests == []
