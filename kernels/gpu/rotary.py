"""Rotary position embedding of queries and keys, alone: half-split pairs and tables as `kernels.rotary` has them,
which is the reference. Where keys go straight into the KV memory, `kv_write` turns them on the way.

Shapes: `x` [T, H, D], `cos` and `sin` [T, 1, D] float32 (`kernels.rotary.rotary_tables`); out [T, H, D] in x's dtype.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cubin import Build

BLOCK_HEADS = 8
"""Heads of one token that a program turns."""


@triton.jit
def turned(low, high, cos, sin, token, channel, half, inside):
    """Both halves [heads, channels] of some heads of one token, turned by the token's angles; float32."""
    row = token.to(tl.int64) * 2 * half + half + channel  # the second half of both tables: sin's is not negated
    c = tl.load(cos + row, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + row, mask=inside, other=0.0)[None, :]
    return low * c - high * s, high * c + low * s


@triton.jit
def rotary_kernel(
    x, out, cos, sin, token_stride, head_stride, heads, half, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Some heads of one token. `half` = D / 2; `out` is contiguous."""
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_HALF)
    inside = (head < heads)[:, None] & (channel < half)[None, :]
    place = x + token.to(tl.int64) * token_stride + head[:, None] * head_stride + channel[None, :]
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    low, high = turned(low, high, cos, sin, token, channel, half, channel < half)
    target = out + (token.to(tl.int64) * heads + head[:, None]) * 2 * half + channel[None, :]
    tl.store(target, low.to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, high.to(out.dtype.element_ty), mask=inside)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> [T, H, D] in x's dtype, a new tensor."""
    tokens, heads, width = x.shape
    assert x.stride(2) == 1
    assert width % 2 == 0
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert cos.shape == sin.shape == (tokens, 1, width)
    out = torch.empty(tokens, heads, width, dtype=x.dtype, device=x.device)
    if tokens:
        rotary_kernel[(tokens, triton.cdiv(heads, BLOCK_HEADS))](
            x,
            out,
            cos,
            sin,
            x.stride(0),
            x.stride(1),
            heads,
            width // 2,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_HALF=triton.next_power_of_2(width // 2),
            num_warps=4,
        )
    return out


SHIPPED = tuple(
    Build(
        label=f"{dtype} D{width}",
        kernel=rotary_kernel,
        signature={
            "x": f"*{dtype}",
            "out": f"*{dtype}",
            "cos": "*fp32",
            "sin": "*fp32",
            **dict.fromkeys(("token_stride", "head_stride", "heads", "half"), "i32"),
        },
        constants={"BLOCK_HEADS": BLOCK_HEADS, "BLOCK_HALF": triton.next_power_of_2(width // 2)},
        num_warps=4,
        divisible=("token_stride", "head_stride"),
    )
    for dtype, width in (("bf16", 128), ("fp32", 80))
)
