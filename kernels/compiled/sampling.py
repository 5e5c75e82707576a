"""Tokens drawn from rows of logits, all rows of a step in one call: in passes over copies that stay in cache.

The definition is `kernels.sampling`'s: top-k, min-p and top-p, each on what the one before left, ties as there; then
the inverse CDF over ascending ids, masses summed within stretches of 256 and, in float64, over stretches. No row looks
at another. The exponential is `functions.exp`, not numpy's, so that a uniform within rounding of the edge between two
tokens may draw the other one.

Nothing is sorted but the few tokens around the last one that is kept: how many tokens, or how much mass, stands at or
above a logit is one pass, and bisection of that logit closes in on the last one.

    V vocabulary, x logits minus the row's peak, divided by the temperature (all at most 0), m = exp(x)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..philox import Purpose, checked_words
from .code_cache import once
from .functions import exp
from .philox import first_lanes
from .simd import (
    W,
    add,
    divide,
    full,
    load,
    load_float,
    load_part,
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
CLOSE = 512
"""Tokens that are sorted to find the last one that is kept; more are bisected once more."""
WANTS = 5
TEMPERATURE, UNIFORM, TOP_K, MIN_P, TOP_P = range(WANTS)
"""What is wanted of a row: temperature (not 0), uniform in [0, 1), and the cuts; 0, 0 and 1 cut nothing off."""
_ALL = -1
"""Ties that `_keep` leaves: all."""
_LOWEST = np.float32(-1e30)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@kernel
def _peak(z: int, size: int) -> float:
    """The largest logit; NaN where one is NaN or +inf."""
    infinity, one = full(np.float32(np.inf)), full(np.float32(1.0))
    largest, strange, whole = full(np.float32(-np.inf)), zeros(), size // W * W
    for i in range(0, whole, W):
        x = load(z + 4 * i)
        largest = maximum(x, largest)
        strange = add(strange, where_less(x, infinity, zeros(), one))
    peak = max_lanes(largest)
    if whole < size:
        strange = add(strange, where_less(load_part(z + 4 * whole, size - whole), infinity, zeros(), one))
    for i in range(whole, size):
        peak = max(peak, load_float(z + 4 * i))
    return math.nan if sum_lanes(strange) > 0.0 else peak


@kernel
def _weigh(z: int, size: int, peak: float, temperature: float, x: int, m: int, tops: Floats, sums: Doubles) -> float:
    """Writes x and m, padded with -inf and 0 to whole vectors; the largest x and the sum of m of each stretch. Returns
    the sum of those sums.
    """
    highest, divisor, total = full(peak), full(temperature), 0.0
    whole, padded = size // W * W, (size + W - 1) // W * W
    for i in range(whole, padded):
        store_float(x + 4 * i, load_float(z + 4 * i) if i < size else np.float32(-np.inf))
    for first in range(0, padded, STRETCH):
        mass, top = zeros(), full(np.float32(-np.inf))
        for i in range(first, min(padded, first + STRETCH), W):
            scaled = divide(subtract(load(z + 4 * i if i < whole else x + 4 * i), highest), divisor)
            weight = exp(scaled)
            store(x + 4 * i, scaled)
            store(m + 4 * i, weight)
            mass = add(mass, weight)
            top = maximum(scaled, top)
        tops[first // STRETCH] = max_lanes(top)
        sums[first // STRETCH] = sum_lanes(mass)
        total += sums[first // STRETCH]
    return total


@kernel
def _standing(x: int, m: int, padded: int, tops: Floats, low: float) -> tuple[float, float]:
    """The mass and the number of the tokens whose x is `low` or more."""
    edge, one, mass, count = full(low), full(np.float32(1.0)), 0.0, 0.0
    for first in range(0, padded, STRETCH):
        if tops[first // STRETCH] < low:
            continue
        masses, counts = zeros(), zeros()
        for i in range(first, min(padded, first + STRETCH), W):
            here = load(x + 4 * i)
            masses = add(masses, where_less(here, edge, zeros(), load(m + 4 * i)))
            counts = add(counts, where_less(here, edge, zeros(), one))
        mass += sum_lanes(masses)
        count += sum_lanes(counts)
    return mass, count


@kernel
def _collect(x: int, m: int, padded: int, tops: Floats, low: float, high: float, close: Floats) -> int:
    """The tokens with low <= x < high into `close` [2, CLOSE], x and m, largest first; how many. They fit."""
    count = 0
    for first in range(0, padded, STRETCH):
        if tops[first // STRETCH] < low:
            continue
        for i in range(first, min(padded, first + STRETCH)):
            here = load_float(x + 4 * i)
            if low <= here < high:
                close[0, count], close[1, count] = here, load_float(m + 4 * i)
                count += 1
    gap = count // 2
    while gap > 0:  # Shell's sort
        for i in range(gap, count):
            key, mass, j = close[0, i], close[1, i], i
            while j >= gap and close[0, j - gap] < key:
                close[0, j], close[1, j] = close[0, j - gap], close[1, j - gap]
                j -= gap
            close[0, j], close[1, j] = key, mass
        gap //= 2
    return count


@kernel
def _last(x: int, m: int, padded: int, tops: Floats, target: float, by_mass: bool, close: Floats) -> tuple[float, int]:
    """The x of the last of the most likely tokens that together reach `target` (of mass, or of number), and how many
    of those that equal it are among them; (-inf, 0): all tokens are needed.
    """
    high, low, above, over = np.float32(1.0), np.float32(-1.0), 0.0, 0.0
    while True:
        mass, under = _standing(x, m, padded, tops, low)
        reached = mass if by_mass else under
        if reached >= target:
            break
        if low < _LOWEST:
            return -np.inf, 0
        high, above, over, low = low, reached, under, low * np.float32(2.0)
    while under - over > CLOSE:
        middle = np.float32(low + (high - low) * np.float32(0.5))
        if middle in (low, high):  # neighbors: what is between is equal to `low`
            break
        mass, count = _standing(x, m, padded, tops, middle)
        reached = mass if by_mass else count
        if reached >= target:
            low, under = middle, count
        else:
            high, above, over = middle, reached, count
    last, ties = low, 0
    if under - over <= CLOSE:
        count = _collect(x, m, padded, tops, low, high, close)
        for i in range(count):
            ties = ties + 1 if i > 0 and close[0, i] == last else 1
            last = close[0, i]
            above += close[1, i] if by_mass else 1.0
            if above >= target:
                break
        return float(last), ties
    each = max_lanes(exp(full(low))) if by_mass else 1.0
    while above < target:
        above += each
        ties += 1
    return float(last), ties


@kernel
def _keep(x: int, m: int, padded: int, last: float, ties: int, tops: Floats, sums: Doubles) -> float:
    """Takes the mass of what is below `last`, and of all but the first `ties` that equal it (negative: of none of
    these); what is left.
    """
    edge, total = full(last), 0.0
    for first in range(0, padded, STRETCH):
        end, mass = min(padded, first + STRETCH), zeros()
        if tops[first // STRETCH] < last:
            for i in range(first, end, W):
                store(m + 4 * i, zeros())
        else:
            if ties >= 0:
                for i in range(first, end):
                    if load_float(x + 4 * i) == last:
                        if ties == 0:
                            store_float(x + 4 * i, -np.inf)
                        else:
                            ties -= 1
            for i in range(first, end, W):
                weight = where_less(load(x + 4 * i), edge, zeros(), load(m + 4 * i))
                store(m + 4 * i, weight)
                mass = add(mass, weight)
        sums[first // STRETCH] = sum_lanes(mass)
        total += sums[first // STRETCH]
    return total


@kernel
def _find(m: int, padded: int, target: float, sums: Doubles) -> int:
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
        mass = load_float(m + 4 * i)
        if mass > 0.0:
            last = i
            before += mass
            if before > target:
                break
    return last


@kernel
def draw_rows(
    rows: NDArray[np.int64],
    size: int,
    wants: Doubles,
    x: int,
    m: int,
    tops: Floats,
    sums: Doubles,
    close: Floats,
    drawn: NDArray[np.int64],
) -> None:
    """Addresses of rows [R] of `size` float32 and `wants` [R, WANTS] -> indices; -1: the row is no distribution."""
    padded = (size + W - 1) // W * W
    for r in range(len(rows)):
        peak = _peak(rows[r], size)
        if not -np.inf < peak < np.inf:
            drawn[r] = -1
            continue
        total = _weigh(rows[r], size, peak, wants[r, TEMPERATURE], x, m, tops, sums)
        for cut in (TOP_K, MIN_P, TOP_P):
            wanted, last, ties = wants[r, cut], 0.0, _ALL
            if wanted >= 1.0 if cut == TOP_P else wanted <= 0.0 or (cut == TOP_K and wanted >= size):
                continue
            if cut == MIN_P:
                last = float(np.float32(math.log(wanted)))
            else:
                last, ties = _last(x, m, padded, tops, wanted * total if cut == TOP_P else wanted, cut == TOP_P, close)
            total = _keep(x, m, padded, last, ties if cut == TOP_P else _ALL, tops, sums)
        drawn[r] = _find(m, padded, wants[r, UNIFORM] * total, sums)


@kernel
def normalize_rows(rows: NDArray[np.int64], size: int, normalizers: Doubles) -> None:
    """Addresses of rows [R] of `size` float32 -> log(sum(exp(row))); NaN: the row is no distribution."""
    for r in range(len(rows)):
        z, whole, total = rows[r], size // W * W, 0.0
        peak = _peak(z, size)
        highest = full(peak)
        for first in range(0, whole, STRETCH):
            mass = zeros()
            for i in range(first, min(whole, first + STRETCH), W):
                mass = add(mass, exp(subtract(load(z + 4 * i), highest)))
            total += sum_lanes(mass)
        for i in range(whole, size):
            total += max_lanes(exp(full(load_float(z + 4 * i) - peak)))
        normalizers[r] = peak + math.log(total) if -np.inf < peak < np.inf else math.nan


class RowSampler:
    """Draws from rows of one vocabulary, with its own scratch. One thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        padded, stretches = -(-size // W) * W, -(-size // STRETCH)
        self._x = np.empty(padded, dtype=np.float32)
        self._m = np.empty(padded, dtype=np.float32)
        self._tops = np.empty(stretches, dtype=np.float32)
        self._sums = np.empty(stretches, dtype=np.float64)
        self._close = np.empty((2, CLOSE), dtype=np.float32)
        row = [np.zeros(size, dtype=np.float32)]
        with once(code_folder(), "sampling"):  # compiles
            self.draw(row, np.array([[1.0, 0.0, 0.0, 0.0, 1.0]]))
            self.normalizers(row)
            self.uniforms([0], [0], [0])

    def uniforms(self, seeds: Sequence[int], choices: Sequence[int], indices: Sequence[int]) -> list[float]:
        """Lane 0 of `kernels.philox.uniform_batch` for drawing tokens. ValueError as there."""
        out = np.empty(len(seeds), dtype=np.float64)
        first_lanes(*checked_words(seeds, choices, indices), int(Purpose.SAMPLE), out)
        values: list[float] = out.tolist()
        return values

    def draw(self, rows: Sequence[Floats], wants: Doubles) -> list[int]:
        """The index drawn from each of R rows [V], which are not changed, by `wants` [R, WANTS]; -1: it cannot be drawn
        from.
        """
        assert wants.shape == (len(rows), WANTS)
        drawn = np.empty(len(rows), dtype=np.int64)
        x, m = self._x.ctypes.data, self._m.ctypes.data
        draw_rows(self._addresses(rows), self._size, wants, x, m, self._tops, self._sums, self._close, drawn)
        indices: list[int] = drawn.tolist()
        return indices

    def normalizers(self, rows: Sequence[Floats]) -> list[float]:
        """log(sum(exp(row))) of each row [V]; NaN where that is no finite number."""
        out = np.empty(len(rows), dtype=np.float64)
        normalize_rows(self._addresses(rows), self._size, out)
        values: list[float] = out.tolist()
        return values

    def _addresses(self, rows: Sequence[Floats]) -> NDArray[np.int64]:
        for row in rows:
            assert row.shape == (self._size,)
            assert row.dtype == np.float32
            assert row.strides == (4,)
        return np.array([row.ctypes.data for row in rows], dtype=np.int64)
