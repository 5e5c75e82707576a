"""Attention of one query per sequence over paged KV on a GPU: bound by memory, so every multiprocessor must read.

Flash-decoding (Dao, Haziza, Massa, Sizov 2023): a sequence's keys are cut into pieces, a program computes one piece for
all query heads of a KV head (each key is read once), and a second launch merges what the pieces of a sequence found.
`plan_decode` cuts: what a program should read is the batch's keys over the programs that run at a time, so one long
sequence among short ones is cut, and a large batch of equal ones is not; sequences in one piece skip the merge. The
work is data, so a captured CUDA graph replays with another batch's plan: `capacity` pads it.

Reference: `kernels.paged_attention.paged_attention_reference` over rows of length 1. Shapes: B sequences, H query
heads, K kv heads, D head dim, N blocks, S slots, W pieces.
"""
# ruff: noqa: N803, N815

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from ..paged_attention import AttentionShape
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
    padded,
    scale_of,
)
from .cubin import Build

_PROGRAMS_PER_MULTIPROCESSOR = 2
_LEAST_KEYS = 256
"""A piece is not smaller: what it reads should outweigh its launch and its part of the merge."""


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


def tiling(group: int, head_dim: int, dtype: torch.dtype, form: int, arch: int) -> Tiling:
    """What is launched: two programs at a time on a multiprocessor, each with two tiles of 32 KiB under way.

    Loads wait for the block table's entries, so two stages of the pipeline are one tile under way: 5 are two.
    """
    rows = max(16, triton.next_power_of_2(group))  # what a matrix instruction takes at least
    if dtype == torch.float32:
        return Tiling(rows, 32, 4, 5)
    keys = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
    if form == PLAIN:
        return Tiling(rows, keys, 4, 5)
    return Tiling(rows, min(keys, 64 if arch >= 90 else 32), 4, 7)


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the interpreter, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


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
        for arch in (80, 90)
        for build in (
            _build(64, torch.bfloat16, arch),
            _build(80, torch.float16, arch, group=1),
            _build(128, torch.bfloat16, arch),
            _build(128, torch.bfloat16, arch, INT8),
            _build(128, torch.bfloat16, arch, FP8 if arch >= 89 else FP8_BITS),
            _build(256, torch.bfloat16, arch, group=16),
        )
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
