"""Weights in panels: how a matrix lies in memory for `linear`, and how it gets there.

W8A8's weights are symmetric int8 with one scale per output (SmoothQuant [Xiao et al. 2023], §3, per-channel).

    I inputs, O outputs, P panels of NR outputs; a panel's steps as in `tile`
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
    GROUP_LIMIT,
    INT8,
    INT8_DOT,
    NR,
    STEP_BYTES,
    STEP_INPUTS,
    USED_FORMS,
)

KINDS = ("float32", "bfloat16", "w8a8")
"""Kinds of weight, in the order of `tile.USED_FORMS`."""
FIELDS = 10
"""int64 words that describe a packed weight to kernels."""
D_FORM, D_IN, D_OUT, D_PANELS, D_STEPS, D_PANEL_BYTES, D_DATA, D_SCALE, D_BIAS, D_COMPENSATION = range(FIELDS)
PACKING = 4
"""Raised with every change of what lies where in packed arrays (here, in `tile`, in `decoder_weights`)."""
_ALIGN = 64
_NOTHING = np.float32(1e-30)
"""An output whose weights are all below this is nothing: its scale would leave float32's range."""

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
    """w8a8, whose activations are unsigned: [P * NR], 128 times the sum of an output's weights."""

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
        form = form_of(kind)
        panels, steps = _panels(out_features), _steps(form, in_features)
        wanted = {"data": f"{panels * steps * STEP_BYTES[form]} of uint8"}
        if form in (INT8, INT8_DOT):
            wanted["scale"] = f"{panels * NR} of float32"
            wanted["compensation"] = f"{panels * NR} of int32"
        if "bias" in arrays:
            wanted["bias"] = f"{panels * NR} of float32"
        found = {name: f"{array.size} of {array.dtype}" for name, array in arrays.items()}
        if found != wanted:
            raise ValueError(f"packed weight [{out_features}, {in_features}] {kind}: has {found}, not {wanted}")
        if arrays["data"].ctypes.data % _ALIGN:
            raise ValueError(f"packed weight [{out_features}, {in_features}] {kind}: data is not on {_ALIGN} bytes")
        return cls(kind, in_features, out_features, **arrays)


def layout(kind: str) -> str:
    """How weights of a kind are packed on this processor: arrays are good where this is the same."""
    return f"{kind}-{form_of(kind)}x{NR}v{PACKING}"


def form_of(kind: str) -> int:
    """The form of a kind on this processor. ValueError for an unknown kind."""
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
    form = form_of(kind)
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
    pack_int8(weight, data.view(np.int8), scale, sums, _steps(form, in_features) * STEP_INPUTS[form], form == INT8)
    return PackedWeight(kind, in_features, out_features, data, scale, padded_bias, sums * 128)


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
def _largest_group(row, factor, whole):
    """The most that weights of one sign, times `factor` (and rounded, if `whole`), add up to in a group of INT8."""
    largest = np.float32(0)
    for step in range(0, len(row), 8):
        for half in range(step, step + 4, 2):
            positive, negative = np.float32(0), np.float32(0)
            for k in (half, half + 1, half + 4, half + 5):
                if k < len(row):
                    value = row[k] * factor
                    if whole:
                        value = np.rint(value)
                    positive += max(value, np.float32(0))
                    negative -= min(value, np.float32(0))
            largest = max(largest, max(positive, negative))
    return largest


@kernel
def _limited(row, largest):
    """(weight, levels): a weight becomes weight * levels / this one, at most 127, and groups keep `GROUP_LIMIT`.

    Rounding adds at most half to each of four weights: at most two levels less suffice, and often none.
    """
    group = _largest_group(row, np.float32(1), False)
    levels = min(np.float32(GROUP_LIMIT), np.float32(127) * group / largest)
    while _largest_group(row, levels / group, True) > GROUP_LIMIT:
        levels -= np.float32(1)
    return group, levels


@kernel
def pack_int8(w, out, scale, sums, columns, limited):
    """[O, I] -> [P][columns / 4][NR][4] int8, with each output's scale and sum of integers; a missing input is 0.

    An output with a weight that is no finite number has the scale NaN. `limited`: groups keep `GROUP_LIMIT`.
    """
    outputs, inputs = w.shape
    factors = np.empty(NR, np.float32)
    for panel in range((outputs + NR - 1) // NR):
        base = panel * columns * NR
        for j in range(NR):
            o = panel * NR + j
            largest, finite = np.float32(0), True
            if o < outputs:
                for k in range(inputs):
                    largest = max(largest, abs(w[o, k]))
                    finite &= abs(w[o, k]) < np.inf
            if largest < _NOTHING:
                largest = np.float32(0)
            levels = np.float32(127)
            if limited and finite and largest > 0:
                largest, levels = _limited(w[o], largest)
            scale[o] = largest / levels if finite else np.float32(np.nan)
            factors[j] = levels / largest if largest > 0 else np.float32(0)
        for first in range(0, columns, _K_BLOCK):
            for j in range(NR):
                o = panel * NR + j
                for k in range(first, min(first + _K_BLOCK, columns)):
                    value = np.int32(0)
                    if o < outputs and k < inputs:
                        value = np.int32(np.rint(w[o, k] * factors[j]))
                    sums[o] += value
                    out[base + (k // 4 * NR + j) * 4 + k % 4] = np.int8(value)


def describe(packed: PackedWeight) -> NDArray[np.int64]:
    """[FIELDS] int64 for kernels. The caller keeps `packed` alive as long as they may run."""
    form = form_of(packed.kind)
    steps = _steps(form, packed.in_features)

    def address(array: NDArray | None) -> int:
        return 0 if array is None else array.ctypes.data

    words = [form, packed.in_features, packed.out_features, _panels(packed.out_features), steps]
    words += [steps * STEP_BYTES[form], address(packed.data), address(packed.scale), address(packed.bias)]
    return np.array([*words, address(packed.compensation)], np.int64)


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
        scale = simd.load_float(simd.load_int64(desc + 8 * D_SCALE) + 4 * output)
        for k in range(inputs):
            value = simd.load_int8_scalar(data + (k // 4 * NR + j) * 4 + k % 4)
            simd.store_float(to + 4 * k, np.float32(value) * scale)
