"""What the quantized products share: how an output is cut into tiles and the inner dimension into splits, which cuts
are tried for which shapes, and the second pass that adds the splits up.

A product of few rows has few tiles; splits of the inner dimension keep all multiprocessors reading. Each split writes
its sums to a workspace [splits, M, N]; they are added in one order, so that a result does not depend on what ran when.
"""
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_WORKSPACE_ELEMENTS = 2**24
"""Of a split product: 64 MiB of sums."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to compute a product."""

    rows: int
    """Of a tile of the output (M)."""
    columns: int
    """Of a tile of the output (N)."""
    inner: int
    """Taken at a time (K)."""
    splits: int
    warps: int
    stages: int

    def fits(self, m: int, n: int, k: int) -> bool:
        """Whether it is worth trying: no tile twice as high as there are rows, no split without work."""
        if self.splits > 1 and self.splits * m * n > MAX_WORKSPACE_ELEMENTS:
            return False
        return (self.rows <= 16 or self.rows < 2 * m) and self.splits * self.inner <= max(k, self.inner)


def candidates(cuts: Sequence[Cut], m: int, n: int, k: int) -> tuple[Cut, ...]:
    """Those of `cuts` that are tried for a product; never none."""
    return tuple(cut for cut in cuts if cut.fits(m, n, k)) or tuple(cuts[:1])


CUTS = (
    Cut(16, 32, 256, 1, 4, 4),
    Cut(16, 64, 128, 1, 4, 5),
    Cut(16, 64, 128, 4, 4, 4),
    Cut(16, 128, 128, 4, 4, 4),
    Cut(32, 64, 128, 2, 4, 4),
    Cut(64, 64, 128, 1, 4, 3),
    Cut(64, 128, 128, 1, 4, 3),
    Cut(128, 128, 128, 1, 8, 3),
)
"""Of int8 products: the first for few rows, bound by reading weights; the last for many, bound by arithmetic."""
WIDE_CUTS = (Cut(128, 256, 64, 1, 8, 3),)
"""Of int8 products from sm_90 on, whose matrix units read shared memory: before, sums and operands exceed the
registers.
"""


@triton.jit
def tile_place(m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of this program's tile: GROUP rows of tiles go column by column, so that what they share of the
    weights is still in cache.
    """
    tile = tl.program_id(0)
    down, across = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    group = tile // (GROUP * across)
    high = tl.minimum(down - group * GROUP, GROUP)
    within = tile % (GROUP * across)
    return group * GROUP + within % high, within // high


@triton.jit(do_not_specialize=["m"])  # 1 would be no tensor; other sizes would compile while requests wait
def finish_kernel(
    sums,
    row_scales,
    column_scales,
    bias,
    out,
    m,
    n,
    splits,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of one row: adds the splits of `sums` [splits, M, N], scales and biases them. `out` [M, N] is
    contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    total = tl.zeros([BLOCK], sums.dtype.element_ty)
    for split in range(0, splits):
        total += tl.load(sums + (split * m.to(tl.int64) + row) * n + column, mask=inside, other=0)
    y = total.to(tl.float32)
    if SCALED:
        y = y * tl.load(row_scales + row) * tl.load(column_scales + column, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + column, y.to(out.dtype.element_ty), mask=inside)


def finish(
    sums: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Sums [splits, M, N], int32 or float32 -> out [M, N]; `scales` of rows and columns."""
    splits, m, n = sums.shape
    row_scales, column_scales = (sums, sums) if scales is None else scales
    finish_kernel[(m, triton.cdiv(n, 1024))](
        sums,
        row_scales,
        column_scales,
        sums if bias is None else bias,
        out,
        m,
        n,
        splits,
        SCALED=scales is not None,
        HAS_BIAS=bias is not None,
        BLOCK=1024,
        num_warps=4,
    )
