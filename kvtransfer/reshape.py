"""Which bytes of KV go from which rank of one worker to which rank of another, where the two differ in TP, PP or block
size. Pure: nothing is moved here.

Legend: a block of a rank is `[layer, 2, kv_head, slot, head_dim]` for each group of its layout (`KVSplit.rank_layout`).
A *route* joins a source rank and a target rank. It has *pieces*: layers and heads of one group that this source sends
this target. A *stretch* of a route is contiguous in a block of both; no two stretches of a route could be one.

1. A layer of a head that one source rank holds comes from there. Where several hold the same head (more ranks than KV
   heads), those that want it are spread over those that have it: each target is given its own sources, and where there
   are more sources than targets, a target's layers are shared out among its sources. So every byte arrives exactly once
   at every rank that holds it, and ranks with the same heads send about the same.
2. Block sizes cut the tokens: a run of slots ends where a block of either side ends. Runs of a head are apart in
   memory unless both sides hold whole blocks of the same size; then heads, keys and values, and layers join as far as
   both have them side by side. The same shape on both sides is one stretch a block.
3. The last block is partly empty. Stretches may cover its empty slots (whole blocks are fewer stretches), as far as
   both sides have them; the target clears what is left (`covered_tokens`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .layout import DTYPE_BYTES, KVGroup, KVSplit

Int64s = NDArray[np.int64]
Bytes2D = NDArray[np.uint8]
Holders = list[list[int]]
"""The places within a stage that hold each head."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Layers and KV heads of one group, counted in the whole model."""

    group: str
    layers: range
    heads: range


@dataclass(frozen=True, slots=True)
class Route:
    """What one rank of the source sends to one rank of the target."""

    source_rank: int
    target_rank: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Stretches:
    """Copies, all arrays [n], ordered by where they go. Blocks are counted within the sequence; offsets are bytes
    within a block of the rank.
    """

    source_block: Int64s
    source_offset: Int64s
    target_block: Int64s
    target_offset: Int64s
    length_bytes: Int64s

    def __len__(self) -> int:
        return len(self.length_bytes)

    @property
    def total_bytes(self) -> int:
        """Of all stretches."""
        return int(self.length_bytes.sum())


@dataclass(frozen=True, slots=True)
class _Runs:
    """Slots that lie in one block of both sides, [n]: first slot in each, and how many."""

    source_block: Int64s
    source_slot: Int64s
    target_block: Int64s
    target_slot: Int64s
    slots: Int64s


