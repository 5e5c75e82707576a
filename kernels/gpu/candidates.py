"""Which tokens of rows of logits can be drawn at all: many programs a row, each with a stretch of the vocabulary, since
one alone would wait for memory most of the time. Three launches, each of which adds up what the one before found:

1. `peaks_kernel`: a stretch's largest logit, and whether the row is a distribution;
2. `masses_kernel`: number and mass of a stretch's tokens above each of 16 logits; the row's sums tell a logit below
   which nothing can be kept. Of a row that cuts nothing off the mass alone;
3. `collect_kernel`: copies what is above together, in order of ids: a few hundred tokens of a vocabulary. Where a
   stretch's begin is known from the numbers of those before it.

Tokens are compared by `key`, the bits of |x| of logits x <= 0 relative to the peak: integers that grow as x falls. Sums
of stretches are added in one order, and how a row is cut depends on the vocabulary alone: a token never depends on the
batch.

Shapes: R rows, V vocabulary, P stretches; logits [R, V] float32.
"""
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..gpu_plans.draws import GREEDY_TEMPERATURE, INFINITE, NOT_A_NUMBER, NOTHING, TILE, Wants
from .cubin import Build

WARPS = 8
WIDE_WARPS = 16
"""For `WIDE_TILE`."""
_TILES = 4
"""Of a stretch, at least."""
_MOST_STRETCHES = 64
POINTS = tl.constexpr(16)
GREEDY = tl.constexpr(GREEDY_TEMPERATURE)
ALL = tl.constexpr(0x7F800000)
"""The key of -inf: at or before it is every token."""
NONE = tl.constexpr(0x7FFFFFFF)
_NOTHING, _INFINITE, _NOT_A_NUMBER = (tl.constexpr(code) for code in (NOTHING, INFINITE, NOT_A_NUMBER))


@triton.jit
def best_of(z, size, TILE: tl.constexpr):
    """The largest of a row, the lowest id that has it, and what keeps the row from being a distribution: 0 (nothing) or
    the negative code of it, the last of those above that is so.
    """
    lane = tl.arange(0, TILE)
    top = tl.full([TILE], float("-inf"), tl.float32)
    place = tl.zeros([TILE], tl.int32)
    fault = tl.zeros([TILE], tl.int32)
    for first in range(0, size, TILE):
        x = tl.load(z + first + lane, mask=first + lane < size, other=float("-inf"))
        fault = tl.minimum(fault, tl.where(x < float("inf"), 0, tl.where(x == x, _INFINITE, _NOT_A_NUMBER)))
        better = x > top
        place = tl.where(better, first + lane, place)
        top = tl.where(better, x, top)
    peak = tl.max(top, 0)
    best = tl.min(tl.where(top == peak, place, NONE), 0)
    worst = tl.min(fault, 0)
    return peak, best, tl.where((worst == 0) & (peak == float("-inf")), _NOTHING, worst)


