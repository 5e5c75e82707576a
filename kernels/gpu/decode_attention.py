"""Attention of one query per sequence over paged KV on a GPU: bound by memory, so every multiprocessor must read.

Flash-decoding (Dao, Haziza, Massa, Sizov 2023): a sequence's keys are cut into pieces, a program computes one piece for
all query heads of a KV head (each key is read once), and a second launch merges what the pieces of a sequence found;
sequences in one piece skip the merge. `kernels.gpu_plans.decode` cuts.

Reference: `kernels.paged_attention.paged_attention_reference` over rows of length 1. Shapes: B sequences, H query
heads, K kv heads, D head dim, N blocks, S slots, W pieces.
"""
# ruff: noqa: N803

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..gpu_plans.decode import DecodePlan, tiling
from ..gpu_plans.tiling import FP8, FP8_BITS, INT8, PLAIN, form_of
from ..paged_attention import AttentionShape
from .attend import LOG2_E, attend, build_of, check_shapes, constants_of, padded, scale_of
from .cubin import LIMITS, USUAL, Build


@triton.jit(do_not_specialize=["table_row"])  # a table of another width must not cost a compilation
def decode_attention_kernel(
    q,
    layer,
    out,
    tables,
    lengths,
    work,
    parts,
    sums,
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
    """One piece of one sequence for one KV head. `work` [W, 4]: row (-1: nothing to do), first tile of keys, the tile
    behind the last, pieces of this row. Several pieces: results go to `parts` [W, H, D], logarithms of sums to `sums`
    [W, H], both float32.
    """
    program = tl.program_id(0)
    head = program % kv_heads
    piece = (program // kv_heads).to(tl.int64)
    row = tl.load(work + piece * 4)
    if row < 0:
        return
    begin = tl.load(work + piece * 4 + 1)
    end = tl.load(work + piece * 4 + 2)
    whole = tl.load(work + piece * 4 + 3) == 1
    length = tl.load(lengths + row)

    inner = tl.arange(0, M)
    channel = tl.arange(0, DP)
    query_head = (head * GROUP + inner)[:, None]
    used = (inner < GROUP)[:, None] & (channel < D)[None, :]
    token = row.to(tl.int64)
    q_tile = tl.load(q + token * q_token + query_head * q_head + channel[None, :], mask=used, other=0.0)

    oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    position = tl.zeros([M], tl.int32) + (length - 1)
    memory = layer + head.to(tl.int64) * layer_head
    table = tables + token * table_row
    scale = softmax_scale * scale_of(scales, 0, head, kv_heads, FORM)

    acc = tl.zeros([M, DP], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in tl.range(begin, end):
        acc, top, total = attend(
            q_tile, acc, top, total, memory, table, tile * N, oldest, length, position, scale,
            layer_block, layer_side, layer_slot, N, S, D, DP, WINDOW, FORM, PRECISION, True,
        )  # fmt: skip
    sees = total != 0.0  # a NaN sees too, and stays
    result = acc * (scale_of(scales, 1, head, kv_heads, FORM) / tl.where(sees, total, 1.0))[:, None]
    if whole:
        place = out + token * out_token + query_head * out_head + channel[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=used)
    else:
        slot = piece * (kv_heads * GROUP) + head * GROUP + inner
        tl.store(parts + slot[:, None] * D + channel[None, :], result, mask=used)
        logarithm = tl.where(sees, top + tl.log2(tl.where(sees, total, 1.0)), float("-inf"))
        tl.store(sums + slot, logarithm, mask=inner < GROUP)


@triton.jit
def merge_kernel(
    out, parts, sums, spans, out_token, out_head, heads, D: tl.constexpr, DP: tl.constexpr, PIECES: tl.constexpr
):
    """One sequence and query head: its pieces' results, weighed by their sums. `spans` [B, 2]: first piece, count."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(spans + row * 2)
    count = tl.load(spans + row * 2 + 1)
    if count == 1:
        return
    channel = tl.arange(0, DP)
    acc = tl.zeros([DP], tl.float32)
    top = float("-inf")
    total = 0.0
    for at in tl.range(0, count, PIECES):
        index = at + tl.arange(0, PIECES)
        slot = (first + index).to(tl.int64) * heads + head
        logarithm = tl.load(sums + slot, mask=index < count, other=float("-inf"))
        inside = (index < count)[:, None] & (channel < D)[None, :]
        part = tl.load(parts + slot[:, None] * D + channel[None, :], mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(logarithm, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(logarithm - base)
        fade = tl.exp2(top - base)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
    result = acc / tl.where(total != 0.0, total, 1.0)
    tl.store(out + row * out_token + head * out_head + channel, result.to(out.dtype.element_ty), mask=channel < D)


def decode_attention(
    q_BHD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    tables_BB: torch.Tensor,
    plan: DecodePlan,
    shape: AttentionShape,
    out_BHD: torch.Tensor | None = None,
    scales_2K: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of one query per row: [B, H, D] -> [B, H, D], made if `out_BHD` is None.

    As `prefill_attention`: dtypes, strides, tables, scales. The query stands at position length - 1 of its row. Fit for
    capture: what is allocated is sized by the plan's capacity, and nothing waits for the device.

    Raises ValueError for shapes, strides or dtypes that the kernel cannot address.
    """
    out = torch.empty_like(q_BHD, memory_format=torch.contiguous_format) if out_BHD is None else out_BHD
    form = form_of(layer_N2KSD, q_BHD.dtype)
    check_shapes(q_BHD, layer_N2KSD, tables_BB, out, scales_2K, form)
    if not len(plan.work_W4):
        return out
    layer = layer_N2KSD.view(torch.uint8) if form == FP8_BITS else layer_N2KSD
    cut, heads = plan.tiling, shape.num_heads
    pieces = len(plan.work_W4) if plan.merges else 0
    parts = torch.empty(pieces, heads, shape.head_dim, dtype=torch.float32, device=out.device)
    sums = torch.empty(pieces, heads, dtype=torch.float32, device=out.device)
    decode_attention_kernel[(len(plan.work_W4) * shape.num_kv_heads,)](
        q_BHD, layer, out, tables_BB, plan.lengths_B, plan.work_W4, parts, sums, scales_2K,
        q_BHD.stride(0), q_BHD.stride(1), out.stride(0), out.stride(1),
        *layer_N2KSD.stride()[:4], tables_BB.stride(0), shape.num_kv_heads, LOG2_E / math.sqrt(shape.head_dim),
        **constants_of(shape, cut, form, q_BHD.dtype), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if plan.merges:
        merge_kernel[(len(q_BHD), heads)](
            out, parts, sums, plan.spans_B2, out.stride(0), out.stride(1), heads,
            shape.head_dim, padded(shape.head_dim), _MERGED, num_warps=4,
        )  # fmt: skip
    return out


_MERGED = 16
"""Pieces that the merge loads at a time."""


def _build(
    head_dim: int, dtype: torch.dtype, arch: int, form: int = PLAIN, group: int = 4, block_size: int = 16
) -> Build:
    shape = AttentionShape(8 * group, 8, head_dim, block_size)
    cut = tiling(group, head_dim, dtype, form, arch)
    work = {"lengths": "i32", "work": "i32", "parts": "fp32", "sums": "fp32"}
    return build_of(decode_attention_kernel, f" group {group}", work, shape, cut, form, dtype, arch)


SHIPPED = (
    *(
        build
        for arch in USUAL
        for build in (
            _build(64, torch.bfloat16, arch),
            _build(80, torch.float16, arch, group=1),
            _build(128, torch.bfloat16, arch),
            _build(128, torch.bfloat16, arch, INT8),
            _build(128, torch.bfloat16, arch, FP8 if arch >= 89 else FP8_BITS),
            _build(256, torch.bfloat16, arch, group=16),
        )
    ),
    *(
        build
        for arch in LIMITS  # what takes the most shared memory
        for build in (_build(128, torch.float32, arch, group=32), _build(256, torch.float32, arch, group=16))
    ),
    Build(
        label="D128 bf16",
        kernel=merge_kernel,
        signature={"out": "*bf16", "parts": "*fp32", "sums": "*fp32", "spans": "*i32"}
        | dict.fromkeys(("out_token", "out_head", "heads"), "i32"),
        constants={"D": 128, "DP": 128, "PIECES": _MERGED},
        num_warps=4,
        divisible=("out_token", "out_head"),
    ),
)
