"""Rounding and narrow formats that kernels share, to the bit alike on every target and in the interpreter.

int8 is symmetric: integer = round(value * 127 / largest of the row), halves to even; scale = largest / 127, as the
CPU's W8A8 has it. A row that is not finite gets the scale NaN, so that whoever reads it sees NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it leaves no room for fractions, and float32's own rounding takes them, halves to even."""


@triton.jit
def round_even(x):
    """Float32 whose magnitude is below 2^22 -> the nearest integer, halves to even, as float32."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def int8_factor(largest):
    """The largest magnitude of a row (float32) -> what its values are multiplied by; 0 for a row of zeros."""
    return tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)


@triton.jit
def to_int8(x, factor):
    """Float32 times `factor` -> int8 in [-127, 127]; NaN gives 0."""
    scaled = x * factor
    whole = round_even(tl.minimum(tl.maximum(scaled, -127.0), 127.0))
    return tl.where(whole == whole, whole, 0.0).to(tl.int8)


@triton.jit
def to_e4m3(x):
    """Float32 -> the bits of float8 e4m3fn (OCP FP8, section 5) as uint8: nearest, halves to even; magnitudes above
    448 become 448, NaN stays NaN. In integers, because sm_80 has no conversion.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), 448.0)
    size = magnitude.to(tl.int32, bitcast=True)
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = round_even(magnitude * 512.0).to(tl.int32)
    code = tl.where(magnitude < 0.015625, small, normal)
    return (sign | tl.where(x == x, code, 0x7F)).to(tl.uint8)
