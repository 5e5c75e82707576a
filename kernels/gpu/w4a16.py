"""y = x W^T + b where weights have 4 bits and a scale for each group of inputs, activations 16: `kernels.int4` says
how they are packed and has the reference. Nibbles are exact in 16 bits; a group's product is scaled after its sum, in
float32.

Shapes: `x` [M, K] bfloat16 or float16, `packed` [N, K / 2] uint8, `scales` [N, K / group] float32, `bias` [N]; out
[M, N] in x's dtype. A group is 32, 64 or 128 inputs and divides K.
"""
# ruff: noqa: N803

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..gpu_plans.tiling import architecture, has_warpgroups
from ..int4 import GROUPS
from .attend import precision, product
from .cubin import Build
from .gemm import Cut, candidates, finish, finish_kernel, tile_place
from .tuning import Tuner, bucket

CUTS = (
    Cut(16, 32, 1, 1, 4, 5),
    Cut(16, 64, 1, 1, 4, 4),
    Cut(16, 64, 1, 4, 4, 4),
    Cut(32, 64, 1, 2, 4, 4),
    Cut(64, 64, 1, 1, 4, 3),
    Cut(64, 128, 1, 1, 4, 3),
)
"""`inner` counts groups, and is 1."""
WIDE_CUTS = (Cut(128, 128, 1, 1, 8, 3),)
"""From sm_90 on; before, sums and operands exceed the registers."""


@triton.jit
def levels_of(nibbles, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Nibbles (int16, 0 to 15) -> nibble - 8, exact. They become the low bits of a number whose last place is 1,
    which costs no conversion: 128 in bfloat16, 1024 in float16 (Kim et al. 2022, "Who Says Elephants Can't Run").
    PRECISION: as in `attend.product`.
    """
    if dtype == tl.bfloat16:
        raised = (nibbles | 0x4300).to(tl.bfloat16, bitcast=True)
        if PRECISION == "wide":
            raised = raised.to(tl.float32)
        levels = raised - 136.0
    else:
        levels = (nibbles | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return levels.to(dtype)


@triton.jit(do_not_specialize=["m"])  # see `gemm.finish_kernel`
def w4a16_kernel(
    x,
    packed,
    scales,
    bias,
    out,
    m,
    n,
    groups,
    x_stride,
    packed_stride,
    scales_stride,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one split, a group (2 * HALF inputs) at a time. With SPLITS > 1, `out` [SPLITS, M, N] float32 takes
    sums.
    """
    tile_row, tile_column = tile_place(m, n, ROWS, COLUMNS, 8)
    split = tl.program_id(1)
    row = tile_row * ROWS + tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    half = tl.arange(0, HALF)
    x_row = x + (row % m).to(tl.int64)[:, None] * x_stride + half[None, :]
    packed_row = packed + (column % n).to(tl.int64)[None, :] * packed_stride + half[:, None]
    scales_row = scales + (column % n).to(tl.int64) * scales_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for group in range(split, groups, SPLITS):
        pairs = tl.load(packed_row + group * HALF).to(tl.int16)
        low = levels_of(pairs & 15, x.dtype.element_ty, PRECISION)
        high = levels_of(pairs >> 4, x.dtype.element_ty, PRECISION)
        sums = product(tl.load(x_row + group * 2 * HALF), low, None, PRECISION)
        sums = product(tl.load(x_row + group * 2 * HALF + HALF), high, sums, PRECISION)
        total += sums * tl.load(scales_row + group)[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    if SPLITS > 1:
        place = out + (split * m.to(tl.int64) + row[:, None]) * n + column[None, :]
        tl.store(place, total, mask=inside)
    else:
        if HAS_BIAS:
            total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        place = out + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def untuned(m: int, n: int, groups: int) -> Cut:
    """A cut that is good enough where nothing was measured."""
    chosen = CUTS[2] if m <= 16 else CUTS[5]
    return chosen if chosen.fits(m, n, groups) else CUTS[1]


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tuner: Tuner | None = None,
    cut: Cut | None = None,
) -> torch.Tensor:
    """[M, K] -> [M, N] in x's dtype. The cut is the given one, else the tuner's, else one that suits most shapes.

    ValueError for a group that no kernel takes.
    """
    (m, k), n, groups = x.shape, packed.shape[0], scales.shape[1]
    if k % groups or k // groups not in GROUPS:
        raise ValueError(
            f"group: {k} inputs in {groups} groups: {k / groups:g} is not one of {', '.join(map(str, GROUPS))}"
        )
    assert packed.shape == (n, k // 2)
    assert x.stride(1) == packed.stride(1) == scales.stride(1) == 1
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not m:
        return out
    run = functools.partial(_launch, x, packed, scales, bias, out)
    if cut is None and tuner is not None:
        cuts = CUTS + WIDE_CUTS if has_warpgroups(architecture(x.device)) else CUTS
        cut = tuner.best(f"w4a16-g{k // groups}", bucket(m, n, k), candidates(cuts, m, n, groups), run)
    run(cut or untuned(m, n, groups))
    return out


def _launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    cut: Cut,
) -> None:
    (m, k), n, groups = x.shape, packed.shape[0], scales.shape[1]
    target = out if cut.splits == 1 else torch.empty(cut.splits, m, n, dtype=torch.float32, device=x.device)
    w4a16_kernel[(triton.cdiv(m, cut.rows) * triton.cdiv(n, cut.columns), cut.splits)](
        x,
        packed,
        scales,
        scales if bias is None else bias,
        target,
        m,
        n,
        groups,
        x.stride(0),
        packed.stride(0),
        scales.stride(0),
        HAS_BIAS=bias is not None,
        SPLITS=cut.splits,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        HALF=k // groups // 2,
        PRECISION=precision(x.dtype),
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if cut.splits > 1:
        finish(target, None, bias, out)


def _build(cut: Cut, dtype: str, group: int, architectures: tuple[int, ...] = (80, 90)) -> Build:
    strides = ("x_stride", "packed_stride", "scales_stride")
    return Build(
        label=f"{dtype} g{group} {cut.rows}x{cut.columns}" + (f" /{cut.splits}" if cut.splits > 1 else ""),
        kernel=w4a16_kernel,
        signature={
            "x": f"*{dtype}",
            "packed": "*u8",
            "scales": "*fp32",
            "bias": f"*{dtype}",
            "out": "*fp32" if cut.splits > 1 else f"*{dtype}",
            **dict.fromkeys(("m", "n", "groups", *strides), "i32"),
        },
        constants={
            "HAS_BIAS": True,
            "SPLITS": cut.splits,
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "HALF": group // 2,
            "PRECISION": precision(torch.bfloat16),
        },
        num_warps=cut.warps,
        num_stages=cut.stages,
        divisible=("n", *strides[:2]),
        architectures=architectures,
    )


SHIPPED = (
    *(_build(cut, "bf16", 128) for cut in CUTS),
    *(_build(cut, "bf16", 128, (90,)) for cut in WIDE_CUTS),
    _build(CUTS[1], "fp16", 32),
    Build(
        label="float32",
        kernel=finish_kernel,
        signature={
            **dict.fromkeys(("sums", "row_scales", "column_scales"), "*fp32"),
            **dict.fromkeys(("bias", "out"), "*bf16"),
            **dict.fromkeys(("m", "n", "splits"), "i32"),
        },
        constants={"SCALED": False, "HAS_BIAS": True, "BLOCK": 1024},
        num_warps=4,
        divisible=("n",),
    ),
)
