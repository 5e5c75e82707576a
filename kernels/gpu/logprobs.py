"""What logprobs are made of: of the rows that ask for them, the normalizer, the drawn token's logit and the likeliest
tokens, all of the model's own distribution, in one launch. The reference is `kernels.sampling` (`log_normalizer`,
`most_likely`), with its ties.

Shapes: R rows of logits [R, V] float32, V vocabulary; Q rows that ask. The logprob of token t of row r is logits[r, t]
minus the row's normalizer.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_plans.draws import WIDE_TILE, Logprobs
from .candidates import WIDE_WARPS, best_of
from .cubin import Build

_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def normalizer_of(z, size, TILE: tl.constexpr):
    """log(sum(exp(row))) as float64; NaN: the row is no distribution."""
    lane = tl.arange(0, TILE)
    peak, _, fault = best_of(z, size, TILE)
    shift = tl.where(fault == 0, peak, 0.0)
    total = tl.zeros([1], tl.float64)
    if fault == 0:
        for first in range(0, size, TILE):
            x = tl.load(z + first + lane, mask=first + lane < size, other=float("-inf"))
            total += tl.sum(tl.exp(x - shift), 0).to(tl.float64)
    else:
        total += 1.0
    value = shift.to(tl.float64) + tl.sum(tl.log(total), 0)
    return tl.where(fault == 0, value, float("nan"))


@triton.jit
def next_likely(z, size, last, last_id, TILE: tl.constexpr):
    """The likeliest token behind one: larger ones come first, of equals the lower id. One pass."""
    lane = tl.arange(0, TILE)
    top = tl.full([TILE], float("-inf"), tl.float32)
    place = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    for first in range(0, size, TILE):
        i = first + lane
        x = tl.load(z + i, mask=i < size, other=float("-inf"))
        behind = (x < last) | ((x == last) & (i > last_id))
        better = behind & (x > top)
        place = tl.where(better, i, place)
        top = tl.where(better, x, top)
    value = tl.max(top, 0)
    return value, tl.min(tl.where(top == value, place, _NONE), 0)


@triton.jit(do_not_specialize=["most"])  # another number of likely tokens must not cost a compilation
def logprobs_kernel(
    logits, tokens, rows, counts, normalizers, chosen, ids, values, row_stride, size, most, TILE: tl.constexpr
):
    """One row that asks: its normalizer, the logit of its token (if it has one), its `counts` likeliest tokens of
    `most` places, a pass each; what is not finite is not among them.
    """
    program = tl.program_id(0)
    row = tl.load(rows + program).to(tl.int64)
    z = logits + row * row_stride
    tl.store(normalizers + program, normalizer_of(z, size, TILE))
    token = tl.load(tokens + row)
    tl.store(chosen + program, tl.load(z + token, mask=token >= 0, other=float("nan")))
    last, last_id = tl.max(tl.full([TILE], float("inf"), tl.float32), 0), size * 0 - 1
    for n in range(0, tl.load(counts + program)):
        last, last_id = next_likely(z, size, last, last_id, TILE)
        tl.store(ids + program * most + n, tl.where(last > float("-inf"), last_id, -1))
        tl.store(values + program * most + n, last)


def logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    most: int,
    out: Logprobs | None = None,
    tile: int = WIDE_TILE,
) -> Logprobs:
    """Of some rows of [R, V] float32.

    Args:
        logits: [R, V] float32.
        tokens: [R] int32, what was drawn; below 0: nothing.
        rows: [Q] int32, which rows ask.
        counts: [Q] int32, how many of the likeliest tokens each wants: the few that clients may ask for, a pass each.
        most: the largest of them.
        out: where to put it; None: new tensors.
        tile: tokens that are looked at together.
    """
    size, asking = logits.shape[1], rows.shape[0]
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    if out is None:
        out = Logprobs(
            *(torch.empty(asking, dtype=dtype, device=logits.device) for dtype in (torch.float64, torch.float32)),
            *(torch.empty(asking, most, dtype=dtype, device=logits.device) for dtype in (torch.int32, torch.float32)),
        )
    if asking:
        logprobs_kernel[(asking,)](
            logits,
            tokens,
            rows,
            counts,
            out.normalizers_Q,
            out.chosen_Q,
            out.ids_QM,
            out.values_QM,
            logits.stride(0),
            size,
            most,
            TILE=tile,
            num_warps=WIDE_WARPS,
        )
    return out


SHIPPED = (
    Build(
        label="float32",
        kernel=logprobs_kernel,
        signature={
            **dict.fromkeys(("logits", "chosen", "values"), "*fp32"),
            **dict.fromkeys(("tokens", "rows", "counts", "ids"), "*i32"),
            "normalizers": "*fp64",
            **dict.fromkeys(("row_stride", "size", "most"), "i32"),
        },
        constants={"TILE": WIDE_TILE},
        num_warps=WIDE_WARPS,
    ),
)