@triton.jit
def key_of(x):
    """Int32 that grows as x <= 0 falls."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def tile_of(source, first, count, shift, divisor, TILE: tl.constexpr):
    """Keys and masses of one tile of a list; past its end the key is above all and the mass 0."""
    i = first + tl.arange(0, TILE)
    x = tl.div_rn(
        tl.load(source + i, mask=i < count, other=float("-inf")) - shift, tl.zeros([TILE], tl.float32) + divisor
    )
    return tl.where(i < count, key_of(x), NONE), tl.where(i < count, tl.exp(x), 0.0)


@triton.jit
def standing(source, count, shift, divisor, edges, TILE: tl.constexpr):
    """Of a list: mass (float64) and number (float64) of the tokens at or before each of 16 keys."""
    mass = tl.zeros([POINTS], tl.float64)
    number = tl.zeros([POINTS], tl.float64)
    for first in range(0, count, TILE):
        key, m = tile_of(source, first, count, shift, divisor, TILE)
        kept = key[:, None] <= edges[None, :]
        mass += tl.sum(tl.where(kept, m[:, None], 0.0), 0).to(tl.float64)
        number += tl.sum(kept.to(tl.int32), 0).to(tl.float64)
    return mass, number


@triton.jit
def at(values, index):
    """One of 16."""
    return tl.sum(tl.where(tl.arange(0, POINTS) == index, values, values * 0), 0)


@triton.jit
def edges_of(min_p_log):
    """The 16 keys that a row is looked at: of |x| 1, 1.4, 2, … 91; the 15th what min-p leaves, the last all."""
    point = tl.arange(0, POINTS)
    edges = key_of(tl.exp2(point.to(tl.float32) * 0.5))
    return tl.where(point == 14, key_of(min_p_log), tl.where(point == 15, ALL, edges))


@triton.jit
def cuts_off(top_k, min_p_log, top_p, size, EVERY: tl.constexpr):
    """Whether a row asks for less than the whole distribution, or EVERY row is treated as if it did."""
    asks = ((top_k > 0) & (top_k < size)) | (min_p_log > float("-inf")) | (top_p < 1.0)
    if EVERY:
        asks = asks | (size > 0)
    return asks


@triton.jit
def peak_of(peaks, places, faults, row, parts, PARTS: tl.constexpr):
    """Of a row, from its stretches: the largest logit, its lowest id, and what keeps it from being a distribution."""
    part = tl.arange(0, PARTS)
    place = row * parts + part
    top = tl.load(peaks + place, mask=part < parts, other=float("-inf"))
    peak = tl.max(top, 0)
    best = tl.load(places + place, mask=(part < parts) & (top == peak), other=NONE)
    worst = tl.min(tl.load(faults + place, mask=part < parts, other=0), 0)
    nothing = tl.where(peak == float("-inf"), _NOTHING, 0)
    return peak, tl.min(best, 0), tl.where(worst < _NOTHING, worst, nothing)


@triton.jit
def bound_of(masses, numbers, row, parts, size, top_k, min_p_log, top_p, PARTS: tl.constexpr):
    """Of a row, from its stretches: which of the 16 keys it is behind which nothing is kept, how many tokens are at or
    before it, and the mass that min-p alone leaves.
    """
    part, point = tl.arange(0, PARTS), tl.arange(0, POINTS)
    place = (row * parts + part)[:, None] * POINTS + point[None, :]
    mass = tl.sum(tl.load(masses + place, mask=(part < parts)[:, None], other=0.0), 0)
    number = tl.sum(tl.load(numbers + place, mask=(part < parts)[:, None], other=0.0), 0)
    edges = edges_of(min_p_log)
    left = at(mass, 14)
    if (top_k > 0) & (top_k < size):
        bound = tl.min(tl.where(number >= top_k.to(tl.float64), edges, ALL), 0)
    else:
        target = tl.where(top_p < 1.0, top_p * left, float("inf"))
        bound = tl.min(tl.where(mass >= target, edges, ALL), 0)
    bound = tl.minimum(bound, at(edges, 14))
    index = tl.min(tl.where(edges == bound, point, 15), 0)
    return index, at(number, index).to(tl.int32), left


@triton.jit
def copied_together(z, first, count, peak, temperature, bound, kept, ids, TILE: tl.constexpr):
    """Copies a stretch's tokens at or before a key, as logits relative to the peak and ids, in order of ids."""
    lane = tl.arange(0, TILE)
    copied = count * 0
    for tile in range(0, count, TILE):
        i = tile + lane
        raw = tl.load(z + i, mask=i < count, other=float("-inf")) - peak
        x = tl.div_rn(raw, tl.zeros([TILE], tl.float32) + temperature)
        chosen = (key_of(x) <= bound) & (i < count)
        place = copied + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(kept + place, x, mask=chosen)
        tl.store(ids + place, first + i, mask=chosen)
        copied += tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def peaks_kernel(logits, peaks, places, faults, row_stride, size, stretch, TILE: tl.constexpr):
    """One stretch of one row: its `best_of`."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = part * stretch
    count = tl.minimum(stretch, size - first)
    peak, best, fault = best_of(logits + row * row_stride + first, count, TILE)
    place = row * tl.num_programs(1) + part
    tl.store(peaks + place, peak)
    tl.store(places + place, first + best)
    tl.store(faults + place, fault)


@triton.jit
def masses_kernel(
    logits,
    temperatures,
    top_ks,
    min_p_logs,
    top_ps,
    peaks,
    places,
    faults,
    masses,
    numbers,
    row_stride,
    size,
    stretch,
    EVERY: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One stretch of one row that is drawn: `masses`, `numbers` [R, P, 16] of what stands at or before each key. EVERY:
    as if every row cut something off; else one that does not has its mass in all of them.
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    peak, _best, fault = peak_of(peaks, places, faults, row, parts, PARTS)
    temperature = tl.load(temperatures + row)
    if (fault == 0) & (temperature >= GREEDY):
        count = tl.minimum(stretch, size - part * stretch)
        z = logits + row * row_stride + part * stretch
        top_k, min_p_log, top_p = tl.load(top_ks + row), tl.load(min_p_logs + row), tl.load(top_ps + row)
        place = (row * parts + part) * POINTS + tl.arange(0, POINTS)
        if cuts_off(top_k, min_p_log, top_p, size, EVERY):
            mass, number = standing(z, count, peak, temperature, edges_of(min_p_log), TILE)
            tl.store(masses + place, mass)
            tl.store(numbers + place, number)
        else:
            total = tl.zeros([POINTS], tl.float64)
            for first in range(0, count, TILE):
                _key, m = tile_of(z, first, count, peak, temperature, TILE)
                total += tl.sum(m, 0).to(tl.float64)
            tl.store(masses + place, total)


@triton.jit
def collect_kernel(
    logits,
    temperatures,
    top_ks,
    min_p_logs,
    top_ps,
    peaks,
    places,
    faults,
    masses,
    numbers,
    kept,
    ids,
    row_stride,
    size,
    stretch,
    EVERY: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One stretch of one row that cuts something off (EVERY: of any that is drawn): what may be kept of it goes behind
    what the stretches before it keep, in `kept` and `ids` [R, V].
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    peak, _best, fault = peak_of(peaks, places, faults, row, parts, PARTS)
    temperature = tl.load(temperatures + row)
    top_k, min_p_log, top_p = tl.load(top_ks + row), tl.load(min_p_logs + row), tl.load(top_ps + row)
    if (fault == 0) & (temperature >= GREEDY) & cuts_off(top_k, min_p_log, top_p, size, EVERY):
        index, _number, _left = bound_of(masses, numbers, row, parts, size, top_k, min_p_log, top_p, PARTS)
        earlier = tl.arange(0, PARTS)
        held = tl.load(numbers + (row * parts + earlier) * POINTS + index, mask=earlier < part, other=0.0)
        begin = row * size + tl.sum(held, 0).to(tl.int64)
        first = part * stretch
        copied_together(
            logits + row * row_stride + first,
            first,
            tl.minimum(stretch, size - first),
            peak,
            temperature,
            at(edges_of(min_p_log), index),
            kept + begin,
            ids + begin,
            TILE,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What the three launches leave on the device."""

    peaks: torch.Tensor
    """[R, P] float32, with `places` and `faults` [R, P] int32: `peaks_kernel`'s."""
    places: torch.Tensor
    faults: torch.Tensor
    masses: torch.Tensor
    """[R, P, 16] float64, as `numbers`: `masses_kernel`'s."""
    numbers: torch.Tensor
    kept: torch.Tensor
    """[R, V] float32, with `ids` int32: `collect_kernel`'s; no elements where no row asks for it."""
    ids: torch.Tensor
    stretch: int
    """Tokens."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order in which kernels take them."""
        return (self.peaks, self.places, self.faults, self.masses, self.numbers, self.kept, self.ids)

    @property
    def padded(self) -> int:
        """PARTS: P as a power of two."""
        return triton.next_power_of_2(self.peaks.shape[1])


