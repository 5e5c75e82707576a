"""Blocks in which other processes have a part: nobody waits for them on the loop, and nobody has them let go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from driver_scenes import TOKEN, D, P, play, same_content
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason
from tandem.kvtransfer.transport import BlockRun, PullRequest

WAIT_S = 20.0


class FarStore(MemoryKVStore):
    """What is read or written comes when `gate` is open."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        super().__init__(layout, num_blocks)
        self.gate = threading.Event()
        self.waiting = threading.Event()
        """Set where somebody waits for it."""
        self.pool = ThreadPoolExecutor(1)

    async def fetch_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        return await asyncio.wrap_future(self.pool.submit(self._read, tuple(block_ids)))

    def begin_write(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> Future[None] | None:
        return self.pool.submit(self._write, tuple(block_ids), [bytes(payload) for payload in payloads])

    def _read(self, block_ids: Sequence[int]) -> list[memoryview]:
        self._wait()
        return [memoryview(bytes(view)) for view in self.read_blocks(block_ids)]

    def _write(self, block_ids: Sequence[int], payloads: Sequence[bytes]) -> None:
        self._wait()
        self.write_blocks(block_ids, payloads)

    def _wait(self) -> None:
        self.waiting.set()
        assert self.gate.wait(WAIT_S), "whoever would open it waits for this"


def begin(pair: Any, *, held: bool = False, pull: bool = True) -> None:
    """A prefill is done, and pulled; `held`: what is read comes at once."""
    if held:
        pair.held.gate.set()
    pair.prefill()
    pair.source.on_advanced(P, 10)
    pair.source.on_done(P, TOKEN)
    if pull:
        pair.submit(pair.ticket())


async def turns(count: int = 20) -> None:
    """The loop goes on."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_the_loop_goes_on_while_they_are_read_and_written(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        begin(pair)
        for store in (pair.held, pair.pulled):
            await pair.until(store.waiting.is_set)
            assert not pair.said
            store.gate.set()
        await pair.hear("kv_ready", D, TOKEN)
        assert same_content(pair, layout, 3)

    play(pair_class, scene, store_class=FarStore)


@pytest.mark.parametrize("how", ["handed out anew", "was stopped"])
def test_what_is_let_go_of_while_it_is_read_is_not_sent(pair_class: Any, how: str) -> None:
    async def scene(pair: Any) -> None:
        begin(pair, pull=False)
        pull = pair.source.open_pull(PullRequest(ticket=pair.ticket(), first_block=0))
        first = asyncio.ensure_future(anext(pull))
        await pair.until(pair.held.waiting.is_set)
        if how == "handed out anew":
            pair.generations[0] = 2
        else:
            pair.source.abort("r", 0, 0)
            assert [said[:2] for said in pair.said] == [("release", P)], "who reads holds nothing up"
        pair.held.gate.set()
        run = await first
        assert isinstance(run, BlockRun)
        with pytest.raises(HandoffRefused, match=how):
            run.verify()
        await pull.aclose()

    play(pair_class, scene, store_class=FarStore)


@pytest.mark.parametrize("how", ["abort", "deadline", "close"])
def test_what_is_being_written_is_not_let_go_of(pair_class: Any, layout: KVLayout, how: str) -> None:
    async def scene(pair: Any) -> None:
        begin(pair, held=True)
        await pair.until(pair.pulled.waiting.is_set)
        closing = None
        if how == "abort":
            pair.sink.abort("r", 0, 0)
        elif how == "deadline":
            pair.clock.advance(101)
            pair.sink.tick()
        else:
            closing = asyncio.create_task(pair.sink.close())
        await turns()
        pair.sink.abort("r", 0, 0)  # again, while it ends
        await turns()
        assert ("writer_done", D) not in pair.said
        assert closing is None or not closing.done()
        pair.pulled.gate.set()
        await pair.hear("writer_done", D)
        assert same_content(pair, layout, 1), "it had been written by then"

    play(pair_class, scene, store_class=FarStore)


def test_a_write_that_has_not_begun_never_does(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        busy = pair.pulled.begin_write([0], [bytes(layout.block_bytes)])
        begin(pair, held=True)
        await pair.until(lambda: pair.pulled.pool._work_queue.qsize() == 1)
        pair.sink.abort("r", 0, 0)
        await pair.hear("writer_done", D)
        assert not busy.done(), "nobody waited for what is before it"
        pair.pulled.gate.set()
        await asyncio.wrap_future(busy)
        assert not any(pair.pulled.read_block(3))

    play(pair_class, scene, store_class=FarStore)


def test_what_goes_wrong_there_fails_the_pull(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.pulled.gate.set()
        pair.pulled.write_blocks = None
        begin(pair, held=True)
        await pair.hear("failed", D, RefusalReason.INVALID, RefusalReason.INVALID.retryable)
        assert ("writer_done", D) in pair.said

    play(pair_class, scene, store_class=FarStore)
