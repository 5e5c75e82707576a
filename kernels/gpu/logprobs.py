"""What logprobs are made of: the normalizer of each row and its likeliest tokens, of the model's own distribution. The
reference is `kernels.sampling` (`log_normalizer`, `most_likely`), with its ties.

Shapes: R rows, V vocabulary; logits [R, V] float32. The logprob of token t is logits[r, t] minus the row's normalizer.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cubin import Build
from .sampling import TILE, WARPS, best_of

_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def normalizer_kernel(logits, out, row_stride, size, TILE: tl.constexpr):
    """One row: log(sum(exp(row))) as float64; NaN: the row is no distribution."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * row_stride
    lane = tl.arange(0, TILE)
    peak, _, sound = best_of(z, size, TILE)
    shift = tl.where(sound, peak, 0.0)
    total = tl.zeros([1], tl.float64)
    if sound:
        for first in range(0, size, TILE):
            x = tl.load(z + first + lane, mask=first + lane < size, other=float("-inf"))
            total += tl.sum(tl.exp(x - shift), 0).to(tl.float64)
    else:
        total += 1.0
    value = shift.to(tl.float64) + tl.sum(tl.log(total), 0)
    tl.store(out + row, tl.where(sound, value, float("nan")))


@triton.jit
def most_likely_kernel(logits, ids, values, row_stride, size, count, TILE: tl.constexpr):
    """One row: its `count` likeliest tokens, one pass each; what is not finite is not among them."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * row_stride
    lane = tl.arange(0, TILE)
    last, last_id = tl.load(z) * 0.0 + float("inf"), size * 0 - 1
    for n in range(0, count):
        top = tl.full([TILE], float("-inf"), tl.float32)
        place = tl.full([TILE], 0x7FFFFFFF, tl.int32)
        for first in range(0, size, TILE):
            i = first + lane
            x = tl.load(z + i, mask=i < size, other=float("-inf"))
            behind = (x < last) | ((x == last) & (i > last_id))  # the order: larger first, of equals the lower id
            better = behind & (x > top)
            place = tl.where(better, i, place)
            top = tl.where(better, x, top)
        last = tl.max(top, 0)
        last_id = tl.min(tl.where(top == last, place, _NONE), 0)
        found = last > float("-inf")
        tl.store(ids + row * count + n, tl.where(found, last_id, -1))
        tl.store(values + row * count + n, last)


def normalizers(logits: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """[R, V] float32 -> float64 [R]; NaN: the row has NaN, +inf or nothing that is finite."""
    rows, size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    out = torch.empty(rows, dtype=torch.float64, device=logits.device)
    if rows:
        normalizer_kernel[(rows,)](logits, out, logits.stride(0), size, TILE=tile, num_warps=WARPS)
    return out


def most_likely(logits: torch.Tensor, count: int, tile: int = TILE) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens of each row of [R, V] float32, largest first, equal ones by lower id: ids int32 and
    logits, [R, count]; -1 and -inf where fewer are finite. For the few that clients may ask for: a pass each.
    """
    rows, size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    ids = torch.empty(rows, count, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    if rows and count:
        most_likely_kernel[(rows,)](logits, ids, values, logits.stride(0), size, count, TILE=tile, num_warps=WARPS)
    return ids, values


SHIPPED = (
    Build(
        label="float32",
        kernel=normalizer_kernel,
        signature={"logits": "*fp32", "out": "*fp64", "row_stride": "i32", "size": "i32"},
        constants={"TILE": TILE},
        num_warps=WARPS,
    ),
    Build(
        label="float32",
        kernel=most_likely_kernel,
        signature={
            "logits": "*fp32",
            "ids": "*i32",
            "values": "*fp32",
            **dict.fromkeys(("row_stride", "size", "count"), "i32"),
        },
        constants={"TILE": TILE},
        num_warps=WARPS,
    ),
)
