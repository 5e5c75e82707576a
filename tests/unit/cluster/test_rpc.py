"""What all channels and servers have in common: epochs, refusals as statuses, and a port that belongs to one server."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc
import pytest
from grpc import aio
from tandem.cluster import rpc
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import (
    RegistryServicer,
    RegistryStub,
    add_RegistryServicer_to_server,
)
from tandem.cluster.rpc import NextFrame, Refusal, abort_with, make_server, new_epoch, open_channel


class Refusing(RegistryServicer):
    async def Heartbeat(self, request: pb.WorkerStatus, context: Any) -> pb.HeartbeatReply:
        await abort_with(context, Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"))


class Echo(RegistryServicer):
    async def Heartbeat(self, request: pb.WorkerStatus, context: Any) -> pb.HeartbeatReply:
        return pb.HeartbeatReply(router_id=request.worker_id)


async def serve(servicer: RegistryServicer, port: int = 0) -> tuple[aio.Server, int]:
    server = make_server()
    add_RegistryServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, bound


def test_epochs_are_never_zero_and_never_twice() -> None:
    epochs = {new_epoch() for _ in range(1000)}
    assert len(epochs) == 1000
    assert all(0 < epoch < 2**63 for epoch in epochs)


def test_a_refusal_is_a_status_with_its_message() -> None:
    async def run() -> None:
        server, port = await serve(Refusing())
        async with open_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(aio.AioRpcError) as error:
                await RegistryStub(channel).Heartbeat(pb.WorkerStatus(), timeout=20)
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        await server.stop(0)

    asyncio.run(run())


def test_two_servers_never_share_a_port() -> None:
    async def run() -> None:
        server, port = await serve(Echo())
        with pytest.raises(RuntimeError):
            make_server().add_insecure_port(f"127.0.0.1:{port}")
        await server.stop(0)

    asyncio.run(run())


def test_a_proxy_from_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def run() -> None:
        server, port = await serve(Echo())
        async with open_channel(f"127.0.0.1:{port}") as channel:
            reply = await RegistryStub(channel).Heartbeat(pb.WorkerStatus(worker_id="w"), timeout=20)
        assert reply.router_id == "w"
        await server.stop(0)

    asyncio.run(run())


def test_calls_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CONCURRENT_CALLS", 1)
    inside, leave = asyncio.Event(), asyncio.Event()

    class Slow(Echo):
        async def Heartbeat(self, request: pb.WorkerStatus, context: Any) -> pb.HeartbeatReply:
            inside.set()
            await leave.wait()
            return await super().Heartbeat(request, context)

    async def run() -> None:
        server, port = await serve(Slow())
        async with open_channel(f"127.0.0.1:{port}") as channel:
            stub = RegistryStub(channel)
            first = asyncio.ensure_future(stub.Heartbeat(pb.WorkerStatus(worker_id="w"), timeout=20))
            await inside.wait()
            with pytest.raises(aio.AioRpcError) as error:
                await stub.Heartbeat(pb.WorkerStatus(), timeout=20)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            leave.set()
            assert (await first).router_id == "w"
        await server.stop(0)

    asyncio.run(run())


def test_what_nobody_waits_for_leaves_once_and_soon_after_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        left = asyncio.Event()
        following = NextFrame(left.set)
        assert not following.waits(-math.inf), "no frame has left yet"
        assert not following.waits(time.monotonic() - 1.0)
        assert following.waits(time.monotonic())
        await asyncio.wait_for(left.wait(), 10)
        left.clear()
        following.cancel()
        monkeypatch.setattr(rpc, "SMALL_WAIT_S", 0.05)
        calls: list[int] = []
        following = NextFrame(lambda: calls.append(1))
        assert [following.waits(time.monotonic()) for _ in range(3)] == [True] * 3
        following.cancel()  # a frame leaves by itself
        following.cancel()
        await asyncio.sleep(0.1)
        assert calls == []
        following.waits(time.monotonic())
        following.waits(time.monotonic())
        await asyncio.sleep(0.1)
        assert calls == [1], "one timer for both"

    asyncio.run(run())
