"""Verifies the drafted tokens of all rows in one launch; `kernels.speculative` says how and is the reference. One
program a row: no distribution leaves the device, nothing is sorted. Sums run in another order than the reference's,
so that a uniform within rounding of the edge between two tokens may draw the other one; all else is equal.

Shapes: R rows, G drafted tokens at most, V vocabulary.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_plans.draws import WIDE_TILE
from .candidates import WIDE_WARPS
from .cubin import Build
from .draws import ACCEPT, RESIDUAL, SAMPLE, uniform

_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def weights_of(p, q, token, first, size, subtracts, HAS_DRAFT: tl.constexpr, TILE: tl.constexpr):
    """One tile of max(0, p - q), or of p where nothing is subtracted."""
    i = first + tl.arange(0, TILE)
    weight = tl.load(p + i, mask=i < size, other=0.0)
    if subtracts:
        if HAS_DRAFT:
            weight -= tl.load(q + i, mask=i < size, other=0.0)
        else:
            weight -= tl.where(i == token, 1.0, 0.0)
    return tl.where(weight < 0, 0.0, weight)  # NaN stays


@triton.jit
def total_of(p, q, token, size, subtracts, HAS_DRAFT: tl.constexpr, TILE: tl.constexpr):
    """Their sum, float64: tiles of float32 sums, added one after another."""
    total = tl.zeros([1], tl.float64)
    for first in range(0, size, TILE):
        weight = weights_of(p, q, token, first, size, subtracts, HAS_DRAFT, TILE)
        total += tl.sum(weight, 0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def drawn_from(p, q, token, size, subtracts, target, HAS_DRAFT: tl.constexpr, TILE: tl.constexpr):
    """The first id whose cumulative weight exceeds `target`; where rounding leaves none, the last that has weight."""
    reached, before = target * 0.0, target * 0.0
    first, held = size * 0, size * 0
    while first < size:
        tile = tl.sum(weights_of(p, q, token, first, size, subtracts, HAS_DRAFT, TILE), 0).to(tl.float64)
        if tile > 0.0:
            held, before = first, reached
        reached += tile
        first += tl.where(reached > target, size, TILE)  # found: it is over
    weight = weights_of(p, q, token, held, size, subtracts, HAS_DRAFT, TILE)
    passed = (before + tl.cumsum(weight.to(tl.float64), 0) > target) & (weight > 0.0)
    lane = tl.arange(0, TILE)
    found = tl.min(tl.where(passed, lane, _NONE), 0)
    return held + tl.where(found < _NONE, found, tl.max(tl.where(weight > 0.0, lane, 0), 0))


@triton.jit
def accepted(p, q, token, u, HAS_DRAFT: tl.constexpr):
    """Whether u < p(token) / q(token)."""
    likely = tl.load(p + token).to(tl.float64)
    if HAS_DRAFT:
        u *= tl.load(q + token).to(tl.float64)
    return u < likely


@triton.jit
def verify_kernel(
    target,
    draft,
    drafted,
    lengths,
    seeds,
    choices,
    indices,
    tokens,
    counts,
    target_row,
    target_step,
    draft_row,
    draft_step,
    most,
    size,
    HAS_DRAFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: tokens [most + 1] and how many of them are emitted; 0: what decides is no distribution."""
    row = tl.program_id(0).to(tl.int64)
    seed, choice, index = tl.load(seeds + row), tl.load(choices + row), tl.load(indices + row)
    length = tl.load(lengths + row)
    p, q, out = target + row * target_row, draft + row * draft_row, tokens + row * (most + 1)
    kept, token, going = length * 0, length * 0, length >= 0
    while going:
        token = tl.load(drafted + row * most + kept, mask=kept < length, other=0)
        going = kept < length
        if going:
            u = uniform(seed, choice, index + kept, ACCEPT)
            going = accepted(p + kept * target_step, q + kept * draft_step, token, u, HAS_DRAFT)
        if going:
            tl.store(out + kept, token)
            kept += 1
    p += kept * target_step
    q += kept * draft_step
    subtracts = kept < length
    total = total_of(p, q, token, size, subtracts, HAS_DRAFT, TILE)
    if total <= 0.0:  # p and q differ by rounding only
        subtracts = kept < 0
        total = total_of(p, q, token, size, subtracts, HAS_DRAFT, TILE)
    sound = (total > 0.0) & (total < float("inf"))
    u = uniform(seed, choice, index + kept, RESIDUAL)
    if kept == length:
        u = uniform(seed, choice, index + kept, SAMPLE)
    if sound:
        tl.store(out + kept, drawn_from(p, q, token, size, subtracts, u * total, HAS_DRAFT, TILE))
    tl.store(counts + row, tl.where(sound, kept + 1, 0))


def verify(
    target: torch.Tensor,
    draft: torch.Tensor | None,
    drafted: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    choices: torch.Tensor,
    indices: torch.Tensor,
    tile: int = WIDE_TILE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to emit of each row.

    Args:
        target: [R, G + 1, V] float32 probabilities of the target, behind the context and behind each drafted token.
        draft: [R, G, V] float32 probabilities that the drafted tokens were drawn from; None: they are certain.
        drafted: [R, G] int32 ids.
        lengths: [R] int32, how many of them are there.
        seeds: [R] int64, with the next two the coordinates of the draws, as bit patterns.
        choices: [R] int32.
        indices: [R] int32, of the first token to emit.
        tile: tokens that are looked at together.

    Returns:
        Tokens [R, G + 1] int32 and how many of them count [R] int32, 1 to length + 1; 0: a distribution that decides
        has NaN or no mass.
    """
    rows, steps, size = target.shape
    assert drafted.shape == (rows, steps - 1)
    assert drafted.is_contiguous()
    assert target.dtype == torch.float32
    assert target.stride(2) == 1
    assert draft is None or (draft.shape == (rows, steps - 1, size) and draft.stride(2) == 1)
    tokens = torch.full((rows, steps), -1, dtype=torch.int32, device=target.device)
    counts = torch.empty(rows, dtype=torch.int32, device=target.device)
    if rows:
        verify_kernel[(rows,)](
            target,
            target if draft is None else draft,
            drafted,
            lengths,
            seeds,
            choices,
            indices,
            tokens,
            counts,
            *target.stride()[:2],
            *((0, 0) if draft is None else draft.stride()[:2]),
            steps - 1,
            size,
            HAS_DRAFT=draft is not None,
            TILE=tile,
            num_warps=WIDE_WARPS,
        )
    return tokens, counts


SHIPPED = tuple(
    Build(
        label="distributions" if has_draft else "certain drafts",
        kernel=verify_kernel,
        signature={
            **dict.fromkeys(("target", "draft"), "*fp32"),
            **dict.fromkeys(("drafted", "lengths", "choices", "indices", "tokens", "counts"), "*i32"),
            **dict.fromkeys(("target_row", "target_step", "draft_row", "draft_step", "most", "size"), "i32"),
            "seeds": "*i64",
        },
        constants={"HAS_DRAFT": has_draft, "TILE": WIDE_TILE},
        num_warps=WIDE_WARPS,
    )
    for has_draft in (True, False)
)
