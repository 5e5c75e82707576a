"""A token drawn from a whole row of logits (no top-k, min-p or top-p), in passes over a copy that stays in cache.

The definition is `kernels.sampling.draw`'s: inverse CDF over ascending ids, masses summed within stretches of 256 and
then, in float64, over stretches. The exponential is `simd.exp`, not numpy's, so that a uniform within rounding of the
edge between two tokens may draw the other one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .code_cache import once
from .functions import exp
from .simd import (
    W,
    add,
    divide,
    full,
    load,
    load_float,
    max_lanes,
    maximum,
    store,
    store_float,
    subtract,
    sum_lanes,
    where_less,
    zeros,
)
from .target import code_folder, kernel

STRETCH = 256
"""Masses summed together first. A multiple of W."""


@kernel
def _copy(z: int, size: int, row: int) -> int:
    """`size` logits to `row`, padded with -inf to whole vectors; the padded size."""
    whole, padded = size // W * W, (size + W - 1) // W * W
    for i in range(0, whole, W):
        store(row + 4 * i, load(z + 4 * i))
    for i in range(whole, padded):
        store_float(row + 4 * i, load_float(z + 4 * i) if i < size else np.float32(-np.inf))
    return padded


@kernel
def _peak(row: int, padded: int) -> float:
    """The largest logit; NaN where one is NaN or +inf."""
    infinity, one = full(np.float32(np.inf)), full(np.float32(1.0))
    largest, strange = full(np.float32(-np.inf)), zeros()
    for i in range(0, padded, W):
        x = load(row + 4 * i)
        largest = maximum(x, largest)
        strange = add(strange, where_less(x, infinity, zeros(), one))
    if sum_lanes(strange) > 0.0:
        return math.nan
    return max_lanes(largest)


@kernel
def _weigh(row: int, padded: int, peak: float, temperature: float, sums: NDArray[np.float64]) -> float:
    """Logits become masses exp((z - peak) / temperature); their sums by stretch, and the sum of those."""
    highest, divisor, total = full(peak), full(temperature), 0.0
    for first in range(0, padded, STRETCH):
        mass = zeros()
        for i in range(first, min(padded, first + STRETCH), W):
            weight = exp(divide(subtract(load(row + 4 * i), highest), divisor))
            store(row + 4 * i, weight)
            mass = add(mass, weight)
        sums[first // STRETCH] = sum_lanes(mass)
        total += sums[first // STRETCH]
    return total


@kernel
def _find(row: int, padded: int, target: float, sums: NDArray[np.float64]) -> int:
    """The first index whose cumulative mass exceeds `target`; where rounding leaves none, the last that has mass."""
    before, held = 0.0, 0
    for first in range(0, padded, STRETCH):
        mass = sums[first // STRETCH]
        if mass > 0.0:
            held = first
            if before + mass > target:
                break
            before += mass
    last = held
    for i in range(held, min(padded, held + STRETCH)):
        mass = load_float(row + 4 * i)
        if mass > 0.0:
            last = i
            before += mass
            if before > target:
                break
    return last


@kernel
def draw_row(z: int, size: int, temperature: float, u: float, row: int, sums: NDArray[np.float64]) -> int:
    """The index drawn from softmax(z / temperature) with one uniform `u` in [0, 1); -1: the row cannot be drawn from.

    `z`: address of `size` float32; `row`: scratch for `size` float32 padded to W; `sums`: scratch by stretch.
    """
    padded = _copy(z, size, row)
    peak = _peak(row, padded)
    if not -np.inf < peak < np.inf:
        return -1
    return _find(row, padded, u * _weigh(row, padded, peak, temperature, sums), sums)


class RowSampler:
    """Draws from rows of one vocabulary, with its own scratch. One thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._row = np.empty(-(-size // W) * W, dtype=np.float32)
        self._sums = np.empty(-(-size // STRETCH), dtype=np.float64)
        with once(code_folder(), "sampling"):
            self(np.zeros(size, dtype=np.float32), 1.0, 0.0)  # compiles

    def __call__(self, z: NDArray[np.float32], temperature: float, u: float) -> int:
        """The index drawn from one contiguous row [V], which is not changed; -1: it cannot be drawn from."""
        assert z.shape == (self._size,)
        assert z.dtype == np.float32
        assert z.flags.c_contiguous
        index: int = draw_row(z.ctypes.data, self._size, np.float32(temperature), u, self._row.ctypes.data, self._sums)
        return index
