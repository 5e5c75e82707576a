"""Causal attention of stretches of queries over paged KV on a GPU: exact, a whole ragged batch in one launch.

FlashAttention-2 (Dao 2023, section 3): a program keeps a tile of queries and walks over tiles of keys, so the matrix of
scores exists only as tiles in registers. Keys and values always come from the paged memory, those of this step included
(they are written first): a prompt's earlier chunks and a cached prefix are the same to it. The query heads of a KV head
stand in one tile, so its keys and values are read once for all of them. Keys that every row of a tile sees are computed
without masks; the few tiles at the diagonal, and where a sliding window ends, with them. Programs with the most keys
begin first.

Reference: `kernels.paged_attention.paged_attention_reference`, over the same rows. Shapes: T tokens of the step, R rows
(stretches), H query heads, K kv heads, D head dim, N blocks, S slots.
"""
# ruff: noqa: N803, N815

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from ..paged_attention import AttentionRow, AttentionShape
from .attend import (
    FP8,
    FP8_BITS,
    INT8,
    LOG2_E,
    PLAIN,
    Tiling,
    attend,
    build_of,
    check_shapes,
    constants_of,
    form_of,
    scale_of,
)
from .cubin import Build


@triton.jit(do_not_specialize=["table_row"])  # a table of another width must not cost a compilation
def prefill_attention_kernel(
    q,
    layer,
    out,
    tables,
    rows,
    tiles,
    scales,
    q_token,
    q_head,
    out_token,
    out_head,
    layer_block,
    layer_side,
    layer_head,
    layer_slot,
    table_row,
    kv_heads,
    softmax_scale,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    WINDOW: tl.constexpr,
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of a KV head. `rows` [R, 3]: offset, start, length; `tiles` [., 2]: row, its first query."""
    program = tl.program_id(0)
    head = program % kv_heads
    row = tl.load(tiles + (program // kv_heads) * 2)
    first = tl.load(tiles + (program // kv_heads) * 2 + 1)
    offset = tl.load(rows + row * 3)
    start = tl.load(rows + row * 3 + 1)
    length = tl.load(rows + row * 3 + 2)

    count: tl.constexpr = M // GROUP
    inner = tl.arange(0, M)
    query = first + inner // GROUP
    used = (inner < count * GROUP) & (query < length)
    last = tl.minimum(first + count, length) - 1
    position = start + tl.minimum(query, last)  # unused rows compute what another row does, and are not stored
    channel = tl.arange(0, DP)
    token = (offset + query).to(tl.int64)[:, None]
    query_head = (head * GROUP + inner % GROUP)[:, None]
    stored = used[:, None] & (channel < D)[None, :]
    q_tile = tl.load(q + token * q_token + query_head * q_head + channel[None, :], mask=stored, other=0.0)

    limit = start + last + 1
    oldest = 0
    begin = 0
    full_begin = 0
    full_end = (start + first + 1) // N
    if WINDOW:
        oldest = tl.maximum(start + first - WINDOW + 1, 0)
        begin = oldest // N
        full_begin = tl.minimum(tl.cdiv(tl.maximum(limit - WINDOW, 0), N), tl.cdiv(limit, N))
        full_end = tl.maximum(full_end, full_begin)
    memory = layer + head.to(tl.int64) * layer_head
    table = tables + row.to(tl.int64) * table_row
    scale = softmax_scale * scale_of(scales, 0, head, kv_heads, FORM)

    acc = tl.zeros([M, DP], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in tl.range(full_begin, full_end):
        acc, top, total = attend(
            q_tile, acc, top, total, memory, table, tile * N, oldest, limit, position, scale,
            layer_block, layer_side, layer_slot, N, S, D, DP, WINDOW, FORM, PRECISION, False,
        )  # fmt: skip
    left = full_begin - begin
    for index in tl.range(0, left + tl.cdiv(limit, N) - full_end):
        tile = tl.where(index < left, begin + index, full_end + index - left)
        acc, top, total = attend(
            q_tile, acc, top, total, memory, table, tile * N, oldest, limit, position, scale,
            layer_block, layer_side, layer_slot, N, S, D, DP, WINDOW, FORM, PRECISION, True,
        )  # fmt: skip
    result = acc * (scale_of(scales, 1, head, kv_heads, FORM) / total)[:, None]
    place = out + token * out_token + query_head * out_head + channel[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=stored)


def tiling(head_dim: int, dtype: torch.dtype, form: int, arch: int) -> Tiling:
    """What is launched. Registers bound it (a row's float32 results and scores), and shared memory: tiles of keys and
    values under way, and the tile of queries. Two stages of the pipeline are one tile under way, as in decode.
    """
    if dtype == torch.float32:
        return Tiling(32, 32, 4, 5) if head_dim <= 128 else Tiling(32, 16, 4, 3)
    if head_dim > 128:
        return Tiling(128, 64, 8, 3) if arch >= 90 else Tiling(64, 32, 8, 3)
    if arch < 90 and form != PLAIN:
        return Tiling(64, 32, 4, 5)
    return Tiling(128, 64, 4 if head_dim <= 64 and arch >= 90 else 8, 5)


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


def prefill_attention(
    q_THD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    tables_RB: torch.Tensor,
    plan: PrefillPlan,
    shape: AttentionShape,
    out_THD: torch.Tensor | None = None,
    scales_2K: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for the plan's rows; other tokens of `out_THD` (made if None) stay as they are.

    `q_THD` bfloat16, float16 or float32; `layer_N2KSD` of the same dtype, or int8 or float8_e4m3fn with `scales_2K`
    float32 (keys then values), strides as they come; `tables_RB` int32, a row's block ids in order: entries behind its
    length or before its window are not read. Everything on one device; nothing waits for it.

    Raises ValueError for shapes, strides or dtypes that the kernel cannot address.
    """
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format) if out_THD is None else out_THD
    form = form_of(layer_N2KSD, q_THD.dtype)
    check_shapes(q_THD, layer_N2KSD, tables_RB, out, scales_2K, form)
    if not len(plan.tiles_I2):
        return out
    layer = layer_N2KSD.view(torch.uint8) if form == FP8_BITS else layer_N2KSD
    cut = plan.tiling
    prefill_attention_kernel[(len(plan.tiles_I2) * shape.num_kv_heads,)](
        q_THD, layer, out, tables_RB, plan.rows_R3, plan.tiles_I2, scales_2K,
        q_THD.stride(0), q_THD.stride(1), out.stride(0), out.stride(1),
        *layer_N2KSD.stride()[:4], tables_RB.stride(0), shape.num_kv_heads, LOG2_E / math.sqrt(shape.head_dim),
        **constants_of(shape, cut, form, q_THD.dtype), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def _build(
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
    form: int = PLAIN,
    window: int | None = None,
    block_size: int = 16,
) -> Build:
    shape = AttentionShape(32, 8, head_dim, block_size, window)
    cut = tiling(head_dim, dtype, form, arch)
    label, work = " window" if window else "", {"rows": "i32", "tiles": "i32"}
    return build_of(prefill_attention_kernel, label, work, shape, cut, form, dtype, arch)


SHIPPED = tuple(
    build
    for arch in (80, 90)
    for build in (
        _build(64, torch.bfloat16, arch),
        _build(128, torch.bfloat16, arch),
        _build(128, torch.bfloat16, arch, window=4096, block_size=128),
        _build(128, torch.bfloat16, arch, INT8),
        _build(128, torch.bfloat16, arch, FP8 if arch >= 89 else FP8_BITS),
        _build(256, torch.bfloat16, arch),
        _build(128, torch.float32, arch),
    )
)
