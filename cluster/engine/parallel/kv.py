"""KV memory of a worker whose ranks have each a part of it, seen from outside as one: blocks of the whole model.

What a worker says to others, and what travels, does not hang on how it is split: two workers of different TP or PP hand
off as two of one rank do. Each block is gathered from the ranks' memories as it is read, and scattered to them as it is
written, along `kvtransfer.reshape`. The memory of a rank on another node is its own; its parts of blocks come and go
over a link (`remote_kv`), a batch of blocks in one passage; so do those of a GPU's (`link_kv`), but the leader's own.

Who has an event loop does not wait for a link on it (`fetch_blocks`, `begin_read`, `begin_write`): one thread does, for
one batch after another. A GPU's memory in this process is read and written at once, on the loop, as it is one thread's.
Blocks that are being read may be let go of, as their generations are compared once they have come; blocks that are
being written may not, and whoever lets them go waits for that first (`store.written`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ....kvtransfer.layout import KVLayout, KVSplit
from ....kvtransfer.mapped.segment import KVSegment
from ....kvtransfer.reshape import Reshape
from ....kvtransfer.store import BlockRead, KVStore
from .remote_kv import Asked

READS_AHEAD = 8
"""Batches that are begun and not sent yet: one is on its way from other processes, others wait or have come."""

_Copies = list[tuple[int, int, int, int]]
"""(rank, offset in its block, offset in the whole block, length), bytes."""
_Parts = dict[int, list[memoryview]]
"""By rank, its parts of some blocks."""


class PartBlocks(Protocol):
    """One rank's part of blocks, in memory that is not mapped here. What fails raises RankLost."""

    def ask(self, block_ids: Sequence[int], /) -> Asked:
        """Begins to read the part of each block; `take` ends that."""

    def take(self, asked: Asked, /) -> list[memoryview]:
        """The parts, in order of the blocks; waits for them."""

    def write(self, block_ids: Sequence[int], parts: Sequence[memoryview], /) -> None:
        """Overwrites the part of each block; they are there when this returns."""


