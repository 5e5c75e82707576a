"""What one pull moves, a batch after another, and where each rank's part of a batch lies. Pure.

Legend: a *pair* is a route of `kvtransfer.reshape` between two workers, by its index there: one rank of the holder, one
of the reader. A batch covers the slots of some tokens; each pair carries its stretches of them as one message, in the
order of `Reshape.stretches`, without gaps. Both ends compute the same from the two workers' splits, so that only tokens
and block ids are told.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..layout import DTYPE_BYTES
from ..reshape import Reshape, Stretches
from ..wire import MAX_BLOCKS_PER_MESSAGE

Int64s = NDArray[np.int64]
BATCH_BYTES = 4 * 2**20
"""That one batch moves at most, over all pairs; a bigger block goes alone. Large enough for the few messages between
the two ends not to count, small enough for one batch to be gathered while another travels."""
_MAX_CACHED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Blocks are counted within the sequence."""

    first_token: int
    end_token: int
    source_blocks: range
    """Of the holder, that the tokens lie in."""
    target_blocks: range
    """Of the reader."""
    cleared_from: int | None = None
    """The slots from here on of the last of `target_blocks` come from nowhere: the reader's ranks clear them."""
    complete: int
    """Blocks of the reader that are complete when all before and this one are written, counted from 0."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A pair's part of a batch on one side: equal pieces of a rank's memory, one after another in the message."""

    row_bytes: int
    rows: Int64s
    """[n]: place in the memory, seen as rows of `row_bytes`."""

    @property
    def total_bytes(self) -> int:
        """Of the message."""
        return self.row_bytes * len(self.rows)


def moved_block_bytes(reshape: Reshape) -> int:
    """What a block of the holder is on all pairs together: heads that several ranks of the reader hold go to each."""
    target = reshape.target
    whole = sum(target.rank_layout(rank).block_bytes for rank in range(target.num_ranks))
    return whole // target.layout.block_size * reshape.source.layout.block_size


def batch_blocks(reshape: Reshape, batch_bytes: int = BATCH_BYTES) -> int:
    """Blocks of the holder that a batch may name."""
    return max(1, min(MAX_BLOCKS_PER_MESSAGE - 1, batch_bytes // moved_block_bytes(reshape)))


class PullPlan:
    """Cuts one pull into batches as the holder's blocks become readable."""

    def __init__(self, reshape: Reshape, *, first_block: int, num_tokens: int, batch_bytes: int = BATCH_BYTES) -> None:
        """`first_block`: of the reader's, that is wanted first."""
        self._theirs, self._mine = reshape.source.layout.block_size, reshape.target.layout.block_size
        self._num_tokens = num_tokens
        self._end = reshape.covered_tokens(num_tokens)
        self._blocks = reshape.target.layout.blocks_for(num_tokens)
        self._next = min(first_block * self._mine, self._end)
        self._most = batch_blocks(reshape, batch_bytes)
        self.first_source_block: int = min(first_block * self._mine, num_tokens) // self._theirs
        """Of the holder's, that is asked for first."""

    def batches(self, readable_blocks: int) -> Iterator[Batch]:
        """Those that the first `readable_blocks` of the holder's allow and that were not made before."""
        readable = min(readable_blocks * self._theirs, self._end)
        while self._next < readable:
            first = self._next
            cut = (first // self._theirs + self._most) * self._theirs
            end = self._next = min(cut, readable)
            targets = range(first // self._mine, -(-end // self._mine))
            partly = end == self._end < self._blocks * self._mine
            yield Batch(
                first_token=first,
                end_token=end,
                source_blocks=range(first // self._theirs, -(-end // self._theirs)),
                target_blocks=targets,
                cleared_from=end % self._mine if partly else None,
                complete=self._blocks if end == self._end else end // self._mine,
            )


class PairMap:
    """Where a pair's part of a batch lies in the memories of its two ranks. Keeps what it computed: batches of a pull
    are alike.
    """

    def __init__(self, reshape: Reshape, pair: int) -> None:
        """`pair`: index of the route."""
        self._reshape = reshape
        self._route = reshape.routes[pair]
        sizes = reshape.source.layout.block_size, reshape.target.layout.block_size
        self._period = math.lcm(*sizes)
        self._sizes = sizes
        self._block_bytes = (
            reshape.source.rank_layout(self._route.source_rank).block_bytes,
            reshape.target.rank_layout(self._route.target_rank).block_bytes,
        )
        self._target_layout = reshape.target.rank_layout(self._route.target_rank)
        self._found: OrderedDict[tuple[int, int], Stretches] = OrderedDict()

    def total_bytes(self, first_token: int, end_token: int) -> int:
        """Of the message."""
        return self._stretches(first_token, end_token).total_bytes

    def source_rows(self, first_token: int, end_token: int, block_ids: Sequence[int]) -> Rows:
        """In the holder's rank. `block_ids`: the blocks in which the tokens lie, in order."""
        found = self._stretches(first_token, end_token)
        return self._rows(found, found.source_block, found.source_offset, 0, first_token, block_ids)

    def target_rows(self, first_token: int, end_token: int, block_ids: Sequence[int]) -> Rows:
        """In the reader's rank."""
        found = self._stretches(first_token, end_token)
        return self._rows(found, found.target_block, found.target_offset, 1, first_token, block_ids)

    def cleared_rows(self, block_id: int, first_slot: int) -> Rows:
        """In the reader's rank: the slots of a block from `first_slot` on, of all that the rank holds."""
        layout, starts, lengths = self._target_layout, [], []
        for group, segment in zip(layout.groups, layout.segments(), strict=True):
            slot_bytes = group.head_dim * DTYPE_BYTES[group.dtype]
            plane_bytes = layout.block_size * slot_bytes
            planes = np.arange(segment.length_bytes // plane_bytes, dtype=np.int64)
            starts.append(segment.offset_bytes + planes * plane_bytes + first_slot * slot_bytes)
            lengths.append(np.full(len(planes), plane_bytes - first_slot * slot_bytes, dtype=np.int64))
        return _rows(block_id * layout.block_bytes + np.concatenate(starts), np.concatenate(lengths))

    def _stretches(self, first_token: int, end_token: int) -> Stretches:
        """Blocks are counted from the last one before `first_token` at which one begins on both sides."""
        key = first_token % self._period, end_token - first_token
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._reshape.stretches(self._route, key[0], key[0] + key[1])
            if len(self._found) > _MAX_CACHED:
                self._found.popitem(last=False)
        return found

    def _rows(
        self, found: Stretches, block: Int64s, offset: Int64s, side: int, first_token: int, block_ids: Sequence[int]
    ) -> Rows:
        size, block_bytes = self._sizes[side], self._block_bytes[side]
        before = first_token % self._period // size
        starts = np.asarray(block_ids, dtype=np.int64)[block - before] * block_bytes + offset
        return _rows(starts, found.length_bytes, block_bytes)


def _rows(starts: Int64s, lengths: Int64s, also: int = 0) -> Rows:
    """Stretches of a memory as its rows, as long as they may be. `also`: what they must divide besides."""
    row_bytes = int(np.gcd.reduce(np.concatenate([starts, lengths, [also]])))
    counts = lengths // row_bytes
    skipped = np.repeat(starts // row_bytes - (np.cumsum(counts) - counts), counts)
    return Rows(row_bytes, skipped + np.arange(len(skipped), dtype=np.int64))
