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
# ruff: noqa: N803

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..gpu_plans.prefill import PrefillPlan, tiling
from ..gpu_plans.tiling import FP8, FP8_BITS, INT8, PLAIN, form_of, has_small_blocks
from ..paged_attention import AttentionShape
from .attend import LOG2_E, attend, build_of, check_shapes, constants_of, scale_of
from .cubin import LIMITS, USUAL, Build


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


SHIPPED = (
    *(
        build
        for arch in USUAL
        for build in (
            _build(64, torch.bfloat16, arch),
            _build(128, torch.bfloat16, arch, window=4096, block_size=128),
            _build(128, torch.bfloat16, arch, INT8),
        )
    ),
    *(
        build
        for arch in LIMITS  # what takes the most shared memory
        for build in (
            _build(128, torch.bfloat16, arch),
            _build(128, torch.bfloat16, arch, FP8 if arch >= 89 else FP8_BITS),
            _build(256, torch.bfloat16, arch),
            _build(128, torch.float32, arch),
        )
    ),
    *(_build(256, torch.float32, arch) for arch in LIMITS if has_small_blocks(arch)),
)