class RankedKVStore(KVStore):
    """Blocks in host memory, in one segment for each rank of this node, or in the ranks' own."""

    def __init__(
        self,
        split: KVSplit,
        num_blocks: int,
        remote: Mapping[int, PartBlocks] | None = None,
        *,
        own: KVStore | None = None,
    ) -> None:
        """Zeroed memory for `num_blocks` blocks on every rank but those of `remote`, which have their own, and rank 0
        where `own` is its.
        """
        self.split = split
        self.layout: KVLayout = split.layout
        self.num_blocks = num_blocks
        self._remote: dict[int, PartBlocks] = dict(remote or {})
        self.own = own
        """The memory of the rank in this process, where it is no segment."""
        self._begun = 0
        self._beside = ThreadPoolExecutor(1, "KV of ranks")
        self.segments: dict[int, KVSegment] = {
            rank: KVSegment(split.rank_layout(rank), num_blocks)
            for rank in range(split.num_ranks)
            if rank not in self._remote and (rank or own is None)
        }
        """By rank."""
        self._sizes = [split.rank_layout(rank).block_bytes for rank in range(split.num_ranks)]
        whole = KVSplit(layout=split.layout)
        slots = split.layout.block_size
        out, into = Reshape(split, whole), Reshape(whole, split)
        self._gather: _Copies = []
        for route in out.routes:
            found = out.stretches(route, 0, slots)
            columns = (found.source_offset, found.target_offset, found.length_bytes)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            self._gather += [(route.source_rank, *row) for row in rows]
        self._scatter: _Copies = []
        for route in into.routes:
            found = into.stretches(route, 0, slots)
            columns = (found.target_offset, found.source_offset, found.length_bytes)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            self._scatter += [(route.target_rank, *row) for row in rows]

    def read_block(self, block_id: int) -> memoryview:
        return self.read_blocks([block_id])[0]

    def read_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        return self._read(block_ids, self._read_own(block_ids))

    async def fetch_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        if not self._remote:
            return self.read_blocks(block_ids)
        return await asyncio.wrap_future(self._begin(block_ids))

    def begin_read(self, block_ids: Sequence[int]) -> BlockRead | None:
        """Where a part lies with other processes: asks for it. In memory that is mapped here nothing is to be begun."""
        if not self._remote or self._begun >= READS_AHEAD:
            return None
        return _RemoteRead(self, block_ids)

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        self.write_blocks([block_id], [payload])

    def write_blocks(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> None:
        self._write(block_ids, self._scattered(block_ids, payloads))

    def begin_write(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> Future[None] | None:
        sent = self._scattered(block_ids, payloads)
        return self._beside.submit(self._write, tuple(block_ids), sent) if sent else None

    def commit(self) -> None:
        """Has every page found now, so that no request waits for it."""
        for segment in self.segments.values():
            segment.commit()

    def close(self) -> None:
        """Closes the segments' descriptors; idempotent. What waits for other ranks ends with their links."""
        self._beside.shutdown(wait=False, cancel_futures=True)
        for segment in self.segments.values():
            segment.close()

    def _begin(self, block_ids: Sequence[int]) -> Future[list[memoryview]]:
        """Has the thread read them, but for the part that lies here."""
        return self._beside.submit(self._read, tuple(block_ids), self._read_own(block_ids))

    def _read_own(self, block_ids: Sequence[int]) -> _Parts:
        self._check(block_ids)
        if self.own is None:
            return {}
        return {0: [memoryview(bytes(self.own.read_block(block_id))) for block_id in block_ids]}

    def _read(self, block_ids: Sequence[int], came: _Parts) -> list[memoryview]:
        """Whole blocks. `came`: parts that are read already. Other nodes are all asked before the first answers."""
        asked = {rank: blocks.ask(block_ids) for rank, blocks in self._remote.items()}
        came = came | {rank: self._remote[rank].take(blocks) for rank, blocks in asked.items()}
        found = []
        for index, block_id in enumerate(block_ids):
            parts, whole = self._parts(block_id), bytearray(self.layout.block_bytes)
            parts |= {rank: blocks[index] for rank, blocks in came.items()}
            for rank, start, place, length in self._gather:
                whole[place : place + length] = parts[rank][start : start + length]
            found.append(memoryview(whole).toreadonly())
        return found

    def _scattered(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> _Parts:
        """Writes the parts that lie here; the parts of the others."""
        self._check(block_ids)
        views = [memoryview(payload).cast("B") for payload in payloads]
        for view in views:
            if len(view) != self.layout.block_bytes:
                raise ValueError(f"payload: {len(view)} bytes are not one block ({self.layout.block_bytes} bytes)")
        sent: _Parts = {rank: [] for rank in range(self.split.num_ranks) if rank not in self.segments}
        for block_id, view in zip(block_ids, views, strict=True):
            parts = self._parts(block_id)
            for rank, blocks in sent.items():
                parts[rank] = memoryview(bytearray(self._sizes[rank]))
                blocks.append(parts[rank])
            for rank, start, place, length in self._scatter:
                parts[rank][start : start + length] = view[place : place + length]
        if self.own is not None:
            self.own.write_blocks(block_ids, sent.pop(0))
        return sent

    def _write(self, block_ids: Sequence[int], sent: _Parts) -> None:
        for rank, blocks in sent.items():
            self._remote[rank].write(block_ids, blocks)

    def _check(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks:
                raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")

    def _parts(self, block_id: int) -> dict[int, memoryview]:
        """In segments."""
        return {
            rank: segment.blocks[block_id * self._sizes[rank] : (block_id + 1) * self._sizes[rank]]
            for rank, segment in self.segments.items()
        }


class _RemoteRead(BlockRead):
    """Blocks whose parts in other processes are on their way."""

    def __init__(self, store: RankedKVStore, block_ids: Sequence[int]) -> None:
        self._store = store
        self._reading: Future[list[memoryview]] | None = store._begin(block_ids)
        store._begun += 1

    async def come(self) -> None:
        if self._reading is not None:
            await asyncio.wrap_future(self._reading)

    def views(self) -> list[memoryview]:
        assert self._reading is not None, "this read has ended"
        return self._reading.result()

    def end(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
            self._store._begun -= 1