class Reshape:
    """The map from one split to another. ValueError where the two do not hold the same KV."""

    def __init__(self, source: KVSplit, target: KVSplit) -> None:
        if source.layout.groups != target.layout.groups:
            theirs, ours = source.layout.groups, target.layout.groups
            raise ValueError(f"groups: {theirs} and {ours} are not the same layers, heads and dtypes")
        self.source = source
        self.target = target
        self.routes: tuple[Route, ...] = _routes(source, target)
        """By target rank, then source rank."""

    def covered_tokens(self, num_tokens: int) -> int:
        """How far stretches for a sequence of `num_tokens` go: to the end of the blocks of the side that has fewer
        slots in them. Slots of the target's last block from here on are the target's to clear.
        """
        ends = [split.layout.blocks_for(num_tokens) * split.layout.block_size for split in (self.source, self.target)]
        return min(ends)

    def stretches(self, route: Route, first_token: int, end_token: int) -> Stretches:
        """Copies of a route for the slots of tokens `first_token` … `end_token` - 1, whole or not."""
        runs = self._runs(first_token, end_token)
        parts = [self._piece(route, piece, runs) for piece in route.pieces]
        table = np.concatenate(parts, axis=1)
        return _merged(table[:, np.lexsort((table[3], table[2]))])

    def _runs(self, first_token: int, end_token: int) -> _Runs:
        ours, theirs = self.source.layout.block_size, self.target.layout.block_size
        if not 0 <= first_token <= end_token:
            raise ValueError(f"first_token: {first_token} is not in 0…{end_token}")
        inner = [np.arange(-(-first_token // size) * size, end_token, size, dtype=np.int64) for size in (ours, theirs)]
        cuts = np.unique(np.concatenate([*inner, np.array([first_token, end_token], dtype=np.int64)]))
        starts = cuts[:-1]
        return _Runs(starts // ours, starts % ours, starts // theirs, starts % theirs, np.diff(cuts))

    def _piece(self, route: Route, piece: Piece, runs: _Runs) -> Int64s:
        """Stretches of one piece, not yet joined with others': [5, n], rows as the fields of `Stretches`."""
        group = next(group for group in self.source.layout.groups if group.name == piece.group)
        here = _Place.of(self.source, group, route.source_rank)
        there = _Place.of(self.target, group, route.target_rank)
        size = self.source.layout.block_size
        same = size == self.target.layout.block_size
        whole = (runs.slots == size) & same
        parts = [self._copies(group, piece, here, there, runs, np.flatnonzero(~whole), joined=1)]
        if whole.any():
            every_head = len(piece.heads) == len(here.heads) == len(there.heads)
            joined = len(piece.heads) * (2 * len(piece.layers) if every_head else 1)
            parts.append(self._copies(group, piece, here, there, runs, np.flatnonzero(whole), joined=joined))
        return np.concatenate(parts, axis=1)

    def _copies(
        self, group: KVGroup, piece: Piece, here: _Place, there: _Place, runs: _Runs, which: Int64s, *, joined: int
    ) -> Int64s:
        """One copy for each of the runs `which` and every `joined` planes (a plane: one layer's keys or values of one
        head) that lie side by side.
        """
        layers, sides, heads = (
            axis.ravel()
            for axis in np.meshgrid(np.array(piece.layers), np.arange(2), np.array(piece.heads), indexing="ij")
        )
        slot_bytes = group.head_dim * DTYPE_BYTES[group.dtype]
        sizes = self.source.layout.block_size, self.target.layout.block_size
        offsets = [
            place.offset_bytes + place.plane(layers, sides, heads)[::joined] * size * slot_bytes
            for place, size in zip((here, there), sizes, strict=True)
        ]
        planes = len(offsets[0])
        slots = (runs.source_slot[which], runs.target_slot[which])
        source, target = (
            (slot[:, None] * slot_bytes + offset).ravel() for slot, offset in zip(slots, offsets, strict=True)
        )
        lengths = np.repeat(runs.slots[which] * slot_bytes * joined, planes)
        blocks = (np.repeat(block[which], planes) for block in (runs.source_block, runs.target_block))
        source_block, target_block = blocks
        return np.stack([source_block, source, target_block, target, lengths])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a group lies in a block of one rank."""

    offset_bytes: int
    layers: range
    heads: range

    @classmethod
    def of(cls, split: KVSplit, group: KVGroup, rank: int) -> _Place:
        segment = next(part for part in split.rank_layout(rank).segments() if part.group == group.name)
        return cls(segment.offset_bytes, split.layers(group, rank), split.heads(group, rank))

    def plane(self, layers: Int64s, sides: Int64s, heads: Int64s) -> Int64s:
        """How many planes lie before each of these."""
        before: Int64s = ((layers - self.layers.start) * 2 + sides) * len(self.heads) + heads - self.heads.start
        return before


def _merged(table: Int64s) -> Stretches:
    """Joins neighbors that go on, one after the other, on both sides."""
    source_block, source, target_block, target, length = table
    goes_on = (
        (source_block[1:] == source_block[:-1])
        & (target_block[1:] == target_block[:-1])
        & (source[1:] == source[:-1] + length[:-1])
        & (target[1:] == target[:-1] + length[:-1])
    )
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(length)), dtype=bool), ~goes_on]))
    lengths = np.add.reduceat(length, starts) if len(starts) else length
    return Stretches(source_block[starts], source[starts], target_block[starts], target[starts], lengths)


def _routes(source: KVSplit, target: KVSplit) -> tuple[Route, ...]:
    found: dict[tuple[int, int], list[Piece]] = {}
    for group in source.layout.groups:
        stages = [source.layers(group, stage * source.tensor_parallel) for stage in range(source.pipeline_stages)]
        have, want = _holders(source, group), _holders(target, group)
        for to in range(target.num_ranks):
            senders = _senders(have, want, to % target.tensor_parallel)
            for stage, held in enumerate(stages):
                for place, piece in _pieces(group, _overlap(target.layers(group, to), held), senders):
                    found.setdefault((to, stage * source.tensor_parallel + place), []).append(piece)
    return tuple(Route(sender, to, tuple(pieces)) for (to, sender), pieces in sorted(found.items()))


def _senders(have: Holders, want: Holders, place: int) -> dict[int, list[int]]:
    """The places of a source stage that send each of its heads to one place of a target stage."""
    senders = {}
    for head, wanting in enumerate(want):
        if place in wanting:
            turn, each = wanting.index(place), len(have[head])
            first = turn * each // len(wanting)
            senders[head] = have[head][first : max(first + 1, (turn + 1) * each // len(wanting))]
    return senders


def _pieces(group: KVGroup, layers: range, senders: Mapping[int, list[int]]) -> Iterator[tuple[int, Piece]]:
    """What a target rank gets of one source stage, by place in that stage. Heads that come the same way go together."""
    shares: dict[tuple[int, range], list[int]] = {}
    for head, places in senders.items():
        for index, place in enumerate(places):
            share = _share(layers, len(places), index)
            if share:
                shares.setdefault((place, share), []).append(head)
    for (place, share), together in shares.items():
        assert together == list(range(together[0], together[-1] + 1)), "a rank's heads are contiguous"
        yield place, Piece(group.name, share, range(together[0], together[-1] + 1))


def _share(layers: range, parts: int, index: int) -> range:
    """One of `parts` contiguous shares of some layers, as even as they go."""
    return layers[len(layers) * index // parts : len(layers) * (index + 1) // parts]


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))


def _holders(split: KVSplit, group: KVGroup) -> Holders:
    held = [split.heads(group, place) for place in range(split.tensor_parallel)]
    return [[place for place, heads in enumerate(held) if head in heads] for head in range(group.num_kv_heads)]


def copy_stretches(stretches: Stretches, source: Sequence[memoryview], target: Sequence[memoryview]) -> None:
    """Makes the copies between the blocks of a sequence in host memory, one after another."""
    columns = (
        stretches.source_block,
        stretches.source_offset,
        stretches.target_block,
        stretches.target_offset,
        stretches.length_bytes,
    )
    for from_block, start, to_block, place, length in zip(*(column.tolist() for column in columns), strict=True):
        target[to_block][place : place + length] = source[from_block][start : start + length]


def repack_reference(
    source: KVSplit, target: KVSplit, blocks: Mapping[int, Bytes2D], num_tokens: int
) -> dict[int, Bytes2D]:
    """What every target rank's blocks must hold, from the source ranks' `[block, byte]`: through the whole KV of the
    sequence, `[layer, 2, kv_head, token, head_dim]`. Slots that the source does not have are 0.
    """
    slots = source.layout.blocks_for(num_tokens) * source.layout.block_size
    wanted = target.layout.blocks_for(num_tokens) * target.layout.block_size
    built = {rank: [np.empty((wanted // target.layout.block_size, 0), np.uint8)] for rank in range(target.num_ranks)}
    for group in source.layout.groups:
        slot_bytes = group.head_dim * DTYPE_BYTES[group.dtype]
        whole = np.zeros((group.num_layers, 2, group.num_kv_heads, max(slots, wanted), slot_bytes), np.uint8)
        for rank in range(source.num_ranks):
            layers, heads = source.layers(group, rank), source.heads(group, rank)
            if not layers:
                continue
            part = next(s for s in source.rank_layout(rank).segments() if s.group == group.name)
            of_group = blocks[rank][:, part.offset_bytes : part.offset_bytes + part.length_bytes]
            planes = of_group.reshape(-1, len(layers), 2, len(heads), source.layout.block_size, slot_bytes)
            tokens = planes.transpose(1, 2, 3, 0, 4, 5).reshape(len(layers), 2, len(heads), slots, slot_bytes)
            whole[layers.start : layers.stop, :, heads.start : heads.stop, :slots] = tokens
        for rank in range(target.num_ranks):
            layers, heads = target.layers(group, rank), target.heads(group, rank)
            if not layers:
                continue
            held = whole[layers.start : layers.stop, :, heads.start : heads.stop, :wanted]
            split = held.reshape(len(layers), 2, len(heads), -1, target.layout.block_size, slot_bytes)
            built[rank].append(split.transpose(3, 0, 1, 2, 4, 5).reshape(wanted // target.layout.block_size, -1))
    return {rank: np.concatenate(parts, axis=1) for rank, parts in built.items()}
