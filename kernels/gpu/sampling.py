"""Tokens from rows of logits, without sorting: the definition is `kernels.sampling`'s (top-k,
min-p and top-p, each on what the one before left, ties as there, then the inverse CDF over ascending ids) and the
draws are `kernels.philox`'s. Sums run in another order than the CPU's, so that a uniform within rounding of the edge
between two tokens may draw the other one; all else is equal.

How a row goes:

1. many programs find its peak, what can be kept at all, and copy that together (`candidates`): a few hundred tokens of
   a vocabulary. A temperature below 1e-5 takes the likeliest token, the lowest id of equals, and is done;
2. of these, number or mass at 16 points between two bounds tells which sixteenth holds the last token that is kept;
   eight times that is a single float32 (pivots instead of a sort: Park et al. 2026, "Qrita", section 3);
3. the tile in which the cumulative mass passes the uniform's, then the token in it. Where nothing is cut off: first
   the stretch of the vocabulary.

Shapes: R rows, V vocabulary, P stretches; logits [R, V] float32.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_plans.draws import TILE, Wants
from .candidates import (
    ALL,
    ASKED,
    FOUND,
    GREEDY,
    NONE,
    POINTS,
    WARPS,
    at,
    bound_of,
    candidates,
    cuts_off,
    key_of,
    peak_of,
    standing,
    tile_of,
)
from .cubin import Build
from .draws import SAMPLE, uniform


@triton.jit
def last_kept(source, count, high, target, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The lowest key at or before which tokens of a list reach `target` (of mass, or of number), at most `high`, and
    what stands before it.
    """
    point = tl.arange(0, POINTS)
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
def cut(kept, count, left, top_k, min_p_log, top_p, size, TILE: tl.constexpr):
    """Of a list (`left`: the mass that min-p alone leaves): the key of the last token that top-k, min-p and top-p
    keep, and how many tokens that have it are kept.
    """
    limit = key_of(min_p_log).to(tl.int64)
    if (top_k > 0) & (top_k < size):
        found, _ = last_kept(kept, count, limit * 0 + ALL, top_k.to(tl.float64), False, TILE)
        limit = tl.minimum(limit, found)
        mass, _ = standing(kept, count, 0.0, 1.0, tl.zeros([POINTS], tl.int32) + limit.to(tl.int32), TILE)
        left = at(mass, 0)
    ties = count * 0 + NONE
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
def mass_of(source, count, last, ties, TILE: tl.constexpr):
    """Of a list, float64: what the cut leaves. Tiles of float32 sums, added one after another."""
    total = tl.zeros([1], tl.float64)
    seen = count * 0
    for first in range(0, count, TILE):
        key, m = tile_of(source, first, count, 0.0, 1.0, TILE)
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
    found = tl.min(tl.where(passed, lane, NONE), 0)
    return held + tl.where(found < NONE, found, tl.max(tl.where(mass > 0.0, lane, 0), 0))


@triton.jit
def stretch_with(masses, row, parts, share, PARTS: tl.constexpr):
    """Of a row that cuts nothing off: the stretch in which the cumulative mass passes `share` of all, and how much of
    it has to pass there.
    """
    part = tl.arange(0, PARTS)
    mass = tl.load(masses + (row * parts + part) * POINTS, mask=part < parts, other=0.0)
    target = share * tl.sum(mass, 0)
    passed = (tl.cumsum(mass, 0) > target) & (mass > 0.0)
    found = tl.min(tl.where(passed, part, NONE), 0)
    found = tl.where(found < NONE, found, tl.max(tl.where(mass > 0.0, part, 0), 0))
    return found, target - tl.sum(tl.where(part < found, mass, 0.0), 0)


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
    peaks,
    places,
    faults,
    masses,
    numbers,
    kept,
    ids,
    drawn,
    row_stride,
    size,
    stretch,
    parts,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row, of which `candidates` is known -> its token, or what keeps the row from being a distribution."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_k, min_p_log, top_p = tl.load(top_ks + row), tl.load(min_p_logs + row), tl.load(top_ps + row)
    peak, token, fault = peak_of(peaks, places, faults, row, parts, PARTS)
    if (fault == 0) & (temperature >= GREEDY):
        u = uniform(tl.load(seeds + row), tl.load(choices + row), tl.load(indices + row), SAMPLE)
        if cuts_off(top_k, min_p_log, top_p, size, False):
            _index, count, left = bound_of(masses, numbers, row, parts, size, top_k, min_p_log, top_p, PARTS)
            source = kept + row * size
            last, ties = cut(source, count, left, top_k, min_p_log, top_p, size, TILE)
            target = u * mass_of(source, count, last, ties, TILE)
            token = tl.load(ids + row * size + pick(source, count, 0.0, 1.0, last, ties, target, TILE))
        else:
            part, target = stretch_with(masses, row, parts, u, PARTS)
            first = part * stretch
            z, count = logits + row * row_stride + first, tl.minimum(stretch, size - first)
            token = first + pick(z, count, peak, temperature, size * 0 + ALL, size * 0 + NONE, target, TILE)
    tl.store(drawn + row, tl.where(fault == 0, token, fault))


