"""KV memory of a worker whose ranks have each a part of it, seen from outside as one: blocks of the whole model.

What a worker says to others, and what travels, does not hang on how it is split: two workers of different TP or PP hand
off as two of one rank do. Each block is gathered from the ranks' memories as it is read, and scattered to them as it is
written, along `kvtransfer.reshape`. The memory of a rank on another node is its own; its parts of blocks come and go
over a link (`remote_kv`), a batch of blocks in one passage; so do those of a GPU's (`link_kv`), but the leader's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ....kvtransfer.layout import KVLayout, KVSplit
from ....kvtransfer.mapped.segment import KVSegment
from ....kvtransfer.reshape import Reshape
from ....kvtransfer.store import BlockRead, KVStore
from .remote_kv import Asked

READS_AHEAD = 8
"""Batches that are on their way from other nodes at a time."""

_Copies = list[tuple[int, int, int, int]]
"""(rank, offset in its block, offset in the whole block, length), bytes."""


class PartBlocks(Protocol):
    """One rank's part of blocks, in memory that is not mapped here. What fails raises RankLost."""

    def ask(self, block_ids: Sequence[int], /) -> Asked:
        """Begins to read the part of each block; `take` ends that."""

    def take(self, asked: Asked, /) -> list[memoryview]:
        """The parts, in order of the blocks; waits for them."""

    def write(self, block_ids: Sequence[int], parts: Sequence[memoryview], /) -> None:
        """Overwrites the part of each block; they are there when this returns."""


class OwnBlocks:
    """`PartBlocks` of the rank in this process."""

    def __init__(self, store: KVStore) -> None:
        self._store = store

    def ask(self, block_ids: Sequence[int]) -> Asked:
        """Reads them now."""
        asked = Asked(len(block_ids))
        asked.parts = [memoryview(bytes(self._store.read_block(block_id))) for block_id in block_ids]
        return asked

    def take(self, asked: Asked) -> list[memoryview]:
        """What was read."""
        return asked.parts

    def write(self, block_ids: Sequence[int], parts: Sequence[memoryview]) -> None:
        """As `KVStore.write_blocks`."""
        self._store.write_blocks(block_ids, parts)


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
        if own is not None:
            self._remote[0] = OwnBlocks(own)
        self._begun = 0
        self.segments: dict[int, KVSegment] = {
            rank: KVSegment(split.rank_layout(rank), num_blocks)
            for rank in range(split.num_ranks)
            if rank not in self._remote
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
        self._check(block_ids)
        asked = self._ask(block_ids)
        return self._gathered(block_ids, asked)

    def begin_read(self, block_ids: Sequence[int]) -> BlockRead | None:
        """Where a part lies on another node: asks for it. In this node's memory nothing is to be begun."""
        if not self._remote or self._begun >= READS_AHEAD:
            return None
        self._check(block_ids)
        return _RemoteRead(self, tuple(block_ids))

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        self.write_blocks([block_id], [payload])

    def write_blocks(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> None:
        self._check(block_ids)
        views = [memoryview(payload).cast("B") for payload in payloads]
        for view in views:
            if len(view) != self.layout.block_bytes:
                raise ValueError(f"payload: {len(view)} bytes are not one block ({self.layout.block_bytes} bytes)")
        sent: dict[int, list[memoryview]] = {rank: [] for rank in self._remote}
        for block_id, view in zip(block_ids, views, strict=True):
            parts = self._parts(block_id)
            for rank in self._remote:
                parts[rank] = memoryview(bytearray(self._sizes[rank]))
                sent[rank].append(parts[rank])
            for rank, start, place, length in self._scatter:
                parts[rank][start : start + length] = view[place : place + length]
        for rank, blocks in self._remote.items():
            blocks.write(block_ids, sent[rank])

    def commit(self) -> None:
        """Has every page found now, so that no request waits for it."""
        for segment in self.segments.values():
            segment.commit()

    def close(self) -> None:
        """Closes the segments' descriptors; idempotent."""
        for segment in self.segments.values():
            segment.close()

    def _ask(self, block_ids: Sequence[int]) -> dict[int, Asked]:
        """All ranks of other nodes, before the first has answered."""
        return {rank: blocks.ask(block_ids) for rank, blocks in self._remote.items()}

    def _gathered(self, block_ids: Sequence[int], asked: Mapping[int, Asked]) -> list[memoryview]:
        """Whole blocks, once what was asked for has come."""
        came = {rank: self._remote[rank].take(blocks) for rank, blocks in asked.items()}
        found = []
        for index, block_id in enumerate(block_ids):
            parts, whole = self._parts(block_id), bytearray(self.layout.block_bytes)
            parts |= {rank: blocks[index] for rank, blocks in came.items()}
            for rank, start, place, length in self._gather:
                whole[place : place + length] = parts[rank][start : start + length]
            found.append(memoryview(whole).toreadonly())
        return found

    def _check(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks:
                raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")

    def _parts(self, block_id: int) -> dict[int, memoryview]:
        """Of the ranks of this node."""
        return {
            rank: segment.blocks[block_id * self._sizes[rank] : (block_id + 1) * self._sizes[rank]]
            for rank, segment in self.segments.items()
        }


class _RemoteRead(BlockRead):
    """Blocks whose parts on other nodes are on their way."""

    def __init__(self, store: RankedKVStore, block_ids: tuple[int, ...]) -> None:
        self._store, self._block_ids = store, block_ids
        self._asked: Mapping[int, Asked] | None = store._ask(block_ids)
        self._views: list[memoryview] = []
        store._begun += 1

    def views(self) -> list[memoryview]:
        if self._asked is not None and not self._views:
            self._views = self._store._gathered(self._block_ids, self._asked)
        return self._views

    def end(self) -> None:
        if self._asked is not None:
            self._asked = None
            self._views = []
            self._store._begun -= 1
