"""Root-mean-square and layer normalization of rows, with what stands around them: the residual's addition before, the
int8 quantization of the next product's input after. One program a row; the row stays in registers.

With a residual, x + residual is rounded to the residual's dtype, stored in its place, and that is what is normalized:
fused or not, the numbers are the same. References: `kernels.rms_norm`, `kernels.layer_norm`, `kernels.int8`.

Shapes: `x`, `residual` [T, C], `weight`, `bias` [C]; out [T, C] in x's dtype, or int8 with a float32 scale [T] a row.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cubin import Build
from .numerics import int8_factor, to_int8

MAX_CHANNELS = 32768
"""Of a row that one program holds."""


@triton.jit
def norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    scales,
    x_stride,
    residual_stride,
    channels,
    eps,
    CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. CENTERED: layer norm with bias, else RMS norm. `out` rows are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row * residual_stride + column
        total = (value + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        value = total.to(tl.float32)
    if CENTERED:
        value = tl.where(inside, value - tl.sum(value, 0) / channels, 0.0)
    root = tl.rsqrt(tl.sum(value * value, 0) / channels + eps)
    y = value * root * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZED:
        largest = tl.max(tl.where(y == y, tl.abs(y), 0.0), 0)
        tl.store(out + row * channels + column, to_int8(y, int8_factor(largest)), mask=inside)
        tl.store(scales + row, tl.div_rn(largest, 127.0) + tl.sum(y * 0.0, 0))
    else:
        tl.store(out + row * channels + column, y.to(out.dtype.element_ty), mask=inside)


def warps(channels: int) -> int:
    """Warps for a row: 8 to 16 values a thread, at most 16 warps."""
    return max(1, min(16, triton.next_power_of_2(channels) // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """[T, C] -> [T, C] in x's dtype. A `residual` [T, C] becomes x + residual. ValueError for rows too long."""
    return _launch(x, weight, None, eps, residual, quantized=False)[0]


def rms_norm_int8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm`, its result as (int8 [T, C], float32 scales [T])."""
    return _launch(x, weight, None, eps, residual, quantized=True)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, C] -> [T, C] in x's dtype. A `residual` [T, C] becomes x + residual. ValueError for rows too long."""
    return _launch(x, weight, bias, eps, residual, quantized=False)[0]


def layer_norm_int8(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm`, its result as (int8 [T, C], float32 scales [T])."""
    return _launch(x, weight, bias, eps, residual, quantized=True)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    *,
    quantized: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, channels = x.shape
    if not 0 < channels <= MAX_CHANNELS:
        raise ValueError(f"channels: {channels} is not in 1…{MAX_CHANNELS}")
    assert x.stride(1) == weight.stride(0) == 1
    assert residual is None or (residual.shape == x.shape and residual.stride(1) == 1)
    out = torch.empty(tokens, channels, dtype=torch.int8 if quantized else x.dtype, device=x.device)
    scales = torch.empty(tokens if quantized else 0, dtype=torch.float32, device=x.device)
    if tokens:
        norm_kernel[(tokens,)](
            x,
            x if residual is None else residual,
            weight,
            weight if bias is None else bias,
            out,
            scales,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            channels,
            eps,
            CENTERED=bias is not None,
            HAS_RESIDUAL=residual is not None,
            QUANTIZED=quantized,
            BLOCK=triton.next_power_of_2(channels),
            num_warps=warps(channels),
        )
    return out, scales


def _build(label: str, dtype: str, channels: int, *, centered: bool, residual: bool, quantized: bool) -> Build:
    pointers = {"x": dtype, "residual": dtype, "weight": dtype, "bias": dtype, "scales": "fp32"}
    pointers["out"] = "i8" if quantized else dtype
    sizes = {"x_stride": "i32", "residual_stride": "i32", "channels": "i32", "eps": "fp32"}
    return Build(
        label=f"{label} {dtype} C{channels}" + " residual" * residual + " int8" * quantized,
        kernel=norm_kernel,
        signature={name: f"*{kind}" for name, kind in pointers.items()} | sizes,
        constants={
            "CENTERED": centered,
            "HAS_RESIDUAL": residual,
            "QUANTIZED": quantized,
            "BLOCK": triton.next_power_of_2(channels),
        },
        num_warps=warps(channels),
        divisible=("x_stride", "residual_stride", "channels"),
    )


SHIPPED = (
    _build("rms", "bf16", 4096, centered=False, residual=True, quantized=False),
    _build("rms", "bf16", 8192, centered=False, residual=True, quantized=True),
    _build("rms", "fp32", 4096, centered=False, residual=False, quantized=False),
    _build("layer", "fp16", 12288, centered=True, residual=True, quantized=False),
    _build("layer", "bf16", 32768, centered=True, residual=True, quantized=True),
)