@triton.jit
def probabilities_kernel(
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
    out,
    size,
    parts,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row -> what `sample_kernel` would draw from, as float32 probabilities; NaN: the row is no distribution. A
    greedy row is 1 at its likeliest token.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    temperature = tl.load(temperatures + row)
    _peak, best, fault = peak_of(peaks, places, faults, row, parts, PARTS)
    sound = fault == 0
    certain = tl.where(temperature < GREEDY, best, -1)
    for first in range(0, size, TILE):
        value = tl.where(sound, (first + lane == certain).to(tl.float32), float("nan"))
        tl.store(out + row * size + first + lane, value, mask=first + lane < size)
    tl.debug_barrier()
    if sound & (temperature >= GREEDY):
        top_k, min_p_log, top_p = tl.load(top_ks + row), tl.load(min_p_logs + row), tl.load(top_ps + row)
        _index, count, left = bound_of(masses, numbers, row, parts, size, top_k, min_p_log, top_p, PARTS)
        source, found = kept + row * size, ids + row * size
        last, ties = cut(source, count, left, top_k, min_p_log, top_p, size, TILE)
        total = mass_of(source, count, last, ties, TILE)
        seen = count * 0
        for first in range(0, count, TILE):
            key, m = tile_of(source, first, count, 0.0, 1.0, TILE)
            mass, tied = kept_mass(key, m, last, ties, seen)
            place = tl.load(found + first + lane, mask=first + lane < count, other=0)
            tl.store(out + row * size + place, (mass.to(tl.float64) / total).to(tl.float32), mask=first + lane < count)
            seen += tied


def sample(logits: torch.Tensor, wants: Wants, tile: int = TILE, *, cuts: bool = True) -> torch.Tensor:
    """[R, V] float32 -> tokens [R] int32; of a row that is no distribution NOTHING, INFINITE or NOT_A_NUMBER instead.
    Logits are not changed. `wants` may have more rows. `cuts`: whether any row may ask for top-k, min-p or top-p; False
    spares a launch and scratch memory of twice the logits.
    """
    rows, size = _shape(logits)
    drawn = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        found = candidates(logits, wants, tile, cuts=cuts, every=False)
        sample_kernel[(rows,)](
            logits,
            *wants.tensors(),
            *found.tensors(),
            drawn,
            logits.stride(0),
            size,
            found.stretch,
            found.peaks.shape[1],
            TILE=tile,
            PARTS=found.padded,
            num_warps=WARPS,
        )
    return drawn


def probabilities(logits: torch.Tensor, wants: Wants, tile: int = TILE) -> torch.Tensor:
    """[R, V] float32 -> [R, V] float32: what `sample` draws from, 0 where it is cut off; NaN rows where it draws
    nothing.
    """
    rows, size = _shape(logits)
    out = torch.empty(rows, size, dtype=torch.float32, device=logits.device)
    if rows:
        found = candidates(logits, wants, tile, cuts=True, every=True)
        probabilities_kernel[(rows,)](
            *wants.tensors()[:4],
            *found.tensors(),
            out,
            size,
            found.peaks.shape[1],
            TILE=tile,
            PARTS=found.padded,
            num_warps=WARPS,
        )
    return out


def _shape(logits: torch.Tensor) -> tuple[int, int]:
    rows, size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    assert 0 < size < 2**30
    return rows, size


_FACTS = dict.fromkeys(("size", "parts"), "i32")
_HOW = {"TILE": TILE, "PARTS": 32}
SHIPPED = (
    Build(
        label="float32",
        kernel=sample_kernel,
        signature={
            "logits": "*fp32",
            **ASKED,
            **FOUND,
            "seeds": "*i64",
            **dict.fromkeys(("choices", "indices", "drawn"), "*i32"),
            **dict.fromkeys(("row_stride", "stretch"), "i32"),
            **_FACTS,
        },
        constants=_HOW,
        num_warps=WARPS,
        divisible=("row_stride", "size", "stretch"),
    ),
    Build(
        label="float32",
        kernel=probabilities_kernel,
        signature={**ASKED, **FOUND, "out": "*fp32", **_FACTS},
        constants=_HOW,
        num_warps=WARPS,
        divisible=("size",),
    ),
)
