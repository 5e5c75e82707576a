"""y = x W^T + b where both are int8: weights with one scale an output channel, activations with one a token
(SmoothQuant [Xiao et al. 2023], section 3). Sums are int32 and exact, so that every cut of the product gives the same
bits. Reference: `kernels.int8.w8a8_linear_reference`; `norm` and `activation` make the quantized activations.

Shapes: `x` [M, K] int8, `weight` [N, K] int8, scales [M] and [N] float32, `bias` [N]; out [M, N] bfloat16 or as asked.
"""
# ruff: noqa: N803

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..gpu_plans.tiling import architecture, has_warpgroups
from .cubin import Build
from .gemm import CUTS, WIDE_CUTS, Cut, candidates, finish, finish_kernel, tile_place
from .tuning import Tuner, bucket

MAX_INNER = 2**31 // (128 * 128)
"""Longer sums might leave int32."""


@triton.jit(do_not_specialize=["m"])  # see `gemm.finish_kernel`
def w8a8_kernel(
    x,
    weight,
    x_scales,
    weight_scales,
    bias,
    out,
    m,
    n,
    k,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of one split. With SPLITS > 1, `out` [SPLITS, M, N] int32 takes sums; else [M, N] takes results."""
    tile_row, tile_column = tile_place(m, n, ROWS, COLUMNS, 8)
    split = tl.program_id(1)
    row = tile_row * ROWS + tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    x_row = x + (row % m).to(tl.int64)[:, None] * x_stride
    weight_row = weight + (column % n).to(tl.int64)[None, :] * weight_stride
    total = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(split * INNER, k, SPLITS * INNER):
        here = first + inner
        a = tl.load(x_row + here[None, :], mask=here[None, :] < k, other=0)
        b = tl.load(weight_row + here[:, None], mask=here[:, None] < k, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    inside = (row < m)[:, None] & (column < n)[None, :]
    if SPLITS > 1:
        place = out + (split * m.to(tl.int64) + row[:, None]) * n + column[None, :]
        tl.store(place, total, mask=inside)
    else:
        y = total.to(tl.float32) * tl.load(x_scales + row, mask=row < m, other=0.0)[:, None]
        y = y * tl.load(weight_scales + column, mask=column < n, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        place = out + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(place, y.to(out.dtype.element_ty), mask=inside)


def w8a8_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tuner: Tuner | None = None,
    cut: Cut | None = None,
) -> torch.Tensor:
    """[M, K] -> [M, N] in `dtype`. The cut is the given one, else the tuner's, else one that suits most shapes.

    ValueError where K is so long that sums might leave int32.
    """
    (m, k), n = x.shape, weight.shape[0]
    if k > MAX_INNER:
        raise ValueError(f"in_features: {k} is not in 1…{MAX_INNER}")
    assert weight.shape == (n, k)
    assert x.dtype == weight.dtype == torch.int8
    assert x.stride(1) == weight.stride(1) == 1
    assert x_scales.is_contiguous()
    assert weight_scales.is_contiguous()
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m:
        return out
    run = functools.partial(_launch, x, x_scales, weight, weight_scales, bias, out)
    if cut is None and tuner is not None:
        cuts = CUTS + WIDE_CUTS if has_warpgroups(architecture(x.device)) else CUTS
        cut = tuner.best("w8a8", bucket(m, n, k), candidates(cuts, m, n, k), run)
    run(cut or untuned(m, n, k))
    return out


def untuned(m: int, n: int, k: int) -> Cut:
    """A cut that is good enough where nothing was measured."""
    chosen = CUTS[2] if m <= 16 else CUTS[5] if m <= 64 else CUTS[7]
    return chosen if chosen.fits(m, n, k) else CUTS[1]


def _launch(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    cut: Cut,
) -> None:
    (m, k), n = x.shape, weight.shape[0]
    target = out if cut.splits == 1 else torch.empty(cut.splits, m, n, dtype=torch.int32, device=x.device)
    w8a8_kernel[(triton.cdiv(m, cut.rows) * triton.cdiv(n, cut.columns), cut.splits)](
        x,
        weight,
        x_scales,
        weight_scales,
        x_scales if bias is None else bias,
        target,
        m,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        SPLITS=cut.splits,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        INNER=cut.inner,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if cut.splits > 1:
        finish(target, (x_scales, weight_scales), bias, out)


def _build(cut: Cut, architectures: tuple[int, ...] = (80, 90)) -> Build:
    return Build(
        label=f"{cut.rows}x{cut.columns}x{cut.inner}" + (f" /{cut.splits}" if cut.splits > 1 else ""),
        kernel=w8a8_kernel,
        signature={
            **dict.fromkeys(("x", "weight"), "*i8"),
            **dict.fromkeys(("x_scales", "weight_scales"), "*fp32"),
            **dict.fromkeys(("m", "n", "k", "x_stride", "weight_stride"), "i32"),
            "bias": "*bf16",
            "out": "*i32" if cut.splits > 1 else "*bf16",
        },
        constants={
            "HAS_BIAS": True,
            "SPLITS": cut.splits,
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "INNER": cut.inner,
        },
        num_warps=cut.warps,
        num_stages=cut.stages,
        divisible=("n", "k", "x_stride", "weight_stride"),
        architectures=architectures,
    )


SHIPPED = (
    *map(_build, CUTS),
    *(_build(cut, (90,)) for cut in WIDE_CUTS),
    Build(
        label="int32",
        kernel=finish_kernel,
        signature={
            "sums": "*i32",
            **dict.fromkeys(("row_scales", "column_scales"), "*fp32"),
            **dict.fromkeys(("bias", "out"), "*bf16"),
            **dict.fromkeys(("m", "n", "splits"), "i32"),
        },
        constants={"SCALED": True, "HAS_BIAS": True, "BLOCK": 1024},
        num_warps=4,
        divisible=("n",),
    ),
)
