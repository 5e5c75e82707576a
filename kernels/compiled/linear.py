"""y = x W^T + b over packed weights: float32 in and out; weights in float32, bfloat16 or int8 (W8A8).

W8A8: weights symmetric int8, one scale per output; activations symmetric int8, one scale per token, found as it comes
(LLM.int8() [Dettmers et al. 2022] without outliers; SmoothQuant [Xiao et al. 2023], §3, per-token and per-channel).
Integer sums are exact.

Every rank of a team computes its own panels of outputs for all rows. Rows go in blocks that stay in the second-level
cache, a block in tiles of nearly equal height (`tile`); the weights of a panel stay in the first-level cache between a
block's tiles. A row's result is the same to the bit whatever other rows, ranks and blocks there are.

    T rows (tokens), I inputs, O outputs, P panels of NR outputs
"""

from __future__ import annotations

import numpy as np

from . import simd
from .packed import (
    D_BIAS,
    D_COMPENSATION,
    D_DATA,
    D_FORM,
    D_IN,
    D_PANEL_BYTES,
    D_PANELS,
    D_SCALE,
    D_STEPS,
    Floats,
    PackedWeight,
    describe,
    form_of,
    padded,
)
from .target import kernel
from .tile import (
    BF16,
    BF16_DOT,
    FLOAT32,
    MAX_ROWS,
    NR,
    PANELS_AT_ONCE,
    X_STEP_BYTES,
    run_tile,
)

BLOCK_BYTES = 192 * 1024
"""x of one block of rows: leaves half of a second-level cache to weights and sums."""
AHEAD_BYTES = 4096
"""How far weights are fetched before they are used. Without it a few rows run at half the memory's speed."""
_ALIGN = 64


@kernel(inline=True)
def _staged_row_bytes(form, inputs):
    """Bytes of one row of x as the tiles read it; 0 where they read the caller's."""
    if form in (FLOAT32, BF16):
        return 0
    size = 2 if form == BF16_DOT else 1
    return (inputs + _STAGED - 1) // _STAGED * _STAGED * size


_STAGED = max(simd.W, 8)
"""Staged rows are whole vectors of inputs."""


