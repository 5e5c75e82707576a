"""A worker's KV moved by its mover: the same bytes, the same refusals, nothing written after the end.

Workers and movers are on one event loop here; that they are two processes is tested in tests/integration/test_mover.py.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from driver_scenes import TOKEN, D, P, same_content
from tandem.cluster.auth import OPEN, MemberCredentials
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.mapped.fd_passing import SegmentServer
from tandem.kvtransfer.mapped.segment import SegmentError
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.mover import process, worker
from tandem.kvtransfer.mover.process import Mover
from tandem.kvtransfer.mover.worker import KVMover, MoverLost
from tandem.kvtransfer.source import SourceDriver
from tandem.kvtransfer.ticket import HandoffRefused, Hello, Peer, RefusalReason, Ticket
from tandem.kvtransfer.transport import EndFrame, KVFrames, KVTransport, PullRequest, WrittenBlocks

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


@pytest.mark.parametrize("transport", ["grpc", "mapped"])
@pytest.mark.parametrize("checksum", [True, False])
def test_kv_goes_from_memory_to_memory(pair_class: Any, layout: KVLayout, transport: str, checksum: bool) -> None:
    async def scene(there: Scene) -> None:
        pair = there.pair
        pair.prefill(num_tokens=40)
        pair.submit(pair.ticket(num_tokens=40), first=5, cached_tokens=8)
        pair.source.on_advanced(P, 12)
        await asyncio.sleep(0)
        pair.source.on_advanced(P, 40)
        pair.source.on_done(P, TOKEN)
        await pair.hear("kv_ready", D, TOKEN)
        assert same_content(pair, layout, 10, start=2, to=5)
        assert not any(bytes(pair.pulled.read_block(i)).strip(b"\0") for i in (*range(7), 15)), "written elsewhere"
        assert (pair.stats.blocks, pair.stats.transport) == (8, transport)
        assert 0 <= pair.stats.transfer_s < PATIENCE_S
        pair.sink.on_first_step(D)
        await pair.until(lambda: pair.source.counts().live == pair.sink.counts().live == 0)
        pair.nothing_left()

    play(pair_class, scene, transport=transport, checksum=checksum)


def test_a_worker_that_hears_of_every_block_alone_hears_of_the_end(
    pair_class: Any, layout: KVLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, and the end, come while the worker still takes what it was told before."""
    monkeypatch.setattr(process, "TELL_BYTES", 1)

    async def scene(there: Scene) -> None:
        pair = there.pair
        pair.prefill(num_tokens=40)
        pair.source.on_advanced(P, 40)
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket(num_tokens=40), first=5)
        await pair.hear("kv_ready", D, TOKEN)
        assert same_content(pair, layout, 10, to=5)
        assert (pair.stats.blocks, pair.stats.retries) == (10, 0)

    play(pair_class, scene)


def test_a_failure_behind_blocks_that_are_not_told_yet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both come while the worker takes no item: one piece of news stands for two."""

    class Breaking:
        ended, untold_bytes = False, 0

        def __init__(self, *_: Any) -> None:
            self.news, self.go_on = asyncio.Event(), asyncio.Event()
            writers.append(self)

        async def run(self, _: Any) -> None:
            await self.write()
            await self.go_on.wait()
            await self.write()
            raise HandoffRefused(RefusalReason.WRONG_GENERATION, "handed out anew")

        async def write(self) -> None:
            self.untold_bytes = process.TELL_BYTES
            self.news.set()

        def tell(self) -> process.Progress:
            self.untold_bytes = 0
            return process.Progress(first_block=0, count=1, arrived_s=0.0, written_s=0.0, end=None)

    writers: list[Breaking] = []
    monkeypatch.setattr(process, "_Writer", Breaking)
    monkeypatch.setattr(process, "decode_pull", lambda body: body)
    mover: Any = SimpleNamespace(_memory=lambda: None, _peers=lambda: None)

    async def scene() -> None:
        items = Mover._pull(mover, b"")
        await anext(items)
        writers[0].go_on.set()
        await asyncio.sleep(0.01)  # written and broken, and nobody has asked for more
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(HandoffRefused, match="handed out anew"):
                await anext(items)

    asyncio.run(scene())


def test_a_pull_that_is_aborted_has_ended_before_its_blocks_are_free(pair_class: Any) -> None:
    async def scene(there: Scene) -> None:
        pair = there.pair
        pair.prefill(num_tokens=40)
        pair.source.on_advanced(P, 12)
        pair.submit(pair.ticket(num_tokens=40), first=5)
        await pair.until(lambda: pair.source.counts().readers == 1)
        pair.sink.abort("r", 0, 0)
        await pair.hear("writer_done", D)
        before = [bytes(pair.pulled.read_block(i)) for i in range(pair.num_blocks)]
        pair.source.on_advanced(P, 40)
        await pair.until(lambda: pair.source.counts().readers == 0)
        assert before == [bytes(pair.pulled.read_block(i)) for i in range(pair.num_blocks)]

    play(pair_class, scene)


def test_a_block_that_was_handed_out_anew_is_not_sent(pair_class: Any) -> None:
    """The generation in the memory is the mover's to see, whatever the worker still believes."""

    async def scene(there: Scene) -> None:
        pair = there.pair
        pair.prefill(num_tokens=8)
        asked = pair.source._check_generations
        pair.source._check_generations = lambda reader, refs: None
        pair.held.segment.generations[1] = 2
        pair.source.on_advanced(P, 8)
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket(num_tokens=8), timeout_s=0.5)
        await pair.until(lambda: any(what[0] == "failed" for what in pair.said))
        assert ("failed", D, RefusalReason.WRONG_GENERATION, True) in pair.said
        pair.source._check_generations = asked

    play(pair_class, scene, max_pull_retries=1)


