"""How decode attention of a step is cut into pieces of keys (`kernels.gpu.decode_attention` says why). What a program
should read is the batch's keys over the programs that run at a time, so one long sequence among short ones is cut, and
a large batch of equal ones is not. The work is data, so a captured CUDA graph replays with another batch's plan:
`capacity` pads it.

Shapes: B sequences, W pieces.
"""
# ruff: noqa: N815

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..paged_attention import AttentionShape
from .tiling import PLAIN, Tiling, has_small_blocks, has_warpgroups

_PROGRAMS_PER_MULTIPROCESSOR = 2
_LEAST_KEYS = 256
"""A piece is not smaller: what it reads should outweigh its launch and its part of the merge."""


def tiling(group: int, head_dim: int, dtype: torch.dtype, form: int, arch: int) -> Tiling:
    """What is launched: two programs at a time on a multiprocessor, each with two tiles of 32 KiB under way.

    Loads wait for the block table's entries, so two stages of the pipeline are one tile under way: 5 are two.
    """
    rows = max(16, 1 << (group - 1).bit_length())  # what a matrix instruction takes at least
    if dtype == torch.float32:
        if head_dim > 128:
            return Tiling(rows, 16, 8 if rows > 16 else 4, 1 if rows > 16 and has_small_blocks(arch) else 3)
        return Tiling(rows, 16 if rows > 16 and has_small_blocks(arch) else 32, 4, 5)
    keys = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
    if form == PLAIN:
        return Tiling(rows, keys, 4, 5)
    return Tiling(rows, min(keys, 64 if has_warpgroups(arch) else 32), 4, 7)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A step's sequences and their pieces, for every layer. Tensors of int32, on one device."""

    lengths_B: torch.Tensor
    """Tokens of the context, the query's own included; 0: the row's result is 0."""
    work_W4: torch.Tensor
    """Row, first tile of keys, the tile behind the last, pieces of the row; rows of -1 pad."""
    spans_B2: torch.Tensor
    """First piece of a row, and how many."""
    merges: bool
    """Whether any row may have several pieces."""
    tiling: Tiling

    def on(self, device: torch.device) -> DecodePlan:
        """The same on `device`, copied without waiting."""
        lengths, work, spans = (
            tensor.to(device, non_blocking=True) for tensor in (self.lengths_B, self.work_W4, self.spans_B2)
        )
        return DecodePlan(lengths, work, spans, self.merges, self.tiling)


def most_pieces(batch: int, num_kv_heads: int, multiprocessors: int) -> int:
    """A capacity that no plan of `batch` sequences exceeds."""
    return batch + _at_a_time(num_kv_heads, multiprocessors)


def _at_a_time(num_kv_heads: int, multiprocessors: int) -> int:
    """Pieces that run at a time: each is a program for every KV head."""
    return max(1, multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR // num_kv_heads)


def plan_decode(
    lengths: Sequence[int],
    shape: AttentionShape,
    cut: Tiling,
    multiprocessors: int,
    capacity: int | None = None,
) -> DecodePlan:
    """Cuts contexts into pieces of tiles of keys. Pure; one call per step.

    A row is cut where it has over one and a half times the keys that each place of the device gets when all are shared
    out evenly, into even pieces of at most that many; rows with the most keys come first. `capacity`: pad to that many
    pieces, for a captured graph; ValueError where it is too small.
    """
    length = np.asarray(lengths, np.int64).reshape(-1)
    begin = np.zeros_like(length) if shape.window is None else np.maximum(length - shape.window, 0) // cut.keys
    tiles = -(-length // cut.keys) - begin
    share = max(-(-int(tiles.sum()) // _at_a_time(shape.num_kv_heads, multiprocessors)), -(-_LEAST_KEYS // cut.keys))
    pieces = np.where(2 * tiles > 3 * share, -(-tiles // share), 1)
    order = np.argsort(-tiles, kind="stable")
    rows = np.repeat(order, pieces[order])
    firsts = np.zeros(len(length), np.int64)
    firsts[order] = np.cumsum(pieces[order]) - pieces[order]
    index = np.arange(len(rows)) - firsts[rows]
    size = -(-tiles // pieces)
    first = begin[rows] + index * size[rows]
    last = np.minimum(first + size[rows], (begin + tiles)[rows])
    work = np.stack([rows, np.minimum(first, last), last, pieces[rows]], 1).astype(np.int32)
    if capacity is not None:
        if len(work) > capacity:
            raise ValueError(f"capacity: {capacity} is less than the {len(work)} pieces of this batch (most_pieces)")
        padding = np.tile(np.array([[-1, 0, 0, 0]], np.int32), (capacity - len(work), 1))
        work = np.concatenate([work, padding])
    return DecodePlan(
        torch.from_numpy(length.astype(np.int32)),
        torch.from_numpy(work),
        torch.from_numpy(np.stack([firsts, pieces], 1).astype(np.int32)),
        capacity is not None or bool((pieces > 1).any()),
        cut,
    )


def moved_bytes(lengths: Sequence[int], shape: AttentionShape, element_bytes: int, kv_bytes: int | None = None) -> int:
    """Bytes that one layer's attention must move at least: keys and values once, queries and results."""
    seen = sum(length if shape.window is None else min(length, shape.window) for length in lengths)
    vectors = seen * shape.num_kv_heads * (kv_bytes or element_bytes) + len(lengths) * shape.num_heads * element_bytes
    return 2 * shape.head_dim * vectors
