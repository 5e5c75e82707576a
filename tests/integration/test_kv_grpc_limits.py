"""Bounds of the gRPC KV service, in one process: open pulls, idle channels, deadlines, a server that stops."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterable

import grpc
import grpc.aio
import pytest
from tandem.kvtransfer import grpc_transport, wire
from tandem.kvtransfer.grpc_transport import GrpcKVServer, GrpcKVTransport
from tandem.kvtransfer.ticket import PROTOCOL_VERSION, HandoffRefused, Hello, Peer, RefusalReason, Ticket
from tandem.kvtransfer.transport import BlockFrame, BlockRun, EndFrame, KVSource, PullRequest
from tickets import ticket_of

BLOCK_BYTES = 64
LARGE_BLOCK_BYTES = 4 * grpc_transport.LOOKAHEAD_BYTES
TICKET = ticket_of(epoch=1, fingerprint="f")
REQUEST = PullRequest(ticket=TICKET, first_block=0)
HELLO = Hello(protocol_version=PROTOCOL_VERSION, worker_id="p", epoch=1, fingerprint="f", layout=b"")


class SilentSource(KVSource):
    """Accepts every pull and never has anything to send."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.closed = asyncio.Event()

    async def hello(self, theirs: Hello) -> Hello:
        return HELLO

    async def open_pull(self, request: PullRequest) -> AsyncGenerator[BlockRun | EndFrame, None]:
        self.opened.set()
        try:
            await asyncio.Event().wait()
            yield BlockRun(first_block=0, frames=(), refs=(), verify=lambda: None)
        finally:
            self.closed.set()

    async def confirm(self, ticket: Ticket) -> None:
        raise RuntimeError("a bug in the source")

    async def abort_ticket(self, ticket: Ticket) -> None:
        return None


async def drain(transport: GrpcKVTransport, peer: Peer, timeout_s: float = 30.0) -> RefusalReason:
    """Why a pull ended."""
    with pytest.raises(HandoffRefused) as refused:
        async for _ in transport.pull(peer, REQUEST, timeout_s=timeout_s):
            pass
    return refused.value.reason


def test_pulls_are_bounded_and_end_with_the_server() -> None:
    async def scene() -> None:
        source, transport = SilentSource(), GrpcKVTransport(block_bytes=BLOCK_BYTES)
        server = GrpcKVServer(source, block_bytes=BLOCK_BYTES, max_pulls=1)
        peer = Peer("p", 1, f"127.0.0.1:{await server.start()}")
        first = asyncio.create_task(drain(transport, peer))
        await asyncio.wait_for(source.opened.wait(), 30)
        assert server.pulls == 1
        assert await drain(transport, peer) is RefusalReason.LIMIT
        await server.stop()
        assert await asyncio.wait_for(first, 30) is RefusalReason.PEER_LOST
        await asyncio.wait_for(source.closed.wait(), 30)
        assert await drain(transport, peer) is RefusalReason.PEER_LOST
        await server.stop()
        await transport.close()
        await transport.close()

    asyncio.run(scene())


def test_a_deadline_ends_the_call_on_both_sides() -> None:
    async def scene() -> None:
        source, transport = SilentSource(), GrpcKVTransport(block_bytes=BLOCK_BYTES)
        server = GrpcKVServer(source, block_bytes=BLOCK_BYTES)
        peer = Peer("p", 1, f"127.0.0.1:{await server.start()}")
        assert await drain(transport, peer, timeout_s=0.2) is RefusalReason.DEADLINE
        await asyncio.wait_for(source.closed.wait(), 30)
        await transport.close()
        await server.stop()

    asyncio.run(scene())


class EndlessSource(SilentSource):
    """Has always more to send than a connection takes on its way; what comes first may be little."""

    def __init__(self, first_bytes: int) -> None:
        super().__init__()
        self.sizes = (first_bytes, LARGE_BLOCK_BYTES)

    async def open_pull(self, request: PullRequest) -> AsyncGenerator[BlockRun | EndFrame, None]:
        try:
            for index in itertools.count():
                payload = memoryview(bytes(self.sizes[min(index, 1)]))
                frame = BlockFrame(ticket=TICKET, block_index=index, generation=1, payload=payload, checksum=None)
                yield BlockRun(first_block=index, frames=(frame,), refs=(), verify=lambda: None)
        finally:
            self.closed.set()


async def all_of(call: AsyncIterable[bytes]) -> None:
    """Takes what comes until nothing more does."""
    async for _ in call:
        pass


@pytest.mark.parametrize("first_bytes", [BLOCK_BYTES, LARGE_BLOCK_BYTES])
def test_a_reader_that_takes_nothing_hears_that_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, first_bytes: int
) -> None:
    """Though a write is under way that it does not take: gRPC has room for one."""
    monkeypatch.setattr(grpc_transport, "MAX_PULL_S", 0.2)

    async def scene() -> None:
        source, transport = EndlessSource(first_bytes), GrpcKVTransport(block_bytes=LARGE_BLOCK_BYTES)
        server = GrpcKVServer(source, block_bytes=LARGE_BLOCK_BYTES)
        peer = Peer("p", 1, f"127.0.0.1:{await server.start()}")
        with transport._channel(peer) as channel:
            call = channel.unary_stream(f"/{grpc_transport.SERVICE}/Pull")(wire.encode_pull(REQUEST))
            await asyncio.wait_for(source.closed.wait(), 30)
            taken = asyncio.create_task(all_of(call))
            await asyncio.wait((taken,), timeout=30)
            assert isinstance(error := taken.exception(), grpc.aio.AioRpcError)
            assert (error.code(), error.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the pull took too long")
        await transport.close()
        await server.stop()

    asyncio.run(scene())


def test_a_bug_in_the_source_is_a_lost_peer_not_a_hang() -> None:
    async def scene() -> None:
        source, transport = SilentSource(), GrpcKVTransport(block_bytes=BLOCK_BYTES)
        server = GrpcKVServer(source, block_bytes=BLOCK_BYTES)
        peer = Peer("p", 1, f"127.0.0.1:{await server.start()}")
        with pytest.raises(HandoffRefused) as refused:
            await transport.confirm(peer, TICKET, timeout_s=30)
        assert refused.value.reason is RefusalReason.PEER_LOST
        await transport.abort(peer, TICKET, timeout_s=30)
        await transport.close()
        await server.stop()

    asyncio.run(scene())


def test_idle_channels_are_bounded() -> None:
    async def scene() -> None:
        transport = GrpcKVTransport(block_bytes=BLOCK_BYTES, max_channels=1)
        servers = [GrpcKVServer(SilentSource(), block_bytes=BLOCK_BYTES) for _ in range(3)]
        for server in servers:
            peer = Peer("p", 1, f"127.0.0.1:{await server.start()}")
            assert await transport.hello(peer, HELLO, timeout_s=30) == HELLO
            assert len(transport._channels) == 1
        await transport.close()
        for server in servers:
            await server.stop()

    asyncio.run(scene())


def test_a_port_that_is_taken_is_an_error() -> None:
    async def scene() -> None:
        server = GrpcKVServer(SilentSource(), block_bytes=BLOCK_BYTES)
        port = await server.start()
        with pytest.raises(RuntimeError):
            await GrpcKVServer(SilentSource(), port=port, block_bytes=BLOCK_BYTES).start()
        await server.stop()

    asyncio.run(scene())
