"""Tokens from rows of logits, one program a row, without sorting: the definition is `kernels.sampling`'s (top-k,
min-p and top-p, each on what the one before left, ties as there, then the inverse CDF over ascending ids) and the
draws are `kernels.philox`'s. Sums run in another order than the CPU's, so that a uniform within rounding of the edge
between two tokens may draw the other one; all else is equal.

How a row goes:

1. its peak, and whether it is a distribution at all; a temperature below 1e-5 takes the likeliest token, the lowest id
   of equals, and is done;
2. number and mass of the tokens above each of 16 logits, in one pass: from them a logit below which nothing can be
   kept;
3. what is above is copied together, in order of ids: a few hundred tokens of a vocabulary;
4. of these, number or mass at 16 points between two bounds tells which sixteenth holds the last token that is kept;
   eight times that is a single float32 (pivots instead of a sort: Park et al. 2026, "Qrita", section 3);
5. the tile in which the cumulative mass passes the uniform's, then the token in it.

Tokens are compared by `key`, the bits of |x| of logits x <= 0 relative to the peak: integers that grow as x falls.

Shapes: R rows, V vocabulary; logits [R, V] float32.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_plans.draws import GREEDY_TEMPERATURE, INFINITE, NOT_A_NUMBER, NOTHING, TILE, Wants
from .cubin import Build
from .draws import SAMPLE, uniform

WARPS = 8
_POINTS = tl.constexpr(16)
_GREEDY = tl.constexpr(GREEDY_TEMPERATURE)
_ALL = tl.constexpr(0x7F800000)
"""The key of -inf: at or before it is every token."""
_NONE = tl.constexpr(0x7FFFFFFF)
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
    best = tl.min(tl.where(top == peak, place, _NONE), 0)
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
    return tl.where(i < count, key_of(x), _NONE), tl.where(i < count, tl.exp(x), 0.0)


@triton.jit
def standing(source, count, shift, divisor, edges, TILE: tl.constexpr):
    """Of a list: mass (float64) and number (float64) of the tokens at or before each of 16 keys."""
    mass = tl.zeros([_POINTS], tl.float64)
    number = tl.zeros([_POINTS], tl.float64)
    for first in range(0, count, TILE):
        key, m = tile_of(source, first, count, shift, divisor, TILE)
        kept = key[:, None] <= edges[None, :]
        mass += tl.sum(tl.where(kept, m[:, None], 0.0), 0).to(tl.float64)
        number += tl.sum(kept.to(tl.int32), 0).to(tl.float64)
    return mass, number


@triton.jit
def at(values, index):
    """One of 16."""
    return tl.sum(tl.where(tl.arange(0, _POINTS) == index, values, values * 0), 0)


@triton.jit
def last_kept(source, count, high, target, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The lowest key at or before which tokens of a list reach `target` (of mass, or of number), at most `high`, and
    what stands before it.
    """
    point = tl.arange(0, _POINTS)
    low = high * 0 - 1
    before = target * 0.0
    while high - low > 1:
        edges = (low + (high - low) * (point + 1).to(tl.int64) // 16).to(tl.int32)
        mass, number = standing(source, count, 0.0, 1.0, edges, TILE)
        reached = mass if BY_MASS else number
        first = tl.min(tl.where(reached >= target, point, 15), 0)
        before = tl.where(first > 0, at(reached, first - 1), before)
        low = tl.where(first > 0, at(edges, first - 1).to(tl.int64), low)
        high = at(edges, first).to(tl.int64)
    return high, before


@triton.jit
def bound_of(z, size, peak, temperature, top_k, min_p_log, top_p, TILE: tl.constexpr):
    """A key behind which nothing is kept, and the mass that min-p alone leaves: from one pass over the row."""
    point = tl.arange(0, _POINTS)
    likely = key_of(min_p_log)
    edges = key_of(tl.exp2(point.to(tl.float32) * 0.5))  # |x| of 1, 1.4, 2, … 91
    edges = tl.where(point == 14, likely, tl.where(point == 15, _ALL, edges))
    mass, number = standing(z, size, peak, temperature, edges, TILE)
    left = at(mass, 14)
    if (top_k > 0) & (top_k < size):
        bound = tl.min(tl.where(number >= top_k.to(tl.float64), edges, _ALL), 0)
    else:
        target = tl.where(top_p < 1.0, top_p * left, float("inf"))
        bound = tl.min(tl.where(mass >= target, edges, _ALL), 0)
    return tl.minimum(bound, likely), left


@triton.jit
def copied_together(z, size, peak, temperature, bound, kept, ids, TILE: tl.constexpr):
    """Copies the tokens at or before a key, as logits relative to the peak and ids, in order of ids; how many."""
    lane = tl.arange(0, TILE)
    count = size * 0
    for first in range(0, size, TILE):
        i = first + lane
        raw = tl.load(z + i, mask=i < size, other=float("-inf")) - peak
        x = tl.div_rn(raw, tl.zeros([TILE], tl.float32) + temperature)
        chosen = (key_of(x) <= bound) & (i < size)
        place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(kept + place, x, mask=chosen)
        tl.store(ids + place, i, mask=chosen)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def cut(kept, count, left, top_k, min_p_log, top_p, size, TILE: tl.constexpr):
    """Of a list (`left`: the mass that min-p alone leaves): the key of the last token that top-k, min-p and top-p
    keep, and how many tokens that have it are kept.
    """
    limit = key_of(min_p_log).to(tl.int64)
    if (top_k > 0) & (top_k < size):
        found, _ = last_kept(kept, count, limit * 0 + _ALL, top_k.to(tl.float64), False, TILE)
        limit = tl.minimum(limit, found)
        mass, _ = standing(kept, count, 0.0, 1.0, tl.zeros([_POINTS], tl.int32) + limit.to(tl.int32), TILE)
        left = at(mass, 0)
    ties = count * 0 + _NONE
    if top_p < 1.0:
        target = top_p * left
        limit, before = last_kept(kept, count, limit, target, True, TILE)
        each = tl.exp(-limit.to(tl.int32).to(tl.float32, bitcast=True)).to(tl.float64)
        wanted = tl.where(each > 0.0, (target - before) / tl.where(each > 0.0, each, 1.0), 1.0)
        ties = tl.maximum(tl.ceil(tl.minimum(wanted, 1e9)), 1.0).to(tl.int32)
    return limit.to(tl.int32), ties


@triton.jit
def kept_mass(key, m, last, ties, seen):
    """Masses of one tile after the cut, and how many of it have the key `last`; `seen`: how many had it in earlier
    tiles.
    """
    tied = key == last
    rank = seen + tl.cumsum(tied.to(tl.int32), 0)
    return tl.where((key < last) | (tied & (rank <= ties)), m, 0.0), tl.sum(tied.to(tl.int32), 0)


@triton.jit
def mass_of(source, count, shift, divisor, last, ties, TILE: tl.constexpr):
    """Of a list, float64: what the cut leaves. Tiles of float32 sums, added one after another."""
    total = tl.zeros([1], tl.float64)
    seen = count * 0
    for first in range(0, count, TILE):
        key, m = tile_of(source, first, count, shift, divisor, TILE)
        mass, tied = kept_mass(key, m, last, ties, seen)
        total += tl.sum(mass, 0).to(tl.float64)
        seen += tied
    return tl.sum(total, 0)


@triton.jit
def pick(source, count, shift, divisor, last, ties, target, TILE: tl.constexpr):
    """Of a list: the first index whose cumulative mass exceeds `target`; where rounding leaves none, the last that
    has mass.
    """
    before = target * 0.0
    reached = target * 0.0
    held, held_seen, seen = count * 0, count * 0, count * 0
    first = count * 0
    while first < count:
        key, m = tile_of(source, first, count, shift, divisor, TILE)
        mass, tied = kept_mass(key, m, last, ties, seen)
        tile = tl.sum(mass, 0).to(tl.float64)
        if tile > 0.0:
            held, held_seen, before = first, seen, reached
        reached += tile
        seen += tied
        first += tl.where(reached > target, count, TILE)  # found: it is over
    key, m = tile_of(source, held, count, shift, divisor, TILE)
    mass, _ = kept_mass(key, m, last, ties, held_seen)
    passed = (before + tl.cumsum(mass.to(tl.float64), 0) > target) & (mass > 0.0)
    lane = tl.arange(0, TILE)
    found = tl.min(tl.where(passed, lane, _NONE), 0)
    return held + tl.where(found < _NONE, found, tl.max(tl.where(mass > 0.0, lane, 0), 0))


@triton.jit
def sample_kernel(
    logits,
    temperatures,
    top_ks,
    min_p_logs,
    top_ps,
    seeds,
    choices,
    indices,
    drawn,
    kept,
    ids,
    row_stride,
    size,
    TILE: tl.constexpr,
):
    """One row -> its token, or what keeps the row from being a distribution. `kept`, `ids`: scratch [R, V]."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * row_stride
    temperature = tl.load(temperatures + row)
    top_k, min_p_log, top_p = tl.load(top_ks + row), tl.load(min_p_logs + row), tl.load(top_ps + row)
    peak, token, fault = best_of(z, size, TILE)
    if (fault == 0) & (temperature >= _GREEDY):
        u = uniform(tl.load(seeds + row), tl.load(choices + row), tl.load(indices + row), SAMPLE)
        is_cut = ((top_k > 0) & (top_k < size)) | (min_p_log > float("-inf")) | (top_p < 1.0)
        source, count, shift, divisor = z, size, peak, temperature
        last, ties = size * 0 + _ALL, size * 0 + _NONE
        if is_cut:
            bound, left = bound_of(z, size, peak, temperature, top_k, min_p_log, top_p, TILE)
            source, shift, divisor = kept + row * size, peak * 0.0, temperature * 0.0 + 1.0
            count = copied_together(z, size, peak, temperature, bound, source, ids + row * size, TILE)
            last, ties = cut(source, count, left, top_k, min_p_log, top_p, size, TILE)
        total = mass_of(source, count, shift, divisor, last, ties, TILE)
        token = pick(source, count, shift, divisor, last, ties, u * total, TILE)
        if is_cut:
            token = tl.load(ids + row * size + token)
    tl.store(drawn + row, tl.where(fault == 0, token, fault))


@triton.jit
def probabilities_kernel(
    logits, temperatures, top_ks, min_p_logs, top_ps, out, kept, ids, row_stride, size, TILE: tl.constexpr
):
    """One row -> what `sample_kernel` would draw from, as float32 probabilities; NaN: the row is no distribution. A
    greedy row is 1 at its likeliest token.
    """
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * row_stride
    lane = tl.arange(0, TILE)
    temperature = tl.load(temperatures + row)
    peak, best, fault = best_of(z, size, TILE)
    sound = fault == 0
    certain = tl.where(temperature < _GREEDY, best, -1)
    for first in range(0, size, TILE):
        value = tl.where(sound, (first + lane == certain).to(tl.float32), float("nan"))
        tl.store(out + row * size + first + lane, value, mask=first + lane < size)
    tl.debug_barrier()
    if sound & (temperature >= _GREEDY):
        top_k, min_p_log, top_p = tl.load(top_ks + row), tl.load(min_p_logs + row), tl.load(top_ps + row)
        bound, left = bound_of(z, size, peak, temperature, top_k, min_p_log, top_p, TILE)
        source, places = kept + row * size, ids + row * size
        count = copied_together(z, size, peak, temperature, bound, source, places, TILE)
        last, ties = cut(source, count, left, top_k, min_p_log, top_p, size, TILE)
        total = mass_of(source, count, 0.0, 1.0, last, ties, TILE)
        seen = count * 0
        for first in range(0, count, TILE):
            key, m = tile_of(source, first, count, 0.0, 1.0, TILE)
            mass, tied = kept_mass(key, m, last, ties, seen)
            place = tl.load(places + first + lane, mask=first + lane < count, other=0)
            tl.store(out + row * size + place, (mass.to(tl.float64) / total).to(tl.float32), mask=first + lane < count)
            seen += tied


def sample(logits: torch.Tensor, wants: Wants, tile: int = TILE, *, cuts: bool = True) -> torch.Tensor:
    """[R, V] float32 -> tokens [R] int32; of a row that is no distribution NOTHING, INFINITE or NOT_A_NUMBER instead.
    Logits are not changed. `wants` may have more rows. `cuts`: whether any row may ask for top-k, min-p or top-p; False
    spares scratch memory of twice the logits.
    """
    rows, size = _shape(logits)
    drawn = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        kept, ids = _scratch(logits) if cuts else (logits, drawn)
        sample_kernel[(rows,)](
            logits, *wants.tensors(), drawn, kept, ids, logits.stride(0), size, TILE=tile, num_warps=WARPS
        )
    return drawn


def probabilities(logits: torch.Tensor, wants: Wants, tile: int = TILE) -> torch.Tensor:
    """[R, V] float32 -> [R, V] float32: what `sample` draws from, 0 where it is cut off; NaN rows where it draws
    nothing.
    """
    rows, size = _shape(logits)
    out = torch.empty(rows, size, dtype=torch.float32, device=logits.device)
    if rows:
        kept, ids = _scratch(logits)
        cuts = wants.tensors()[:4]
        probabilities_kernel[(rows,)](logits, *cuts, out, kept, ids, logits.stride(0), size, TILE=tile, num_warps=WARPS)
    return out


def _shape(logits: torch.Tensor) -> tuple[int, int]:
    rows, size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    assert 0 < size < 2**30
    return rows, size


def _scratch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(logits), torch.empty(logits.shape, dtype=torch.int32, device=logits.device)


_POINTERS = {
    "logits": "*fp32",
    "temperatures": "*fp32",
    "top_ks": "*i32",
    "min_p_logs": "*fp32",
    "top_ps": "*fp64",
    "kept": "*fp32",
    "ids": "*i32",
    "row_stride": "i32",
    "size": "i32",
}
SHIPPED = (
    Build(
        label="float32",
        kernel=sample_kernel,
        signature={**_POINTERS, "seeds": "*i64", "choices": "*i32", "indices": "*i32", "drawn": "*i32"},
        constants={"TILE": TILE},
        num_warps=WARPS,
    ),
    Build(
        label="float32",
        kernel=probabilities_kernel,
        signature={**_POINTERS, "out": "*fp32"},
        constants={"TILE": TILE},
        num_warps=WARPS,
    ),
)
