"""What prefill and decode attention share on a GPU: one tile of keys and values out of paged memory, added to an online
softmax (Milakov & Gimelshein 2018; FlashAttention-2, algorithm 1).

Legend: M rows of a tile of queries (row = query * GROUP + head in its group), N keys of a tile, D head dim, DP the same
padded to a power of two, S slots of a block. Tiles of keys begin at multiples of N, whatever was computed when. Scores
are kept in powers of two: `scale` holds log2(e) and, for narrow memories, the keys' scale. Products accumulate in
float32; weights are rounded to the queries' dtype for the product with the values, as everybody does.
"""
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu_plans.tiling import FP8, FP8_BITS, INT8, PLAIN, Tiling
from ..paged_attention import AttentionShape
from .cubin import Build

LOG2_E = 1.4426950408889634
_UNFOLDED = tl.constexpr(256.0)
"""What `widened` leaves out of numbers in FP8_BITS: the exponents' biases differ by 15 - 7, which is 2^8."""


@triton.jit
def widened(stored, like, FORM: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of the KV memory in the dtype of `like`, times 1 / `_UNFOLDED` where FORM is FP8_BITS. Exact; NaN stays
    NaN. PRECISION `wide`: Triton's interpreter takes integers for bits of bfloat16.
    """
    if FORM == 2:
        bits = stored.to(tl.int16)
        magnitude = bits & 0x7F
        half = ((bits & 0x80) << 8) | tl.where(magnitude == 0x7F, 0x7FFF, magnitude << 7)
        wide = half.to(tl.int16).to(tl.float16, bitcast=True).to(like.dtype)
    elif FORM == 1 and PRECISION == "wide":
        wide = stored.to(tl.float32).to(like.dtype)
    else:
        wide = stored.to(like.dtype)
    return wide


@triton.jit
def scale_of(scales, side, head, kv_heads, FORM: tl.constexpr):
    """What a narrow memory's numbers, `widened`, are to be multiplied by; 1 for a plain one."""
    if FORM == 0:
        scale = 1.0
    else:
        scale = tl.load(scales + side * kv_heads + head)
        if FORM == 2:
            scale *= _UNFOLDED
    return scale


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b (+ acc) in float32. PRECISION `wide`: operands are widened first; Triton's interpreter takes bfloat16 for
    integers.
    """
    if PRECISION == "wide":
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        result = tl.dot(a, b, acc, input_precision=PRECISION)
    return result


@triton.jit
def attend(
    q,
    acc,
    top,
    total,
    memory,
    table,
    key,
    oldest,
    limit,
    position,
    scale,
    layer_block,
    layer_side,
    layer_slot,
    N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    WINDOW: tl.constexpr,
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds keys `key` … `key + N - 1` to `acc` [M, DP], `top` and `total` [M] (maximum, sum of powers) of `q` [M, DP].

    `memory`: the address of a head's keys; the values lie `layer_side` behind. MASKED: keys outside `oldest` … `limit -
    1` are not read, and a row sees only keys up to its `position` [M] (and its window); otherwise every row sees all.
    """
    keys = key + tl.arange(0, N)
    channel = tl.arange(0, DP)
    present = (keys >= oldest) & (keys < limit)
    if S % N == 0:  # the tile lies in one block
        block = tl.load(table + key // S).to(tl.int64)
    elif MASKED:
        block = tl.load(table + keys // S, mask=present, other=0).to(tl.int64)
    else:
        block = tl.load(table + keys // S).to(tl.int64)
    at = block * layer_block + (keys % S) * layer_slot
    place = memory + at[:, None] + channel[None, :]
    if MASKED and D != DP:
        inside = present[:, None] & (channel < D)[None, :]
        k = tl.load(place, mask=inside, other=0.0)
        v = tl.load(place + layer_side, mask=inside, other=0.0)
    elif MASKED:
        k = tl.load(place, mask=present[:, None], other=0.0)
        v = tl.load(place + layer_side, mask=present[:, None], other=0.0)
    elif D != DP:
        k = tl.load(place, mask=(channel < D)[None, :], other=0.0)
        v = tl.load(place + layer_side, mask=(channel < D)[None, :], other=0.0)
    else:
        k = tl.load(place)
        v = tl.load(place + layer_side)
    scores = product(q, tl.trans(widened(k, q, FORM, PRECISION)), None, PRECISION) * scale
    if MASKED:
        seen = present[None, :] & (keys[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (keys[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # nothing seen yet: no -inf - -inf
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    acc = product(weights.to(q.dtype), widened(v, q, FORM, PRECISION), acc * fade[:, None], PRECISION)
    return acc, new_top, total


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
STORED = {INT8: "i8", FP8_BITS: "u8", FP8: "fp8e4nv"}
"""Triton's names, for the configurations that are compiled without a GPU."""


def check_shapes(
    q: torch.Tensor,
    layer: torch.Tensor,
    tables: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    form: int,
) -> None:
    """ValueError naming what the kernels cannot address: q, out [T, H, D], layer [N, 2, K, S, D], tables [R, B]."""
    if q.dim() != 3 or out.shape != q.shape:
        raise ValueError(
            f"q, out: shapes {tuple(q.shape)} and {tuple(out.shape)} are not both [tokens, heads, head dim]"
        )
    if layer.dim() != 5 or layer.shape[1] != 2 or layer.shape[4] != q.shape[2] or q.shape[1] % layer.shape[2]:
        raise ValueError(
            f"layer: shape {tuple(layer.shape)} is not [blocks, 2, kv heads, slots, {q.shape[2]}] "
            f"with kv heads that divide {q.shape[1]}"
        )
    for name, tensor in (("q", q), ("out", out), ("layer", layer), ("tables", tables)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"{name}: the last dimension is not contiguous (stride {tensor.stride(-1)})")
    if tables.dtype != torch.int32:
        raise ValueError(f"tables: dtype {tables.dtype} is not torch.int32")
    expected = (2, layer.shape[2])
    if form != PLAIN and (scales is None or scales.shape != expected or scales.dtype != torch.float32):
        raise ValueError(f"scales: a memory of {layer.dtype} needs float32 scales {list(expected)}, keys then values")


def precision(dtype: torch.dtype) -> str:
    """PRECISION of products of `dtype`: float32 as three products of tf32, which lose about a bit of it."""
    if triton.knobs.runtime.interpret:
        return "wide"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def padded(head_dim: int) -> int:
    """DP."""
    return max(16, triton.next_power_of_2(head_dim))


def constants_of(shape: AttentionShape, cut: Tiling, form: int, dtype: torch.dtype) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "M": cut.rows,
        "N": cut.keys,
        "S": shape.block_size,
        "D": shape.head_dim,
        "DP": padded(shape.head_dim),
        "WINDOW": shape.window or 0,
        "FORM": form,
        "PRECISION": precision(dtype),
    }


_STRIDES = ("q_token", "q_head", "out_token", "out_head", "layer_block", "layer_side", "layer_head", "layer_slot")


def build_of(
    kernel: Any,
    label: str,
    work: Mapping[str, str],
    shape: AttentionShape,
    cut: Tiling,
    form: int,
    dtype: torch.dtype,
    arch: int,
) -> Build:
    """A configuration of either kernel. `label`: what follows head dim, memory and block size; `work`: the types behind
    the pointers that only this kernel has.
    """
    name = TYPES[dtype]
    memory = STORED.get(form, name)
    pointers = {"q": name, "layer": memory, "out": name, "tables": "i32", **work}
    signature = {key: f"*{value}" for key, value in pointers.items()} | dict.fromkeys(_STRIDES, "i32")
    signature |= {"layer_block": "i64", "table_row": "i32", "kv_heads": "i32", "softmax_scale": "fp32"}
    constants = constants_of(shape, cut, form, dtype)
    if form == PLAIN:
        constants["scales"] = None
    else:
        signature["scales"] = "*fp32"
    return Build(
        label=f"D{shape.head_dim} {memory} S{shape.block_size}{label}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        num_warps=cut.warps,
        num_stages=cut.stages,
        divisible=_STRIDES,
        architectures=(arch,),
    )
