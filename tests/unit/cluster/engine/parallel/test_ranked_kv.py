"""KV memory in parts, seen as whole blocks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from rank_steps import LLAMA, NUM_BLOCKS, ranked_kv
from tandem.cluster.engine.devices.kv_memory import HostKVStore
from tandem.cluster.engine.parallel.kv import READS_AHEAD, RankedKVStore
from tandem.cluster.engine.parallel.messages import RankLost
from tandem.cluster.engine.parallel.remote_kv import Asked, RemoteBlocks, serve_blocks
from tandem.cluster.engine.parallel.shard import Shard
from tandem.kvtransfer.layout import KVSplit
from tandem.kvtransfer.mapped.segment import KVSegment
from tandem.kvtransfer.reshape import repack_reference
from tandem.kvtransfer.store import written


@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_blocks_go_to_their_ranks_and_come_back(tensor: int, stages: int) -> None:
    """With 4 ranks for 2 KV heads, both ranks of a head get it."""
    store = ranked_kv(LLAMA, tensor, stages)
    drawn = np.random.default_rng(0).integers(0, 256, (2, store.layout.block_bytes), dtype=np.uint8)
    for block_id, block in zip((3, 7), drawn, strict=True):
        store.write_block(block_id, block.tobytes())
    for block_id, block in zip((3, 7), drawn, strict=True):
        assert store.read_block(block_id) == block.tobytes()
    assert not any(store.read_block(4))
    expected = repack_reference(KVSplit(layout=store.layout), store.split, {0: drawn[:1]}, store.layout.block_size)
    for rank, segment in store.segments.items():
        size = store.split.rank_layout(rank).block_bytes
        assert bytes(segment.blocks[3 * size : 4 * size]) == expected[rank].tobytes()


def test_an_answer_that_comes_too_late_is_nobody_elses() -> None:
    """What is left of it in the link would be taken for the next block's bytes; the rank sees its link shut."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        blocks = RemoteBlocks(ours, 1, 8)
        ours.settimeout(0.05)
        with pytest.raises(RankLost, match="the KV of rank 1 cannot be read: timed out"):
            blocks.take(blocks.ask([0]))
        with contextlib.suppress(OSError):
            theirs.sendall(b"of block")
        for again in (lambda: blocks.ask([1]), lambda: blocks.write([1], [memoryview(bytes(8))])):
            with pytest.raises(RankLost, match="the KV of rank 1 cannot be read: timed out"):
                again()
        theirs.settimeout(5)
        assert theirs.recv(100)  # the request
        assert theirs.recv(100) == b""


def test_parts_on_other_nodes_are_read_and_written_there() -> None:
    """Ranks 1 and 3 of four have memory of their own."""
    whole = ranked_kv(LLAMA, 2, 2)
    served: dict[int, KVSegment] = {}
    remote: dict[int, RemoteBlocks] = {}
    links: list[socket.socket] = []
    for rank in (1, 3):
        layout = whole.split.rank_layout(rank)
        served[rank] = KVSegment(layout, NUM_BLOCKS)
        ours, theirs = socket.socketpair()
        links += [ours, theirs]
        arguments = (theirs, served[rank].blocks, layout.block_bytes, lambda: None)
        threading.Thread(target=serve_blocks, args=arguments, daemon=True).start()
        remote[rank] = RemoteBlocks(ours, rank, layout.block_bytes)
    store = RankedKVStore(whole.split, NUM_BLOCKS, remote)
    assert set(store.segments) == {0, 2}
    drawn = np.random.default_rng(1).integers(0, 256, (2, store.layout.block_bytes), dtype=np.uint8)
    for block_id, block in zip((3, 7), drawn, strict=True):
        store.write_block(block_id, block.tobytes())
        whole.write_block(block_id, block.tobytes())
    for block_id, block in zip((3, 7), drawn, strict=True):
        assert store.read_block(block_id) == block.tobytes()
    ahead = store.begin_read([7, 3])
    assert ahead is not None
    dropped = store.begin_read([3, 3])
    assert dropped is not None
    dropped.end()
    store.write_block(4, drawn[0].tobytes())
    whole.write_block(4, drawn[0].tobytes())
    assert store.read_blocks([4, 7]) == [drawn[0].tobytes(), drawn[1].tobytes()]
    assert ahead.views() == [drawn[1].tobytes(), drawn[0].tobytes()]
    ahead.end()
    ahead.end()
    many = [store.begin_read([3]) for _ in range(READS_AHEAD + 1)]
    assert [read is None for read in many] == [False] * READS_AHEAD + [True]
    for read in many[:-1]:
        assert read is not None
        assert read.views() == [drawn[0].tobytes()]
        read.end()
    assert whole.begin_read([3]) is None
    for rank, segment in (store.segments | served).items():
        assert bytes(segment.blocks) == bytes(whole.segments[rank].blocks)
    links[1].shutdown(socket.SHUT_RDWR)
    with pytest.raises(RankLost, match="the KV of rank 1 cannot be read"):
        store.read_block(3)
    with pytest.raises(RankLost, match="the KV of rank 1 cannot be read"):  # what it was lost by, ever after
        store.write_block(3, drawn[0].tobytes())
    for link in links:
        link.close()


