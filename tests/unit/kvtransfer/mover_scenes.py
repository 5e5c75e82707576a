"""Two workers whose KV their movers move, all on one event loop."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

from tandem.cluster.auth import MemberCredentials
from tandem.kvtransfer.mapped.fd_passing import SegmentServer
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.mover.process import Mover
from tandem.kvtransfer.mover.worker import KVMover
from tandem.kvtransfer.source import SourceDriver
from tandem.kvtransfer.ticket import Hello, Peer, Ticket
from tandem.kvtransfer.transport import KVFrames, KVTransport, PullRequest

SECRET = MemberCredentials(token="of these members")
PATIENCE_S = 20.0


class OnThisLoop:
    """In the place of the process: a mover on the test's own loop."""

    pid = 1

    def __init__(self) -> None:
        self.mover: Mover | None = None
        self.gone = False

    def kill(self) -> None:
        assert self.mover is not None
        self.mover.link.close()

    def wait(self, timeout_s: float | None = None) -> int:
        return 0


async def unattached_mover() -> tuple[KVMover, OnThisLoop]:
    link, its_link = socket.socketpair()
    gift, its_gift = socket.socketpair()
    running = OnThisLoop()

    def lost() -> None:
        running.gone = True
        its_gift.close()

    running.mover = Mover(its_gift, on_lost=lost)
    mover = KVMover(cast("subprocess.Popen[bytes]", running), gift)
    await running.mover.link.join(its_link)
    await mover._link.join(link)
    return mover, running


async def start_mover(store: MemoryKVStore, *, transport: str = "grpc", credentials: Any = SECRET) -> KVMover:
    mover, _ = await unattached_mover()
    try:
        await mover.attach(store, transport=transport, credentials=credentials)
    except BaseException:
        await mover.stop()
        raise
    return mover


class Scene:
    """A pair whose worker `p` serves, and whose worker `d` pulls, through movers."""

    def __init__(self, pair_class: Any, transport: str, **settings: Any) -> None:
        self.pair_class, self.transport, self.settings = pair_class, transport, settings

    async def start(self) -> None:
        later = Later()
        self.pair = pair = self.pair_class(transport=later, **self.settings)
        self.holding = await start_mover(pair.held, transport=self.transport)
        self.pulling = await start_mover(pair.pulled, transport=self.transport)
        later.to = self.pulling.transport
        self.segments = None
        offer = None
        if self.transport == "mapped":
            self.segments = SegmentServer(pair.held.segment)
            await self.segments.start()
            offer = self.segments.offer
        for block_id in range(pair.num_blocks):
            pair.held.segment.generations[block_id] = pair.generations[block_id] = 1
        pair.held.segment.publish(pair.peer.epoch)
        pair.source = SourceDriver(
            worker_id="p",
            epoch=pair.peer.epoch,
            fingerprint="fp",
            store=pair.held,
            generation_of=lambda block_id: pair.held.segment.generations[block_id],
            release=lambda key, outcome: pair._say("release", key, outcome),
            abort_prefill=lambda key: pair._say("abort_prefill", key),
            clock=pair.clock,
            offer=offer,
        )
        port = await self.holding.listen(pair.source, "127.0.0.1:0")
        pair.peer = Peer("p", pair.peer.epoch, f"127.0.0.1:{port}")

    async def stop(self) -> None:
        await self.pair.close()
        for mover in (self.pulling, self.holding):
            await mover.stop()
        if self.segments is not None:
            await self.segments.stop()


class Later(KVTransport):
    """A transport that is there when it is first used."""

    to: KVTransport

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        return await self.to.hello(peer, mine, timeout_s=timeout_s)

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        frames = self.to.pull(peer, request, timeout_s=timeout_s)
        try:
            async for came in frames:
                yield came
        finally:
            await frames.aclose()

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self.to.confirm(peer, ticket, timeout_s=timeout_s)

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self.to.abort(peer, ticket, timeout_s=timeout_s)

    async def close(self) -> None:
        await self.to.close()


def play(
    pair_class: Any, scene: Callable[[Scene], Awaitable[None]], *, transport: str = "grpc", **settings: Any
) -> Scene:
    async def run() -> Scene:
        there = Scene(pair_class, transport, **settings)
        await there.start()
        try:
            async with asyncio.timeout(2 * PATIENCE_S):
                await scene(there)
            there.pair.check()
        finally:
            await there.stop()
        return there

    return asyncio.run(run())
