"""KV memory of a worker whose ranks have each a part of it, seen from outside as one: blocks of the whole model.

What a worker says to others, and what travels, does not hang on how it is split: two workers of different TP or PP hand
off as two of one rank do. Each block is gathered from the ranks' memories as it is read, and scattered to them as it is
written, along `kvtransfer.reshape`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....kvtransfer.layout import KVLayout, KVSplit
from ....kvtransfer.mapped.segment import KVSegment
from ....kvtransfer.reshape import Reshape
from ....kvtransfer.store import KVStore

_Copies = list[tuple[int, int, int, int]]
"""(rank, offset in its block, offset in the whole block, length), bytes."""


class RankedKVStore(KVStore):
    """Blocks in host memory, in one segment for each rank."""

    def __init__(self, split: KVSplit, num_blocks: int) -> None:
        """Zeroed memory for `num_blocks` blocks on every rank."""
        self.split = split
        self.layout: KVLayout = split.layout
        self.num_blocks = num_blocks
        self.segments: tuple[KVSegment, ...] = tuple(
            KVSegment(split.rank_layout(rank), num_blocks) for rank in range(split.num_ranks)
        )
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
        parts, whole = self._parts(block_id), bytearray(self.layout.block_bytes)
        for rank, start, place, length in self._gather:
            whole[place : place + length] = parts[rank][start : start + length]
        return memoryview(whole).toreadonly()

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        view = memoryview(payload).cast("B")
        if len(view) != self.layout.block_bytes:
            raise ValueError(f"payload: {len(view)} bytes are not one block ({self.layout.block_bytes} bytes)")
        parts = self._parts(block_id)
        for rank, start, place, length in self._scatter:
            parts[rank][start : start + length] = view[place : place + length]

    def commit(self) -> None:
        """Has every page found now, so that no request waits for it."""
        for segment in self.segments:
            segment.commit()

    def close(self) -> None:
        """Closes the segments' descriptors; idempotent."""
        for segment in self.segments:
            segment.close()

    def _parts(self, block_id: int) -> Sequence[memoryview]:
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")
        return [
            segment.blocks[block_id * size : (block_id + 1) * size]
            for segment, size in zip(self.segments, self._sizes, strict=True)
        ]
