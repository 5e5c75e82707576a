"""How prefill attention of a step is cut into tiles of queries, and the bytes that it moves.

Shapes: R rows (stretches of queries), I tiles.
"""
# ruff: noqa: N803, N815

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..paged_attention import AttentionRow, AttentionShape
from .tiling import PLAIN, Tiling, has_small_blocks, has_warpgroups


def tiling(head_dim: int, dtype: torch.dtype, form: int, arch: int) -> Tiling:
    """What is launched. Registers bound it (a row's float32 results and scores), and shared memory: tiles of keys and
    values under way, and the tile of queries. Two stages of the pipeline are one tile under way, as in decode.
    """
    if dtype == torch.float32:
        if has_small_blocks(arch):
            return Tiling(32, 16, 4, 5) if head_dim <= 128 else Tiling(16, 16, 8, 3)
        return Tiling(32, 32, 4, 5) if head_dim <= 128 else Tiling(32, 16, 4, 3)
    wide = has_warpgroups(arch)
    if head_dim > 128:
        return Tiling(128, 64, 8, 3) if wide else Tiling(64, 32, 8, 3)
    if not wide and form != PLAIN:
        return Tiling(64, 32, 4, 5)
    return Tiling(128, 64, 4 if head_dim <= 64 and wide else 8, 5)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """A step's stretches and the tiles they are cut into, for every layer. Tensors of int32, on one device."""

    rows_R3: torch.Tensor
    """Offset among the step's tokens, position of the first query, number of queries."""
    tiles_I2: torch.Tensor
    """Row and first query of a tile; those with the most keys first."""
    tiling: Tiling

    def on(self, device: torch.device) -> PrefillPlan:
        """The same on `device`, copied without waiting."""
        rows, tiles = (tensor.to(device, non_blocking=True) for tensor in (self.rows_R3, self.tiles_I2))
        return PrefillPlan(rows, tiles, self.tiling)


def plan_prefill(rows: Sequence[AttentionRow], shape: AttentionShape, cut: Tiling) -> PrefillPlan:
    """Cuts stretches into tiles of queries. Pure; one call per step. Raises ValueError for an empty stretch."""
    table = np.array([(row.offset, row.start, row.length) for row in rows], np.int32).reshape(-1, 3)
    if len(table) and table[:, 2].min() < 1:
        raise ValueError("length: a stretch without queries is not allowed; allowed: 1 or more")
    count = _queries(shape, cut)
    firsts = [np.arange(0, length, count, dtype=np.int32) for length in table[:, 2]]
    owners = np.repeat(np.arange(len(table), dtype=np.int32), [len(first) for first in firsts])
    tiles = np.stack([owners, np.concatenate([*firsts, np.empty(0, np.int32)])], 1)
    keys = _keys_seen(table, tiles, shape, count)
    order = np.argsort(-keys, kind="stable")
    return PrefillPlan(torch.from_numpy(table), torch.from_numpy(tiles[order]), cut)


def _queries(shape: AttentionShape, cut: Tiling) -> int:
    group = shape.num_heads // shape.num_kv_heads
    if group > cut.rows:
        raise ValueError(f"heads: {group} query heads for one kv head are not allowed; allowed: up to {cut.rows}")
    return cut.rows // group


def _keys_seen(table_R3: np.ndarray, tiles_I2: np.ndarray, shape: AttentionShape, count: int) -> np.ndarray:
    """[I] keys that a tile's program reads."""
    row = table_R3[tiles_I2[:, 0]].astype(np.int64)
    first = row[:, 1] + tiles_I2[:, 1]
    limit = row[:, 1] + np.minimum(tiles_I2[:, 1] + count, row[:, 2])
    return limit if shape.window is None else limit - np.maximum(first - shape.window + 1, 0)


def moved_bytes(plan: PrefillPlan, shape: AttentionShape, element_bytes: int, kv_bytes: int | None = None) -> int:
    """Bytes that one layer's attention reads and writes: queries and results once, keys and values once per tile of
    queries that sees them (FlashAttention, theorem 2: N^2 d^2 / M for on-chip memory M); caches serve part of these.
    """
    table, tiles = plan.rows_R3.cpu().numpy(), plan.tiles_I2.cpu().numpy()
    keys = int(_keys_seen(table, tiles, shape, _queries(shape, plan.tiling)).sum())
    queries = int(table[:, 2].sum()) * shape.num_heads
    return 2 * shape.head_dim * (queries * element_bytes + keys * shape.num_kv_heads * (kv_bytes or element_bytes))


def standard_bytes(plan: PrefillPlan, shape: AttentionShape, element_bytes: int) -> int:
    """Bytes of standard attention over the same rows (FlashAttention, algorithm 0): the matrix of scores is written,
    read for the softmax, and its result written and read again; every query head reads its keys and values.
    """
    table = plan.rows_R3.cpu().numpy().astype(np.int64)
    contexts = table[:, 1] + table[:, 2]
    scores = int((table[:, 2] * contexts).sum())
    vectors = int((2 * table[:, 2] + 2 * contexts).sum())
    return shape.num_heads * element_bytes * (4 * scores + vectors * shape.head_dim)
