"""Bias, bans and penalties of some rows of logits, in place, and the way back: what a row asks for is a short list of
token ids, so that its cost is its context's and not the vocabulary's. The reference is `kernels.penalties`, to the bit.

A row's list has two parts. Of the first, values are added (a ban adds -inf). Of the second, ids of the context, the
repetition penalty divides positive logits and multiplies others, then the value is subtracted. No id stands twice in a
part. What was there before is kept, so that logprobs, which are of the model's own distribution, can be had from the
same memory afterwards.

Shapes: R rows, V vocabulary; logits [R, V] float32; P rows that ask, E entries of all their lists.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_plans.draws import WIDE_TILE, Penalties
from .candidates import WIDE_WARPS, best_of
from .cubin import Build


@triton.jit
def penalize_kernel(logits, rows, spans, repetitions, ids, values, saved, row_stride, size, TILE: tl.constexpr):
    """One row that asks. `spans` [P, 3]: its first entry, the first of its context, the one behind the last. A row that
    is no distribution stays as it is: nothing may hide that.
    """
    program = tl.program_id(0)
    z = logits + tl.load(rows + program).to(tl.int64) * row_stride
    lane = tl.arange(0, TILE)
    _, _, fault = best_of(z, size, TILE)
    sound = fault == 0
    begin, middle = tl.load(spans + program * 3), tl.load(spans + program * 3 + 1)
    end = tl.load(spans + program * 3 + 2)
    repetition = tl.load(repetitions + program)
    for first in range(begin, middle, TILE):
        i = first + lane
        token = tl.load(ids + i, mask=i < middle, other=0)
        x = tl.load(z + token, mask=i < middle, other=0.0)
        tl.store(saved + i, x, mask=i < middle)
        added = x + tl.load(values + i, mask=i < middle, other=0.0)
        tl.store(z + token, tl.where(sound, added, x), mask=i < middle)
    tl.debug_barrier()
    for first in range(middle, end, TILE):
        i = first + lane
        token = tl.load(ids + i, mask=i < end, other=0)
        x = tl.load(z + token, mask=i < end, other=0.0)
        tl.store(saved + i, x, mask=i < end)
        scaled = tl.where(x > 0.0, tl.div_rn(x, tl.zeros([TILE], tl.float32) + repetition), x * repetition)
        less = scaled - tl.load(values + i, mask=i < end, other=0.0)
        tl.store(z + token, tl.where(sound, less, x), mask=i < end)


@triton.jit
def restore_kernel(logits, rows, spans, ids, saved, row_stride, TILE: tl.constexpr):
    """One row that asked: what `penalize_kernel` found there, the last part first."""
    program = tl.program_id(0)
    z = logits + tl.load(rows + program).to(tl.int64) * row_stride
    lane = tl.arange(0, TILE)
    begin, middle = tl.load(spans + program * 3), tl.load(spans + program * 3 + 1)
    end = tl.load(spans + program * 3 + 2)
    for first in range(middle, end, TILE):
        i = first + lane
        token = tl.load(ids + i, mask=i < end, other=0)
        tl.store(z + token, tl.load(saved + i, mask=i < end, other=0.0), mask=i < end)
    tl.debug_barrier()
    for first in range(begin, middle, TILE):
        i = first + lane
        token = tl.load(ids + i, mask=i < middle, other=0)
        tl.store(z + token, tl.load(saved + i, mask=i < middle, other=0.0), mask=i < middle)


def penalize(logits: torch.Tensor, asked: Penalties, tile: int = WIDE_TILE) -> None:
    """Changes logits [R, V] float32 in place."""
    count = asked.rows_P.shape[0]
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    if count:
        penalize_kernel[(count,)](
            logits,
            asked.rows_P,
            asked.spans_P3,
            asked.repetitions_P,
            asked.ids_E,
            asked.values_E,
            asked.saved_E,
            logits.stride(0),
            logits.shape[1],
            TILE=tile,
            num_warps=WIDE_WARPS,
            enable_fp_fusion=False,  # the product is rounded before the value is subtracted, as on a processor
        )


def restore(logits: torch.Tensor, asked: Penalties, tile: int = WIDE_TILE) -> None:
    """Undoes `penalize`."""
    count = asked.rows_P.shape[0]
    if count:
        restore_kernel[(count,)](
            logits,
            asked.rows_P,
            asked.spans_P3,
            asked.ids_E,
            asked.saved_E,
            logits.stride(0),
            TILE=tile,
            num_warps=WIDE_WARPS,
        )


_LISTS = {
    **dict.fromkeys(("logits", "saved"), "*fp32"),
    **dict.fromkeys(("rows", "spans", "ids"), "*i32"),
    "row_stride": "i32",
}
SHIPPED = (
    Build(
        label="float32",
        kernel=penalize_kernel,
        signature={**_LISTS, **dict.fromkeys(("repetitions", "values"), "*fp32"), "size": "i32"},
        constants={"TILE": WIDE_TILE},
        num_warps=WIDE_WARPS,
    ),
    Build(
        label="float32", kernel=restore_kernel, signature=_LISTS, constants={"TILE": WIDE_TILE}, num_warps=WIDE_WARPS
    ),
)
