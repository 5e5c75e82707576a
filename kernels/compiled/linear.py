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

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import simd
from .target import kernel
from .tile import (
    BF16,
    BF16_DOT,
    FLOAT32,
    INT8,
    INT8_DOT,
    MAX_ROWS,
    NR,
    PANELS_AT_ONCE,
    STEP_BYTES,
    STEP_INPUTS,
    USED_FORMS,
    X_STEP_BYTES,
    run_tile,
)

KINDS = ("float32", "bfloat16", "w8a8")
"""Kinds of weight, in the order of `tile.USED_FORMS`."""
FIELDS = 10
"""int64 words that describe a packed weight to kernels."""
D_FORM, D_IN, D_OUT, D_PANELS, D_STEPS, D_PANEL_BYTES, D_DATA, D_SCALE, D_BIAS, D_COMPENSATION = range(FIELDS)
BLOCK_BYTES = 192 * 1024
"""x of one block of rows: leaves half of a second-level cache to weights and sums."""
AHEAD_BYTES = 4096
"""How far weights are fetched before they are used. Without it a few rows run at half the memory's speed."""
_ALIGN = 64
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in panels. Arrays may be read-only views of a file; `data` lies on 64 bytes."""

    kind: str
    """One of `KINDS`."""
    in_features: int
    out_features: int
    data: Bytes
    """The panels, as `tile` reads them."""
    scale: Floats | None = None
    """w8a8: [P * NR], one per output."""
    bias: Floats | None = None
    """[P * NR]."""
    compensation: NDArray[np.int32] | None = None
    """w8a8 where activations are unsigned: [P * NR], 128 times the sum of an output's weights."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, NDArray]:
        """What there is of `data`, `scale`, `bias` and `compensation`, by name."""
        named = {"data": self.data, "scale": self.scale, "bias": self.bias, "compensation": self.compensation}
        return {name: array for name, array in named.items() if array is not None}

    @classmethod
    def from_arrays(cls, kind: str, in_features: int, out_features: int, arrays: Mapping[str, NDArray]) -> PackedWeight:
        """The inverse of `arrays`, for a machine with the same `layout`. ValueError if they do not fit."""
        form = _form(kind)
        panels, steps = _panels(out_features), _steps(form, in_features)
        wanted = {"data": panels * steps * STEP_BYTES[form]}
        if form in (INT8, INT8_DOT):
            wanted["scale"] = panels * NR
        if form == INT8_DOT:
            wanted["compensation"] = panels * NR
        if "bias" in arrays:
            wanted["bias"] = panels * NR
        sizes = {name: array.size for name, array in arrays.items()}
        if sizes != wanted:
            raise ValueError(f"packed weight [{out_features}, {in_features}] {kind}: has {sizes}, not {wanted}")
        return cls(kind, in_features, out_features, **arrays)


def layout(kind: str) -> str:
    """How weights of a kind are packed on this processor: arrays are good where this is the same."""
    return f"{kind}-{_form(kind)}x{NR}"


def _form(kind: str) -> int:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    return USED_FORMS[KINDS.index(kind)]