def stretch_of(size: int, tile: int) -> int:
    """Tokens of a program's stretch."""
    return tile * max(_TILES, triton.cdiv(size, _MOST_STRETCHES * tile))


def candidates(logits: torch.Tensor, wants: Wants, tile: int, *, cuts: bool, every: bool) -> Candidates:
    """Of rows [R, V]. `cuts`: whether any may cut something off; `every`: all are treated as if they did."""
    rows, size = logits.shape
    stretch = stretch_of(size, tile)
    parts = triton.cdiv(size, stretch)

    def made(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    collected = size if cuts else 0
    found = Candidates(
        peaks=made(rows, parts, dtype=torch.float32),
        places=made(rows, parts, dtype=torch.int32),
        faults=made(rows, parts, dtype=torch.int32),
        masses=made(rows, parts, POINTS.value, dtype=torch.float64),
        numbers=made(rows, parts, POINTS.value, dtype=torch.float64),
        kept=made(rows, collected, dtype=torch.float32),
        ids=made(rows, collected, dtype=torch.int32),
        stretch=stretch,
    )
    grid, strides = (rows, parts), (logits.stride(0), size, stretch)
    asked, tensors = wants.tensors()[:4], found.tensors()
    peaks_kernel[grid](logits, *tensors[:3], *strides, TILE=tile, num_warps=WARPS)
    how = {"EVERY": every, "TILE": tile, "PARTS": found.padded, "num_warps": WARPS}
    masses_kernel[grid](logits, *asked, *tensors[:5], *strides, **how)
    if cuts:
        collect_kernel[grid](logits, *asked, *tensors, *strides, **how)
    return found


ASKED = {"temperatures": "*fp32", "top_ks": "*i32", "min_p_logs": "*fp32", "top_ps": "*fp64"}
FOUND = {
    "peaks": "*fp32",
    **dict.fromkeys(("places", "faults"), "*i32"),
    **dict.fromkeys(("masses", "numbers"), "*fp64"),
    "kept": "*fp32",
    "ids": "*i32",
}
"""Types of what kernels are given, for those that are compiled without a GPU."""
_STRIDES = dict.fromkeys(("row_stride", "size", "stretch"), "i32")
_COUNTED = {"logits": "*fp32", **ASKED, **{name: FOUND[name] for name in list(FOUND)[:5]}, **_STRIDES}
_HOW = {"EVERY": False, "TILE": TILE, "PARTS": 32}
SHIPPED = (
    Build(
        label="float32",
        kernel=peaks_kernel,
        signature={"logits": "*fp32", **{name: FOUND[name] for name in list(FOUND)[:3]}, **_STRIDES},
        constants={"TILE": TILE},
        num_warps=WARPS,
        divisible=tuple(_STRIDES),
    ),
    Build(
        label="float32",
        kernel=masses_kernel,
        signature=_COUNTED,
        constants=_HOW,
        num_warps=WARPS,
        divisible=tuple(_STRIDES),
    ),
    Build(
        label="float32",
        kernel=collect_kernel,
        signature={**_COUNTED, "kept": "*fp32", "ids": "*i32"},
        constants=_HOW,
        num_warps=WARPS,
        divisible=tuple(_STRIDES),
    ),
)
