"""Blocks in which other processes have a part: nobody waits for them on the loop, and nobody has them let go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from conftest import LAYOUT, Pair
from tandem.cluster.types import SampledToken
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason
from tandem.kvtransfer.transport import BlockRun, PullRequest

D = "r/0/d0"
TOKEN = SampledToken(7, -0.5, ())
WAIT_S = 20.0


class FarStore(MemoryKVStore):
    """What is read or written comes when `gate` is open."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        super().__init__(layout, num_blocks)
        self.gate = threading.Event()
        self.waiting = threading.Event()
        """Set where somebody waits for it."""
        self._pool = ThreadPoolExecutor(1)

    async def fetch_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        return await asyncio.wrap_future(self._pool.submit(self._read, tuple(block_ids)))

    def begin_write(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> Future[None] | None:
        return self._pool.submit(self._write, tuple(block_ids), [bytes(payload) for payload in payloads])

    def _read(self, block_ids: Sequence[int]) -> list[memoryview]:
        self._wait()
        return [memoryview(bytes(view)) for view in self.read_blocks(block_ids)]

    def _write(self, block_ids: Sequence[int], payloads: Sequence[bytes]) -> None:
        self._wait()
        self.write_blocks(block_ids, payloads)

    def _wait(self) -> None:
        self.waiting.set()
        assert self.gate.wait(WAIT_S), "whoever would open it waits for this"


def far_pair() -> tuple[Pair, FarStore, FarStore]:
    pair = Pair(store_class=FarStore)
    assert isinstance(pair.held, FarStore)
    assert isinstance(pair.pulled, FarStore)
    return pair, pair.held, pair.pulled


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 3 * WAIT_S))


def finish_prefill(pair: Pair) -> None:
    pair.source.on_advanced("r/0/p0", 10)
    pair.source.on_done("r/0/p0", TOKEN)


async def turns(count: int = 20) -> None:
    """The loop goes on."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_the_loop_goes_on_while_they_are_read_and_written() -> None:
    async def scene() -> None:
        pair, held, pulled = far_pair()
        pair.prefill()
        finish_prefill(pair)
        pair.submit(pair.ticket())
        for store in (held, pulled):
            await pair.until(store.waiting.is_set)
            assert not pair.said
            store.gate.set()
        await pair.hear("kv_ready", D, TOKEN)
        for index in range(3):
            assert bytes(pulled.read_block(3 + index)) == bytes([index + 1]) * LAYOUT.block_bytes
        await pair.close()

    play(scene())


def test_what_is_let_go_of_while_it_is_read_is_not_sent() -> None:
    async def scene() -> None:
        pair, held, _ = far_pair()
        pair.prefill()
        finish_prefill(pair)
        pull = pair.source.open_pull(PullRequest(ticket=pair.ticket(), first_block=0))
        first = asyncio.ensure_future(anext(pull))
        await pair.until(held.waiting.is_set)
        pair.generations[0] = 2
        held.gate.set()
        run = await first
        assert isinstance(run, BlockRun)
        with pytest.raises(HandoffRefused, match="block 0 of r/0/p0 was handed out anew"):
            run.verify()
        await pull.aclose()
        await pair.close()

    play(scene())


def test_a_reader_that_is_stopped_while_it_reads_sends_nothing() -> None:
    async def scene() -> None:
        pair, held, _ = far_pair()
        pair.prefill()
        finish_prefill(pair)
        pull = pair.source.open_pull(PullRequest(ticket=pair.ticket(), first_block=0))
        first = asyncio.ensure_future(anext(pull))
        await pair.until(held.waiting.is_set)
        pair.source.abort("r", 0, 0)
        assert [said[:2] for said in pair.said] == [("release", "r/0/p0")], "who reads holds nothing up"
        held.gate.set()
        run = await first
        assert isinstance(run, BlockRun)
        with pytest.raises(HandoffRefused, match="was stopped"):
            run.verify()
        await pull.aclose()
        await pair.close()

    play(scene())


@pytest.mark.parametrize("how", ["abort", "deadline", "close"])
def test_what_is_being_written_is_not_let_go_of(how: str) -> None:
    async def scene() -> None:
        pair, held, pulled = far_pair()
        held.gate.set()
        pair.prefill()
        finish_prefill(pair)
        pair.submit(pair.ticket())
        await pair.until(pulled.waiting.is_set)
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
        pulled.gate.set()
        await pair.hear("writer_done", D)
        assert bytes(pulled.read_block(3)) == b"\x01" * LAYOUT.block_bytes, "it had been written by then"
        await pair.close()

    play(scene())


def test_a_write_that_has_not_begun_never_does() -> None:
    async def scene() -> None:
        pair, held, pulled = far_pair()
        busy = pulled.begin_write([0], [bytes(LAYOUT.block_bytes)])
        assert busy is not None
        held.gate.set()
        pair.prefill()
        finish_prefill(pair)
        pair.submit(pair.ticket())
        await pair.until(lambda: pulled._pool._work_queue.qsize() == 1)
        pair.sink.abort("r", 0, 0)
        await pair.hear("writer_done", D)
        assert not busy.done(), "nobody waited for what is before it"
        pulled.gate.set()
        await asyncio.wrap_future(busy)
        assert not any(pulled.read_block(3))
        await pair.close()

    play(scene())


def test_what_goes_wrong_there_fails_the_pull() -> None:
    async def scene() -> None:
        pair, held, pulled = far_pair()
        held.gate.set()
        pulled.gate.set()
        pulled.write_blocks = None  # type: ignore[method-assign, assignment]
        pair.prefill()
        finish_prefill(pair)
        pair.submit(pair.ticket())
        await pair.hear("failed", D, RefusalReason.INVALID, RefusalReason.INVALID.retryable)
        assert ("writer_done", D) in pair.said
        await pair.close()

    play(scene())