@kernel(inline=True)
def _block_rows(form, inputs):
    """Rows of a block: as many tiles as `BLOCK_BYTES` hold, at least one."""
    row_bytes = max(_staged_row_bytes(form, inputs), 4)
    if form in (FLOAT32, BF16):
        row_bytes = 4 * inputs
    return max(BLOCK_BYTES // row_bytes // MAX_ROWS, 1) * MAX_ROWS


def scratch_bytes(kind: str, in_features: int, rows: int) -> int:
    """Scratch that one rank needs for `linear` with up to so many rows."""
    form = form_of(kind)
    staged = _staged_row_bytes(form, in_features)
    return min(rows, _block_rows(form, in_features)) * (staged + 4) + 2 * _ALIGN if staged else 0


@kernel
def quantize_row(x, inputs, staged):
    """One row of float32 -> int8 in [-127, 127], as uint8 with 128 added; returns its scale: NaN, and so
    the row's every output, where an input is no finite number.

    Writes whole vectors; what lies behind the last input is 128.
    """
    largest, strange = simd.zeros(), simd.zeros()
    for k in range(0, inputs, simd.W):
        values = simd.load_part(x + 4 * k, min(simd.W, inputs - k))
        largest = simd.maximum(simd.absolute(values), largest)
        strange = simd.fma(values, simd.zeros(), strange)
    top = simd.max_lanes(largest)
    factor = simd.full(np.float32(127) / top if top > 0 else np.float32(0))
    offset = simd.full_i32(128)
    for k in range(0, inputs, simd.W):
        values = simd.load_part(x + 4 * k, min(simd.W, inputs - k))
        integers = simd.to_int(simd.multiply(values, factor))
        simd.store_int8(staged + k, simd.add_i32(integers, offset))
    return top / np.float32(127) + simd.sum_lanes(strange)


@kernel
def _stage(form, inputs, x, ldx, rows, staged, row_bytes, scales):
    """Rows of x as the tiles of a form read them."""
    for r in range(rows):
        source, target = x + 4 * r * ldx, staged + r * row_bytes
        if form == BF16_DOT:
            for k in range(0, inputs, simd.W):
                simd.store_bf16(target + 2 * k, simd.load_part(source + 4 * k, min(simd.W, inputs - k)))
        else:
            simd.store_float(scales + 4 * r, quantize_row(source, inputs, target))


@kernel
def _block(desc, x, x_row, scales, rows, y, ldy, accumulate, first, last):
    """One block of rows times the panels first … last - 1."""
    form, steps = simd.load_int64(desc + 8 * D_FORM), simd.load_int64(desc + 8 * D_STEPS)
    panel_bytes, data = simd.load_int64(desc + 8 * D_PANEL_BYTES), simd.load_int64(desc + 8 * D_DATA)
    bias, scale = simd.load_int64(desc + 8 * D_BIAS), simd.load_int64(desc + 8 * D_SCALE)
    compensation = simd.load_int64(desc + 8 * D_COMPENSATION)
    step_bytes = panel_bytes // steps
    tiles = (rows + MAX_ROWS - 1) // MAX_ROWS
    low, high_tiles = rows // tiles, rows % tiles
    group = PANELS_AT_ONCE[low]
    for panel in range(first, last, group):
        end = min(panel + group, last)
        row = 0
        for tile in range(tiles):
            height = low + 1 if tile < high_tiles else low
            at_once = PANELS_AT_ONCE[height]
            p = panel
            while p < end:
                width = at_once if end - p >= at_once else 1
                column = 4 * p * NR
                run_tile(
                    form,
                    height,
                    width,
                    steps,
                    x + row * x_row,
                    x_row,
                    X_STEP_BYTES[form],
                    data + p * panel_bytes,
                    panel_bytes,
                    y + 4 * row * ldy + column,
                    4 * ldy,
                    accumulate,
                    bias + column if bias else 0,
                    scales + 4 * row,
                    scale + column,
                    compensation + column,
                    # The next panel's weights come in evenly while all tiles of this one run.
                    data + p * panel_bytes + AHEAD_BYTES + panel_bytes * (tiles - 1 + tile) // tiles,
                    step_bytes // tiles,
                )
                p += width
            row += height


@kernel
def linear(desc, x, ldx, rows, y, ldy, accumulate, rank, ranks, scratch):
    """y[T, this rank's outputs] = (accumulate: +=) x W^T + b.

    `desc`: address of `describe`'s words. `x`, `y`: addresses of [T, I] and [T, padded(O)] float32; `ldx`, `ldy`:
    elements from row to row. y holds whole panels (`padded`): the columns behind O are written too (0, or 0 added).
    `scratch`: `scratch_bytes` of this rank's own. Rank r of n computes panels P r / n … P (r + 1) / n - 1.
    """
    form, inputs = simd.load_int64(desc + 8 * D_FORM), simd.load_int64(desc + 8 * D_IN)
    panels = simd.load_int64(desc + 8 * D_PANELS)
    first, last = panels * rank // ranks, panels * (rank + 1) // ranks
    row_bytes, block = _staged_row_bytes(form, inputs), _block_rows(form, inputs)
    staged = (scratch + _ALIGN - 1) // _ALIGN * _ALIGN
    scales = staged + min(rows, block) * row_bytes
    for row in range(0, rows, block):
        count = min(block, rows - row)
        x_block, y_block = x + 4 * row * ldx, y + 4 * row * ldy
        if row_bytes:
            _stage(form, inputs, x_block, ldx, count, staged, row_bytes, scales)
            _block(desc, staged, row_bytes, scales, count, y_block, ldy, accumulate, first, last)
        else:
            _block(desc, x_block, 4 * ldx, scales, count, y_block, ldy, accumulate, first, last)


def product(packed: PackedWeight, x_TI: Floats) -> Floats:  # noqa: N803
    """[T, I] float32 -> [T, O] float32 on the calling thread; for callers in Python."""
    x = np.ascontiguousarray(x_TI, np.float32)
    rows, inputs = x.shape
    assert inputs == packed.in_features, (inputs, packed.in_features)
    y = np.empty((rows, padded(packed.out_features)), np.float32)
    scratch, words = np.empty(scratch_bytes(packed.kind, inputs, rows), np.uint8), describe(packed)
    columns = y.shape[1]
    linear(words.ctypes.data, x.ctypes.data, inputs, rows, y.ctypes.data, columns, 0, 0, 1, scratch.ctypes.data)
    return y[:, : packed.out_features]
