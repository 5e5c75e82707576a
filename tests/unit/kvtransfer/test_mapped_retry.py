"""Memory that cannot be had for a moment is tried for again; what will never be had is tried for once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

import pytest
from tandem.cluster.types import SampledToken
from tandem.kvtransfer.grpc_transport import GrpcKVTransport
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped import fd_passing, transport
from tandem.kvtransfer.mapped.fd_passing import SegmentServer
from tandem.kvtransfer.mapped.segment import KVSegment
from tandem.kvtransfer.mapped.transport import MappedKVTransport
from tandem.kvtransfer.ticket import HandoffRefused, Hello, Peer, RefusalReason, SegmentOffer
from tandem.kvtransfer.transport import EndFrame, KVFrames, PullRequest
from tickets import ticket_of

GROUP = KVGroup(name="all", num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32")
LAYOUT = KVLayout(block_size=4, groups=(GROUP,))
EPOCH = 7
PEER = Peer("p", EPOCH, "nowhere:1")
MINE = Hello(protocol_version=1, worker_id="d", epoch=1, fingerprint="fp", layout=LAYOUT.to_bytes())
TICKET = ticket_of(1, epoch=EPOCH)
END = EndFrame(
    ticket=TICKET,
    num_tokens=1,
    first_token=SampledToken(1, 0.0, ()),
    prefill_end_age_s=0.0,
    total_bytes=0,
    transport="grpc",
)


class Control:
    """gRPC to a holder that offers a segment and has everything to say in one frame."""

    def __init__(self, offer: SegmentOffer) -> None:
        self.offer = offer

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        return Hello(
            protocol_version=1,
            worker_id="p",
            epoch=EPOCH,
            fingerprint="fp",
            layout=LAYOUT.to_bytes(),
            offer=self.offer,
        )

    async def references(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        yield END

    pull = references

    async def close(self) -> None:
        """Nothing is open."""


async def came(there: MappedKVTransport) -> str:
    """How one pull came."""
    [end] = [frame async for frame in there.pull(PEER, PullRequest(ticket=TICKET, first_block=0), timeout_s=5)]
    assert isinstance(end, EndFrame)
    return end.transport


def play(
    scene: Callable[[SegmentServer, MappedKVTransport], Awaitable[None]],
    *,
    offer: SegmentOffer | None = None,
    **how: Any,
) -> None:
    async def run() -> None:
        owned = KVSegment(LAYOUT, 3)
        owned.publish(EPOCH)
        server = SegmentServer(owned, max_readers=0)
        await server.start()
        there = MappedKVTransport(cast(GrpcKVTransport, Control(offer or server.offer)), LAYOUT, **how)
        try:
            await scene(server, there)
        finally:
            await there.close()
            await server.stop()
            owned.close()

    asyncio.run(run())


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every try to have the descriptor."""
    made: list[str] = []

    async def fetch(offer: SegmentOffer, *, timeout_s: float) -> Any:
        made.append(offer.socket_name)
        return await fd_passing.fetch(offer, timeout_s=timeout_s)

    monkeypatch.setattr(transport, "fetch", fetch)
    monkeypatch.setattr(transport, "RETRY_FIRST_S", 0.01)
    return made


async def until_mapped(there: MappedKVTransport) -> None:
    async with asyncio.timeout(20):
        while await came(there) != "mapped":  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0.005)


def test_an_owner_that_had_no_place_is_asked_again_and_pulls_go_on_meanwhile(tries: list[str]) -> None:
    async def scene(server: SegmentServer, there: MappedKVTransport) -> None:
        await there.hello(PEER, MINE, timeout_s=5)
        assert (await came(there), there.mapped_peers) == ("grpc", 0)
        server._max_readers = 1
        await until_mapped(there)
        assert there.mapped_peers == server.readers == 1
        before = len(tries)
        assert await came(there) == "mapped"
        assert len(tries) == before

    play(scene)


def test_a_pause_between_tries_doubles(tries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RETRY_FIRST_S", 5.0)

    async def scene(server: SegmentServer, there: MappedKVTransport) -> None:
        await there.hello(PEER, MINE, timeout_s=5)
        for _ in range(3):
            assert await came(there) == "grpc"
            await there.hello(PEER, MINE, timeout_s=5)
        assert len(tries) == 1
        pauses = []
        for _ in range(5):
            await there._try_to_map(PEER, there._unmappable[PEER].theirs)
            pauses.append(there._unmappable[PEER].pause_s)
        assert pauses == [10.0, 20.0, 30.0, 30.0, 30.0]

    play(scene)


def test_where_it_is_demanded_what_may_pass_is_worth_another_attempt(tries: list[str]) -> None:
    async def scene(server: SegmentServer, there: MappedKVTransport) -> None:
        with pytest.raises(HandoffRefused, match=r"demanded.*turned this reader away") as refused:
            await there.hello(PEER, MINE, timeout_s=5)
        assert refused.value.reason is RefusalReason.PEER_LOST
        assert refused.value.retryable
        server._max_readers = 1
        await asyncio.sleep(0.02)
        await there.hello(PEER, MINE, timeout_s=5)
        assert await came(there) == "mapped"

    play(scene, required=True)


def test_a_process_without_a_descriptor_left_tries_again(tries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    none_left = OSError(24, "Too many open files")

    async def scene(server: SegmentServer, there: MappedKVTransport) -> None:
        server._max_readers = 1
        with monkeypatch.context() as patched:
            patched.setattr(fd_passing.socket, "socket", lambda *_: (_ for _ in ()).throw(none_left))
            await there.hello(PEER, MINE, timeout_s=5)
        assert (await came(there), there._unmappable[PEER].passing) == ("grpc", True)
        await until_mapped(there)

    play(scene)


def test_memory_of_another_host_is_tried_for_once(tries: list[str]) -> None:
    async def scene(server: SegmentServer, there: MappedKVTransport) -> None:
        for _ in range(3):
            await there.hello(PEER, MINE, timeout_s=5)
            assert await came(there) == "grpc"
            await asyncio.sleep(0.02)
        assert tries == ["tandem-kv-elsewhere"]

    play(scene, offer=SegmentOffer(socket_name="tandem-kv-elsewhere", nonce=b"n" * 16))


def test_where_it_is_demanded_memory_of_another_host_is_refused_for_good(tries: list[str]) -> None:
    async def scene(server: SegmentServer, there: MappedKVTransport) -> None:
        for _ in range(3):
            with pytest.raises(HandoffRefused, match="cannot be reached") as refused:
                await there.hello(PEER, MINE, timeout_s=5)
            assert refused.value.reason is RefusalReason.TRANSPORT_MISMATCH
            await asyncio.sleep(0.02)
        assert tries == ["tandem-kv-elsewhere"]

    play(scene, offer=SegmentOffer(socket_name="tandem-kv-elsewhere", nonce=b"n" * 16), required=True)