@pytest.mark.parametrize("transport", ["grpc", "mapped"])
def test_refusals_come_through(pair_class: Any, transport: str) -> None:
    async def scene(there: Scene) -> None:
        pair = there.pair
        pair.submit(pair.ticket(num_tokens=8))
        pair.source.abort("r", 0, 0)
        await pair.until(lambda: any(what[0] == "failed" for what in pair.said))
        assert ("failed", D, RefusalReason.ABORTED, True) in pair.said

    play(pair_class, scene, transport=transport)


def test_a_mover_that_ends_is_the_end_of_its_pulls_and_is_told(pair_class: Any) -> None:
    async def scene(there: Scene) -> None:
        pair, told = there.pair, []
        there.pulling.on_lost = told.append
        pair.prefill(num_tokens=8)
        pair.submit(pair.ticket(num_tokens=8))
        await pair.until(lambda: pair.source.counts().readers == 1)
        there.pulling._process.kill()
        await pair.until(lambda: any(what[0] == "failed" for what in pair.said))
        assert ("failed", D, RefusalReason.PEER_LOST, True) in pair.said
        (error,) = told
        assert isinstance(error, MoverLost)

    play(pair_class, scene, max_pull_retries=1)


def test_a_stranger_is_refused_at_the_movers_port(pair_class: Any) -> None:
    async def scene(there: Scene) -> None:
        pair = there.pair
        stranger = await start_mover(MemoryKVStore(pair.held.layout, 4), credentials=OPEN)
        mine = Hello(protocol_version=2, worker_id="x", epoch=1, fingerprint="fp", layout=pair.held.layout.to_bytes())
        with pytest.raises(HandoffRefused, match="UNAUTHENTICATED"):
            await stranger.transport.hello(pair.peer, mine, timeout_s=PATIENCE_S)
        await stranger.stop()

    play(pair_class, scene)


def test_memory_that_others_were_given_is_lent_to_no_mover(layout: KVLayout) -> None:
    store = MemoryKVStore(layout, 4)
    store.segment.fileno()
    with pytest.raises(SegmentError, match="sealed"):
        store.segment.lend()

    async def attach() -> None:
        with pytest.raises(MoverLost, match="sealed"):
            await start_mover(store)

    asyncio.run(attach())


def test_more_blocks_than_were_wanted_are_written_nowhere(pair_class: Any) -> None:
    """The holder sends the whole ticket; who asked gave room for two blocks."""

    async def scene(there: Scene) -> None:
        pair = there.pair
        pair.prefill(num_tokens=16)
        pair.source.on_advanced(P, 16)
        pair.source.on_done(P, TOKEN)
        request = PullRequest(ticket=pair.ticket(num_tokens=16), first_block=0, into=(3, 4))

        async def pull() -> None:
            async for came in there.pulling.transport.pull(pair.peer, request, timeout_s=PATIENCE_S):
                assert isinstance(came, WrittenBlocks | EndFrame)

        with pytest.raises(HandoffRefused) as refused:
            await pull()
        assert refused.value.reason is RefusalReason.CORRUPT
        assert not bytes(pair.pulled.read_block(5)).strip(b"\0")

    play(pair_class, scene)


@pytest.mark.parametrize("kv_mover", ["auto", "process"])
def test_a_mover_that_cannot_map_the_memory_is_ended_and_only_who_insists_fails(
    pair_class: Any, monkeypatch: pytest.MonkeyPatch, kv_mover: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise SegmentError("no memory left")

    monkeypatch.setattr(process, "take", broken)

    async def scene() -> None:
        mover, running = await unattached_mover()
        store = pair_class(transport=Later()).held
        try:
            attach = worker.attach_mover(mover, kv_mover, store, transport="grpc", credentials=SECRET)
            if kv_mover == "process":
                with pytest.raises(MoverLost, match="no memory left"):
                    await attach
            else:
                said = await attach
                assert said.startswith("its own loop moves its KV, not a process beside it: ")
                assert "no memory left" in said
                async with asyncio.timeout(PATIENCE_S):
                    while not running.gone:  # noqa: ASYNC110  (nobody announces it)
                        await asyncio.sleep(0)
        finally:
            await mover.stop()

    asyncio.run(scene())


def test_who_is_given_a_mover(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto`: devices that compute, where a processor is left for it and memory can be shared with it."""
    spawned: list[str] = []

    async def spawn() -> str:
        spawned.append("mover")
        return "mover"

    monkeypatch.setattr(worker.KVMover, "spawn", spawn)
    monkeypatch.setattr(worker, "processors", lambda: 2)

    def made(kv_mover: str, *, computes: bool = True) -> bool:
        return asyncio.run(worker.spawn_mover(kv_mover, computes=computes)) is not None

    assert made("auto")
    assert made("process", computes=False)
    assert not made("thread")
    assert not made("auto", computes=False)
    monkeypatch.setattr(worker, "processors", lambda: 1)
    assert not made("auto")
    assert made("process")
    monkeypatch.setattr(worker, "have_shared_memory", lambda: False)
    with pytest.raises(OSError, match="kv_mover"):
        made("process")
    assert spawned == ["mover"] * 3
