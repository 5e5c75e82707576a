"""A worker's KV moved by its mover: the same bytes, the same refusals, nothing written after the end.

Workers and movers are on one event loop here; that they are two processes is tested in tests/integration/test_mover.py.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from driver_scenes import TOKEN, D, P, same_content
from mover_scenes import PATIENCE_S, SECRET, Later, Scene, play, start_mover, unattached_mover
from tandem.cluster.auth import OPEN
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.mapped.segment import SegmentError
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.mover import process, worker
from tandem.kvtransfer.mover.process import Mover
from tandem.kvtransfer.mover.worker import MoverLost
from tandem.kvtransfer.ticket import HandoffRefused, Hello, RefusalReason
from tandem.kvtransfer.transport import EndFrame, PullRequest, WrittenBlocks


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