def _panels(out_features: int) -> int:
    return -(-out_features // NR)


def _steps(form: int, in_features: int) -> int:
    return -(-in_features // STEP_INPUTS[form])


def padded(out_features: int) -> int:
    """Columns that a row of y must hold: whole panels."""
    return _panels(out_features) * NR


def aligned_empty(nbytes: int) -> Bytes:
    """Uninitialized bytes on a cache line's boundary."""
    raw = np.empty(nbytes + _ALIGN, np.uint8)
    first = -raw.ctypes.data % _ALIGN
    return raw[first : first + nbytes]


def pack_weight(weight_OI: Floats, kind: str, bias: Floats | None = None) -> PackedWeight:  # noqa: N803
    """Pack [O, I] float32 weights (and [O] bias) for this processor. ValueError for a wrong kind or shape."""
    form = _form(kind)
    out_features, in_features = weight_OI.shape
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias: {bias.shape} does not fit weights {weight_OI.shape}")
    weight = np.ascontiguousarray(weight_OI, np.float32)
    columns = padded(out_features)
    panel_bytes = _steps(form, in_features) * STEP_BYTES[form]
    data = aligned_empty(columns // NR * panel_bytes)
    padded_bias = None if bias is None else np.pad(bias.astype(np.float32), (0, columns - out_features))
    if form == FLOAT32:
        pack_float32(weight, data.view(np.float32))
        return PackedWeight(kind, in_features, out_features, data, bias=padded_bias)
    if form in (BF16, BF16_DOT):
        pack = pack_bf16 if form == BF16 else pack_bf16_dot
        pack(weight.view(np.uint32), data.view(np.uint16))
        return PackedWeight(kind, in_features, out_features, data, bias=padded_bias)
    scale, sums = np.zeros(columns, np.float32), np.zeros(columns, np.int32)
    pack_int8(weight, data.view(np.int8), scale, sums, STEP_INPUTS[form])
    compensation = sums * 128 if form == INT8_DOT else None
    return PackedWeight(kind, in_features, out_features, data, scale, padded_bias, compensation)


_K_BLOCK = 16
"""Inputs that packing takes from one row before the next: a cache line."""


@kernel
def pack_float32(w, out):
    """[O, I] -> [P][I][NR]."""
    outputs, inputs = w.shape
    for panel in range((outputs + NR - 1) // NR):
        base = panel * inputs * NR
        for first in range(0, inputs, _K_BLOCK):
            for j in range(NR):
                o = panel * NR + j
                for k in range(first, min(first + _K_BLOCK, inputs)):
                    out[base + k * NR + j] = w[o, k] if o < outputs else np.float32(0)


@kernel(inline=True)
def _bf16_bits(bits):
    """A float32's bits -> the nearest bfloat16's, ties to even; NaN stays NaN."""
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def pack_bf16(w, out):
    """[O, I] float32's bits -> [P][I][W][2]: outputs j and j + W side by side."""
    outputs, inputs = w.shape
    for panel in range((outputs + NR - 1) // NR):
        base = panel * inputs * NR
        for first in range(0, inputs, _K_BLOCK):
            for j in range(NR):
                o, place = panel * NR + j, 2 * (j % simd.W) + j // simd.W
                for k in range(first, min(first + _K_BLOCK, inputs)):
                    out[base + k * NR + place] = _bf16_bits(w[o, k]) if o < outputs else np.uint16(0)


@kernel
def pack_bf16_dot(w, out):
    """[O, I] float32's bits -> [P][I / 2][NR][2]: inputs 2s and 2s + 1 side by side; a missing input is 0."""
    outputs, inputs = w.shape
    steps = (inputs + 1) // 2
    for panel in range((outputs + NR - 1) // NR):
        base = panel * steps * NR * 2
        for first in range(0, 2 * steps, _K_BLOCK):
            for j in range(NR):
                o = panel * NR + j
                for k in range(first, min(first + _K_BLOCK, 2 * steps)):
                    there = o < outputs and k < inputs
                    out[base + (k // 2 * NR + j) * 2 + k % 2] = _bf16_bits(w[o, k]) if there else np.uint16(0)


@kernel
def pack_int8(w, out, scale, sums, group):
    """[O, I] -> [P][I / group][NR][group] int8, with each output's scale and sum of integers; a missing input is 0."""
    outputs, inputs = w.shape
    steps = (inputs + group - 1) // group
    factors = np.empty(NR, np.float32)
    for panel in range((outputs + NR - 1) // NR):
        base = panel * steps * NR * group
        for j in range(NR):
            o = panel * NR + j
            largest = np.float32(0)
            if o < outputs:
                for k in range(inputs):
                    largest = max(largest, abs(w[o, k]))
            scale[o] = largest / np.float32(127)
            factors[j] = np.float32(127) / largest if largest > 0 else np.float32(0)
        for first in range(0, steps * group, _K_BLOCK):
            for j in range(NR):
                o = panel * NR + j
                for k in range(first, min(first + _K_BLOCK, steps * group)):
                    value = np.int32(0)
                    if o < outputs and k < inputs:
                        value = np.int32(np.rint(w[o, k] * factors[j]))
                    sums[o] += value
                    out[base + (k // group * NR + j) * group + k % group] = np.int8(value)


def describe(packed: PackedWeight) -> NDArray[np.int64]:
    """[FIELDS] int64 for kernels. The caller keeps `packed` alive as long as they may run."""
    form = _form(packed.kind)
    steps = _steps(form, packed.in_features)

    def address(array: NDArray | None) -> int:
        return 0 if array is None else array.ctypes.data

    words = [form, packed.in_features, packed.out_features, _panels(packed.out_features), steps]
    words += [steps * STEP_BYTES[form], address(packed.data), address(packed.scale), address(packed.bias)]
    return np.array([*words, address(packed.compensation)], np.int64)


@kernel(inline=True)
def _staged_row_bytes(form, inputs):
    """Bytes of one row of x as the tiles read it; 0 where they read the caller's."""
    if form in (FLOAT32, BF16):
        return 0
    size = 1 if form == INT8_DOT else 2
    return (inputs + _STAGED - 1) // _STAGED * _STAGED * size


_STAGED = max(simd.W, 4)
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
    form = _form(kind)
    staged = _staged_row_bytes(form, in_features)
    return min(rows, _block_rows(form, in_features)) * (staged + 4) + 2 * _ALIGN if staged else 0


@kernel
def quantize_row(x, inputs, staged, unsigned):
    """One row of float32 -> int8 in [-127, 127] as int16, or as uint8 with 128 added; returns its scale.

    Writes whole vectors; what lies behind the last input is 0 (or 128).
    """
    largest = simd.zeros()
    for k in range(0, inputs, simd.W):
        largest = simd.maximum(simd.absolute(simd.load_part(x + 4 * k, min(simd.W, inputs - k))), largest)
    top = simd.max_lanes(largest)
    factor = simd.full(np.float32(127) / top if top > 0 else np.float32(0))
    offset = simd.full_i32(128)
    for k in range(0, inputs, simd.W):
        values = simd.load_part(x + 4 * k, min(simd.W, inputs - k))
        integers = simd.to_int(simd.multiply(values, factor))
        if unsigned:
            simd.store_int8(staged + k, simd.add_i32(integers, offset))
        else:
            simd.store_int16(staged + 2 * k, integers)
    return top / np.float32(127)


@kernel
def _stage(form, inputs, x, ldx, rows, staged, row_bytes, scales):
    """Rows of x as the tiles of a form read them."""
    for r in range(rows):
        source, target = x + 4 * r * ldx, staged + r * row_bytes
        if form == BF16_DOT:
            for k in range(0, inputs, simd.W):
                simd.store_bf16(target + 2 * k, simd.load_part(source + 4 * k, min(simd.W, inputs - k)))
        else:
            simd.store_float(scales + 4 * r, quantize_row(source, inputs, target, form == INT8_DOT))


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
                    X_STEP_BYTES,
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


@kernel
def unpack_output(desc, output, to):
    """[I] float32 to `to`: the weights of one output, as they are stored. The row of a tied embedding."""
    form, inputs = simd.load_int64(desc + 8 * D_FORM), simd.load_int64(desc + 8 * D_IN)
    panel, j = output // NR, output % NR
    data = simd.load_int64(desc + 8 * D_DATA) + panel * simd.load_int64(desc + 8 * D_PANEL_BYTES)
    if form == FLOAT32:
        for k in range(inputs):
            simd.store_float(to + 4 * k, simd.load_float(data + 4 * (k * NR + j)))
    elif form == BF16:
        place = 2 * (j % simd.W) + j // simd.W
        for k in range(inputs):
            simd.store_float(to + 4 * k, simd.load_bf16_float(data + 2 * (k * NR + place)))
    elif form == BF16_DOT:
        for k in range(inputs):
            simd.store_float(to + 4 * k, simd.load_bf16_float(data + 2 * ((k // 2 * NR + j) * 2 + k % 2)))
    else:
        group = 4 if form == INT8_DOT else 2
        scale = simd.load_float(simd.load_int64(desc + 8 * D_SCALE) + 4 * output)
        for k in range(inputs):
            value = simd.load_int8_scalar(data + (k // group * NR + j) * group + k % group)
            simd.store_float(to + 4 * k, np.float32(value) * scale)


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
