"""KV out of another worker's device memory: the protocol over real sockets, the device a test's own (`host_device`);
`tests/gpu` has the same with a GPU."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from host_device import DeviceStore
from mapped_ends import LAYOUT, NUM_BLOCKS, TOKEN, D, Holder, Reader, content, play, until
from tandem.kvtransfer.cuda_ipc import blocks
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.ticket import RefusalReason

SEVEN = [9, 3, 4, 1, 0, 8, 5]


@pytest.fixture
def held() -> Iterator[DeviceStore]:
    store = DeviceStore(LAYOUT, NUM_BLOCKS)
    yield store
    store.close()


@pytest.fixture
def mine() -> Iterator[DeviceStore]:
    store = DeviceStore(LAYOUT, NUM_BLOCKS)
    yield store
    store.close()


def tokens_of(store: MemoryKVStore, block_ids: list[int], num_tokens: int) -> list[bytes]:
    """Each token's bytes, over all layers and heads, in the order of the sequence."""
    layout, found = store.layout, []
    rows = LAYOUT.groups[0].num_layers * 2 * LAYOUT.groups[0].num_kv_heads
    each = layout.block_bytes // layout.block_size // rows
    for token in range(num_tokens):
        block = store.read_block(block_ids[token // layout.block_size])
        slot = token % layout.block_size
        starts = ((row * layout.block_size + slot) * each for row in range(rows))
        found.append(b"".join(block[start : start + each] for start in starts))
    return found


def test_blocks_are_copied_as_prefill_goes_on(held: DeviceStore, mine: DeviceStore) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        there.submit(holder.peer, 100)
        holder.source.on_advanced(key, 50)
        await until(lambda: len(mine.device_memory.copies) == 1)
        assert mine.device_memory.copies[0].source_ids == SEVEN[:3]
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(D)
        for index, block_id in enumerate(SEVEN):
            assert bytes(mine.read_block(index)) == content(block_id, 1)
        assert (stats.transport, stats.blocks, stats.bytes) == ("cuda_ipc", 7, 7 * LAYOUT.block_bytes)
        there.sink.on_first_step(D)
        await until(lambda: there.sink.counts().live == 0)
        assert holder.said == [("release", "r/0/p0", "confirmed")]
        assert len(mine.device_memory.peers) == there.transport.mapped_peers == 1

    play(scene, held=held, in_device=mine, required=True)
    assert mine.device_memory.peers[0].memory is None, "the reader's end unmaps it"


def test_a_block_handed_out_anew_under_a_copy_does_not_count(held: DeviceStore, mine: DeviceStore) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, [0, 1, 2, 3, 4, 5, 6])
        mine.device_memory.gate.clear()
        holder.source.on_advanced(key, 80)
        there.submit(holder.peer, 100)
        await until(lambda: len(mine.device_memory.copies) == 1)
        holder.source.on_preempted(key)
        holder.grant([2])  # to somebody else, who writes it while the device copies
        mine.device_memory.gate.set()
        await until(lambda: there.sink._puller.retries_of(D) == 1)
        holder.source.on_blocks(key, holder.grant([9, 8, 7, 10, 11, 12, 13]), 0)
        holder.source.on_done(key, TOKEN)
        assert (await there.ready(D)).retries == 1
        whole = [bytes(mine.read_block(index)) for index in range(7)]
        assert whole == [content(b, 1) for b in (9, 8, 7, 10, 11, 12, 13)]

    play(scene, held=held, in_device=mine)


def test_the_next_copy_is_begun_before_one_ends(
    held: DeviceStore, mine: DeviceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_done(key, TOKEN)
        mine.device_memory.gate.clear()
        there.submit(holder.peer, 100)
        await until(lambda: len(mine.device_memory.copies) == 2)
        assert [copy.source_ids for copy in mine.device_memory.copies] == [SEVEN[:2], SEVEN[2:4]]
        mine.device_memory.gate.set()
        stats = await there.ready(D)
        assert (stats.retries, stats.blocks) == (0, 7)
        assert len(mine.device_memory.copies) == 4
        assert [bytes(mine.read_block(i)) for i in range(7)] == [content(b, 1) for b in SEVEN]

    monkeypatch.setattr(blocks, "COPY_BYTES", 2 * LAYOUT.block_bytes + 1)
    play(scene, held=held, in_device=mine)
    assert mine.device_memory.most_under_way == 2


@pytest.mark.parametrize(("at", "kept"), [(1, 0), (3, 2)])
def test_a_copy_that_does_not_count_waits_for_the_one_beside_it(
    held: DeviceStore, mine: DeviceStore, monkeypatch: pytest.MonkeyPatch, at: int, kept: int
) -> None:
    """A block that is handed out anew under the first of two copies, or the second: what came before it is here."""

    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        mine.device_memory.gate.clear()
        holder.source.on_advanced(key, 80)
        there.submit(holder.peer, 100)
        await until(lambda: len(mine.device_memory.copies) == 2)
        holder.source.on_preempted(key)
        holder.grant([SEVEN[at]])
        mine.device_memory.gate.set()
        await until(lambda: there.sink._puller.retries_of(D) == 1)
        assert not any(copy.under_way for copy in mine.device_memory.copies)
        again = [2, 6, 7, 10, 11, 12, 13]
        holder.source.on_blocks(key, holder.grant(again), 0)
        holder.source.on_done(key, TOKEN)
        assert (await there.ready(D)).retries == 1
        expected = [content(block_id, 1) for block_id in SEVEN[:kept] + again[kept:]]
        assert [bytes(mine.read_block(i)) for i in range(7)] == expected

    monkeypatch.setattr(blocks, "COPY_BYTES", 2 * LAYOUT.block_bytes)
    play(scene, held=held, in_device=mine)


@pytest.mark.parametrize("at_a_time", [7, 4])
def test_an_abort_waits_for_the_copies_that_write_into_its_blocks(
    held: DeviceStore, mine: DeviceStore, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_done(key, TOKEN)
        mine.device_memory.gate.clear()
        there.submit(holder.peer, 100)
        await until(lambda: len(mine.device_memory.copies) == -(-7 // at_a_time))
        there.sink.abort("r", 0, 0)
        for _ in range(2 * blocks.LOOKS):
            await asyncio.sleep(0)
        assert ("writer_done", D) not in there.said
        mine.device_memory.gate.set()
        await until(lambda: ("writer_done", D) in there.said)
        assert not any(copy.under_way for copy in mine.device_memory.copies)
        assert bytes(mine.read_block(6)) == content(SEVEN[6], 1)

    monkeypatch.setattr(blocks, "COPY_BYTES", at_a_time * LAYOUT.block_bytes)
    play(scene, held=held, in_device=mine)


def test_a_holder_that_goes_ends_the_mapping_after_the_copy_and_its_pulls(held: DeviceStore, mine: DeviceStore) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_advanced(key, 50)
        mine.device_memory.gate.clear()
        there.submit(holder.peer, 100)
        await until(lambda: len(mine.device_memory.copies) == 1)
        await holder.segments.stop()
        await until(lambda: there.transport.mapped_peers == 0)
        (peer,) = mine.device_memory.peers
        assert peer.memory is not None, "a copy is under way"
        mine.device_memory.gate.set()
        await until(lambda: peer.memory is None)
        holder.source.on_done(key, TOKEN)
        await until(lambda: there.failure() is not None or there.stats is not None)
        # What is left comes over gRPC from a holder that lives: only its mapping went.
        assert (await there.ready(D)).transport == "grpc"
        assert [bytes(mine.read_block(i)) for i in range(7)] == [content(b, 1) for b in SEVEN]
        assert len(mine.device_memory.copies) == 1

    play(scene, held=held, in_device=mine)


@pytest.mark.parametrize("required", [True, False])
def test_a_copy_that_fails_costs_a_mapping_and_at_most_the_request(
    held: DeviceStore, mine: DeviceStore, required: bool
) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_done(key, TOKEN)
        mine.device_memory.broken = True
        there.submit(holder.peer, 100)
        if not required:
            stats = await there.ready(D)
            assert (stats.transport, stats.retries, there.transport.mapped_peers) == ("grpc", 1, 0)
            assert [bytes(mine.read_block(i)) for i in range(7)] == [content(b, 1) for b in SEVEN]
            return
        await until(lambda: there.failure() is not None)
        _, _, reason, message = there.failure()
        assert reason is RefusalReason.PEER_LOST
        assert "cannot be copied: an illegal memory access" in message
        assert there.said[0] == ("writer_done", D)
        assert there.sink.counts().live == 0

    play(scene, held=held, in_device=mine, required=required)
    assert mine.device_memory.peers[0].memory is None


def test_a_new_life_of_the_holder_is_mapped_anew(held: DeviceStore, mine: DeviceStore) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_done(key, TOKEN)
        await there.ready(there.submit(holder.peer, 100))
        other_store = DeviceStore(LAYOUT, NUM_BLOCKS)
        other = Holder(epoch=8, store=other_store)
        await other.start()
        try:
            other.grant(SEVEN)
            key = other.prefill(100, SEVEN)
            other.source.on_done(key, TOKEN)
            there.sink.on_first_step(D)
            await until(lambda: there.sink.counts().live == 0)
            await there.ready(there.submit(other.peer, 100, 1))
            assert [bytes(mine.read_block(i)) for i in range(7)] == [content(b, 2) for b in SEVEN]
            assert there.transport.mapped_peers == 2
        finally:
            await other.stop()
            other_store.close()

    play(scene, held=held, in_device=mine)


@pytest.mark.parametrize("block_size", [4, 32, 24])
@pytest.mark.parametrize("required", [False, True])
def test_blocks_of_another_size_are_put_together_by_the_device(
    held: DeviceStore, block_size: int, required: bool
) -> None:
    layout: KVLayout = replace(LAYOUT, block_size=block_size)
    mine = DeviceStore(layout, 32)

    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(101, SEVEN)
        there.submit(holder.peer, 101)
        for advanced in (20, 70):
            holder.source.on_advanced(key, advanced)
            await until(lambda: len(mine.device_memory.copies) > 0)
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(D)
        assert (stats.transport, stats.blocks) == ("cuda_ipc", layout.blocks_for(101))
        assert tokens_of(mine, list(range(26)), 101) == tokens_of(held, SEVEN, 101)

    try:
        play(scene, held=held, in_device=mine, required=required)
    finally:
        mine.close()


def test_memory_that_cannot_be_mapped_is_pulled_over_grpc(held: DeviceStore, mine: DeviceStore) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(there.submit(holder.peer, 100))
        assert stats.transport == "grpc"
        assert [bytes(mine.read_block(i)) for i in range(7)] == [content(b, 1) for b in SEVEN]

    mine.device_memory.refuses = "its GPU memory cannot be mapped: cuMemSetAccess: CUDA_ERROR_NOT_SUPPORTED (801)"
    play(scene, held=held, in_device=mine)


def test_a_reader_in_host_memory_pulls_a_devices_blocks_over_grpc(held: DeviceStore) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(there.submit(holder.peer, 100))
        assert stats.transport == "grpc"
        assert bytes(there.store.read_block(6)) == content(SEVEN[6], 1)

    before = len(os.listdir("/proc/self/fd"))
    play(scene, held=held)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_reader_on_a_device_maps_host_memory(mine: DeviceStore) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, SEVEN)
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(there.submit(holder.peer, 100))
        assert stats.transport == "mapped"
        assert [bytes(mine.read_block(i)) for i in range(7)] == [content(b, 1) for b in SEVEN]

    play(scene, in_device=mine, required=True)
