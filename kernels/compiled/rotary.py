"""Rotary position embedding in the half-split layout (formula and reference: `kernels.rotary`).

table   float32 [T, D]: of each token the D/2 cosines, then the D/2 sines
x       address of neighbouring heads of one token, float32 [heads, D], turned in place
"""

from __future__ import annotations

import math

import numpy as np

from .simd import W, fma, load_float, load_int64, load_part, multiply, negative, store_float, store_part
from .target import kernel


@kernel
def rotary_table(positions: int, first: int, last: int, frequencies: int, head_dim: int, table: int) -> None:
    """Rows first … last-1 of `table`, from int64 positions and D/2 float32 frequencies (radians per position)."""
    half = head_dim // 2
    for token in range(first, last):
        position = np.float32(load_int64(positions + 8 * token))
        row = table + 4 * token * head_dim
        for i in range(half):
            angle = float(position * load_float(frequencies + 4 * i))
            store_float(row + 4 * i, np.float32(math.cos(angle)))
            store_float(row + 4 * (half + i), np.float32(math.sin(angle)))


@kernel
def rotate(x: int, heads: int, head_dim: int, row: int) -> None:
    """Pairs (a, b) = (x[i], x[i + D/2]) become (a cos - b sin, b cos + a sin), with the token's row of the table."""
    half = head_dim // 2
    for i in range(0, half, W):
        count = min(W, half - i)
        cos = load_part(row + 4 * i, count)
        sin = load_part(row + 4 * (half + i), count)
        for head in range(heads):
            at = x + 4 * (head * head_dim + i)
            a, b = load_part(at, count), load_part(at + 4 * half, count)
            store_part(at, fma(a, cos, negative(multiply(b, sin))), count)
            store_part(at + 4 * half, fma(b, cos, multiply(a, sin)), count)
