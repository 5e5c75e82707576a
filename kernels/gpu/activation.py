"""The MLP's nonlinearity, plain or gated, and the int8 quantization of the next product's input. Reference:
`kernels.activation`, `kernels.int8`.

Shapes: plain [T, F] -> [T, F]; gated [T, 2F] (gate, then up) -> [T, F], in x's dtype, or int8 with a float32 scale
[T] a row.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cubin import Build
from .numerics import int8_factor, to_int8

FUNCTIONS = {"silu": 0, "relu": 1, "gelu": 2}
_NONE = 3
"""What is quantized as it is."""
BLOCK = 1024
"""Values of a row that are computed together."""
INT8_BLOCK = 4096
"""The same where a program takes a whole row."""


@triton.jit
def activated(x, row, column, inside, stride, features, FUNCTION: tl.constexpr, GATED: tl.constexpr):
    """Float32 results of one stretch of a row."""
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if FUNCTION == 0:
        shrunk = tl.exp(-tl.abs(value))  # never overflows
        y = value * tl.div_rn(tl.where(value < 0, shrunk, 1.0), 1.0 + shrunk)
    elif FUNCTION == 1:
        y = tl.where(value <= 0, 0.0, value)  # NaN stays
    elif FUNCTION == 3:
        y = value
    else:
        y = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    if GATED:
        y *= tl.load(x + row * stride + features + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def activation_kernel(x, out, stride, features, FUNCTION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """One stretch of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    y = activated(x, row, column, inside, stride, features, FUNCTION, GATED)
    tl.store(out + row * features + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activation_int8_kernel(
    x, out, scales, stride, features, FUNCTION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: its largest magnitude, then its integers; computed twice, because a row may be longer than registers."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK], tl.float32)
    strange = tl.zeros([BLOCK], tl.float32)
    for first in range(0, features, BLOCK):
        column = first + tl.arange(0, BLOCK)
        y = activated(x, row, column, column < features, stride, features, FUNCTION, GATED)
        top = tl.maximum(top, tl.where(y == y, tl.abs(y), 0.0))
        strange += y * 0.0
    largest = tl.max(top, 0)
    factor = int8_factor(largest)
    for first in range(0, features, BLOCK):
        column = first + tl.arange(0, BLOCK)
        y = activated(x, row, column, column < features, stride, features, FUNCTION, GATED)
        tl.store(out + row * features + column, to_int8(y, factor), mask=column < features)
    tl.store(scales + row, tl.div_rn(largest, 127.0) + tl.sum(strange, 0))


def activation(x: torch.Tensor, name: str, *, gated: bool) -> torch.Tensor:
    """As `activation_reference`, in x's dtype. ValueError for an unknown name."""
    tokens, features, function = _shape(x, name, gated)
    out = torch.empty(tokens, features, dtype=x.dtype, device=x.device)
    if tokens:
        grid = (tokens, triton.cdiv(features, BLOCK))
        activation_kernel[grid](x, out, x.stride(0), features, FUNCTION=function, GATED=gated, BLOCK=BLOCK, num_warps=4)
    return out


def activation_int8(x: torch.Tensor, name: str, *, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`activation`, its result as (int8 [T, F], float32 scales [T])."""
    tokens, features, function = _shape(x, name, gated)
    return _to_int8(x, tokens, features, function, gated=gated)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, C] -> (int8 [T, C], float32 scales [T]), as `kernels.int8.quantize_rows_reference`."""
    assert x.stride(1) == 1
    tokens, features = x.shape
    return _to_int8(x, tokens, features, _NONE, gated=False)


def _to_int8(
    x: torch.Tensor, tokens: int, features: int, function: int, *, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(tokens, features, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        activation_int8_kernel[(tokens,)](
            x, out, scales, x.stride(0), features, FUNCTION=function, GATED=gated, BLOCK=INT8_BLOCK, num_warps=8
        )
    return out, scales


def _shape(x: torch.Tensor, name: str, gated: bool) -> tuple[int, int, int]:
    if name not in FUNCTIONS:
        raise ValueError(f"activation: {name!r} is not one of {sorted(FUNCTIONS)}")
    tokens, width = x.shape
    assert x.stride(1) == 1
    return tokens, width // 2 if gated else width, FUNCTIONS[name]


SHIPPED = tuple(
    Build(
        label=f"{name} {dtype}{' gated' if gated else ''}",
        kernel=kernel,
        signature={"x": f"*{dtype}", "stride": "i32", "features": "i32", **outputs},
        constants={"FUNCTION": FUNCTIONS[name], "GATED": gated, "BLOCK": block},
        num_warps=num_warps,
        divisible=("stride", "features"),
    )
    for name, dtype, gated in (("silu", "bf16", True), ("relu", "fp16", False), ("gelu", "fp32", False))
    for kernel, block, num_warps, outputs in (
        (activation_kernel, BLOCK, 4, {"out": f"*{dtype}"}),
        (activation_int8_kernel, INT8_BLOCK, 8, {"out": "*i8", "scales": "*fp32"}),
    )
)