class Slow:
    """The last rank's part, which answers when `gate` is open."""

    def __init__(self, store: RankedKVStore) -> None:
        self.store = store
        self.gate = threading.Event()
        self.asked: list[Sequence[int]] = []

    def ask(self, block_ids: Sequence[int]) -> Asked:
        self.asked.append(tuple(block_ids))
        return Asked(len(block_ids))

    def take(self, asked: Asked) -> list[memoryview]:
        self._wait()
        return [self._part(block_id) for block_id in self.asked.pop(0)]

    def write(self, block_ids: Sequence[int], parts: Sequence[memoryview]) -> None:
        self._wait()
        for block_id, part in zip(block_ids, parts, strict=True):
            self._part(block_id)[:] = part

    def _wait(self) -> None:
        if not self.gate.wait(10):
            raise RankLost("whoever would open the gate waits here")

    def _part(self, block_id: int) -> memoryview:
        rank = self.store.split.num_ranks - 1
        size = self.store.split.rank_layout(rank).block_bytes
        return self.store.segments[rank].blocks[block_id * size : (block_id + 1) * size]


@pytest.mark.parametrize("own", [False, True], ids=["segments", "a device's memory here"])
def test_an_event_loop_does_not_wait_for_other_ranks(own: bool) -> None:
    """It opens the gate itself."""

    async def scene() -> None:
        whole = ranked_kv(LLAMA, 2, 1)
        slow = Slow(whole)
        here = HostKVStore(whole.split.rank_layout(0), NUM_BLOCKS) if own else None
        store = RankedKVStore(whole.split, NUM_BLOCKS, {1: slow}, own=here)
        drawn = np.random.default_rng(2).integers(0, 256, (2, store.layout.block_bytes), dtype=np.uint8)
        payloads = [bytearray(block.tobytes()) for block in drawn]
        writing = store.begin_write([3, 7], payloads)
        assert writing is not None
        assert not writing.done()
        expected = [bytes(payload) for payload in payloads]
        for payload in payloads:
            payload[:] = bytes(len(payload))  # they have been taken
        fetched = asyncio.ensure_future(store.fetch_blocks([7, 3]))
        ahead, dropped = store.begin_read([3, 7]), store.begin_read([5])
        assert ahead is not None
        assert dropped is not None
        dropped.end()
        coming = asyncio.ensure_future(ahead.come())
        await asyncio.sleep(0)
        slow.gate.set()
        await written(writing)
        assert await fetched == expected[::-1]
        await coming
        assert ahead.views() == expected
        ahead.end()
        store.close()

    asyncio.run(scene())


def test_ranks_of_this_node_have_nobody_wait() -> None:
    store = ranked_kv(LLAMA, 2, 1)
    block = b"k" * store.layout.block_bytes
    assert store.begin_write([1], [block]) is None
    with pytest.raises(StopIteration) as returned:
        store.fetch_blocks([1]).send(None)
    assert returned.value.value == [block]


def test_a_rank_lays_its_blocks_out_as_it_computes() -> None:
    store = ranked_kv(LLAMA, 4, 2)
    for rank in range(8):
        local = Shard(config=LLAMA, tensor_parallel=4, pipeline_stages=2, rank=rank).local
        (group,) = store.split.rank_layout(rank).groups
        assert (group.num_layers, group.num_kv_heads) == (local.num_layers, local.num_kv_heads)


def test_what_is_no_block_is_refused() -> None:
    store = ranked_kv(LLAMA, 2, 1)
    with pytest.raises(ValueError, match=f"block_id: {NUM_BLOCKS} is not in 0…{NUM_BLOCKS - 1}"):
        store.read_block(NUM_BLOCKS)
    with pytest.raises(ValueError, match="payload: 3 bytes are not one block"):
        store.write_block(0, b"abc")
    store.commit()
    store.close()
    store.close()
