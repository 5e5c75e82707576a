"""Rotates a step's queries and keys and writes keys and values into their slots of the paged KV memory, in one launch:
what the projection made is read once, nothing goes back but queries. References: `kernels.rotary`, `kernels.kv_write`.

Shapes: T tokens, H query heads, K kv heads, D head dim, N blocks, S slots. `q` [T, H, D], `k`, `v` [T, K, D] (views
of one projection's output are welcome), tables [T, 1, D] float32 or None (no rotation), one layer of KV `layer` [N,
2, K, S, D] (any strides, 64-bit), `blocks`, `slots` [T] int64; a token whose block is negative is padding: nothing of
it is written.

A narrow KV memory (int8, float8_e4m3fn) has scales [2, K] float32, keys then values, one a head: stored = value /
scale, rounded, halves to even; what lies beyond the format's range becomes its largest number.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cubin import Build
from .numerics import round_even, to_e4m3
from .rotary import BLOCK_HEADS, turned

PLAIN, INT8, FP8 = 0, 1, 2
_STORED = {torch.int8: INT8, torch.float8_e4m3fn: FP8}


@triton.jit
def stored(x, scales, inside, FORM: tl.constexpr):
    """Float32 [heads, channels] as the KV memory holds it; `scales`: addresses [heads, 1]."""
    result = x
    if FORM != 0:
        scaled = tl.div_rn(x, tl.broadcast_to(tl.load(scales, mask=inside, other=1.0), x.shape))
        if FORM == 1:
            result = round_even(tl.minimum(tl.maximum(scaled, -127.0), 127.0))
        else:
            result = to_e4m3(scaled)
    return result


@triton.jit
def kv_write_kernel(
    q,
    k,
    v,
    q_out,
    cos,
    sin,
    layer,
    blocks,
    slots,
    scales,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    layer_block,
    layer_side,
    layer_head,
    layer_slot,
    heads,
    kv_heads,
    half,
    ROTATED: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Some heads of one token; program_id(1) counts through groups of query heads, then of keys, then of values."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts = tl.cdiv(heads, BLOCK_HEADS)
    kv_parts = tl.cdiv(kv_heads, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_HALF)
    if part < query_parts:
        head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < heads)[:, None] & (channel < half)[None, :]
        place = q + token * q_token + head[:, None] * q_head + channel[None, :]
        low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
        if ROTATED:
            low, high = turned(low, high, cos, sin, token, channel, half, channel < half)
        turned_place = q_out + (token * heads + head[:, None]) * 2 * half + channel[None, :]
        tl.store(turned_place, low.to(q_out.dtype.element_ty), mask=inside)
        tl.store(turned_place + half, high.to(q_out.dtype.element_ty), mask=inside)
    else:
        block = tl.load(blocks + token).to(tl.int64)
        side = ((part - query_parts) // kv_parts).to(tl.int64)  # 0 keys, 1 values
        head = ((part - query_parts) % kv_parts) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < tl.where(block < 0, 0, kv_heads))[:, None] & (channel < half)[None, :]
        place = k + token * k_token + head[:, None] * k_head + channel[None, :]
        if side == 1:
            place = v + token * v_token + head[:, None] * v_head + channel[None, :]
        low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
        if ROTATED:  # noqa: SIM102 (a constant, known when it is compiled)
            if side == 0:
                low, high = turned(low, high, cos, sin, token, channel, half, channel < half)
        scale = scales + side * kv_heads + head[:, None]
        slot = tl.load(slots + token).to(tl.int64)
        start = layer + block * layer_block + side * layer_side + slot * layer_slot
        target = start + head[:, None].to(tl.int64) * layer_head + channel[None, :]
        known = (head < kv_heads)[:, None]
        tl.store(target, stored(low, scale, known, FORM).to(layer.dtype.element_ty), mask=inside)
        tl.store(target + half, stored(high, scale, known, FORM).to(layer.dtype.element_ty), mask=inside)


def kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    layer: torch.Tensor,
    blocks: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes keys and values into `layer`; returns the queries, turned, [T, H, D] in q's dtype."""
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    form = _STORED.get(layer.dtype, PLAIN)
    assert k.shape == v.shape == (tokens, kv_heads, width)
    assert width % 2 == 0
    assert q.stride(2) == k.stride(2) == v.stride(2) == layer.stride(4) == 1
    assert layer.shape[1:3] == (2, kv_heads)
    assert layer.shape[4] == width
    assert (scales is not None) == (form != PLAIN)
    cos, sin = (q, q) if tables is None else tables
    assert tables is None or (cos.is_contiguous() and sin.is_contiguous())
    if scales is not None:
        assert scales.shape == (2, kv_heads)
        assert scales.is_contiguous()
    memory = layer.view(torch.uint8) if form == FP8 else layer
    out = torch.empty(tokens, heads, width, dtype=q.dtype, device=q.device)
    if tokens:
        parts = triton.cdiv(heads, BLOCK_HEADS) + 2 * triton.cdiv(kv_heads, BLOCK_HEADS)
        kv_write_kernel[(tokens, parts)](
            q,
            k,
            v,
            out,
            cos,
            sin,
            memory,
            blocks,
            slots,
            cos if scales is None else scales,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *layer.stride()[:4],
            heads,
            kv_heads,
            width // 2,
            ROTATED=tables is not None,
            FORM=form,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_HALF=triton.next_power_of_2(width // 2),
            num_warps=4,
        )
    return out


_STRIDES = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "layer_side", "layer_head", "layer_slot")
SHIPPED = tuple(
    Build(
        label=f"{dtype} into {kind} D{width}{' turned' if turned_ else ''}",
        kernel=kv_write_kernel,
        signature={
            **dict.fromkeys(("q", "k", "v", "q_out"), f"*{dtype}"),
            **dict.fromkeys(("cos", "sin", "scales"), "*fp32"),
            **dict.fromkeys(("blocks", "slots"), "*i64"),
            **dict.fromkeys((*_STRIDES, "heads", "kv_heads", "half"), "i32"),
            "layer": f"*{kind}",
            "layer_block": "i64",
        },
        constants={
            "ROTATED": turned_,
            "FORM": form,
            "BLOCK_HEADS": BLOCK_HEADS,
            "BLOCK_HALF": triton.next_power_of_2(width // 2),
        },
        num_warps=4,
        divisible=(*_STRIDES, "layer_block"),
    )
    for dtype, kind, form, width, turned_ in (
        ("bf16", "bf16", PLAIN, 128, True),
        ("fp16", "fp16", PLAIN, 80, False),
        ("fp32", "fp32", PLAIN, 64, True),
        ("bf16", "i8", INT8, 128, True),
        ("bf16", "u8", FP8, 128, True),
    )
)
