"""The draws of `kernels.philox` on a GPU: the same key and counter, the same bits, for kernels to call."""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..philox import Purpose
from .cubin import Build

SAMPLE = tl.constexpr(int(Purpose.SAMPLE))
ACCEPT = tl.constexpr(int(Purpose.ACCEPT))
RESIDUAL = tl.constexpr(int(Purpose.RESIDUAL))


_BLOCK = 128


@triton.jit
def uniform(seed, choice, index, PURPOSE: tl.constexpr):
    """Lane 0 of `kernels.philox.uniform` as float64. `seed` int64, `choice` and `index` int32, all as bit patterns."""
    word_0, word_1, _, _ = tl.philox(seed, index * 0, index, choice, index * 0 + PURPOSE)
    return (((word_0.to(tl.uint64) << 32) | word_1.to(tl.uint64)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def uniforms_kernel(seeds, choices, indices, out, rows, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """[R] each -> [R] float64."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    seed = tl.load(seeds + row, mask=inside, other=0)
    choice = tl.load(choices + row, mask=inside, other=0)
    tl.store(out + row, uniform(seed, choice, tl.load(indices + row, mask=inside, other=0), PURPOSE), mask=inside)


def uniforms(seeds: torch.Tensor, choices: torch.Tensor, indices: torch.Tensor, purpose: Purpose) -> torch.Tensor:
    """[R] int64, int32, int32 (bit patterns) -> float64 [R]: lane 0 of `kernels.philox.uniform_batch`."""
    out = torch.empty(len(seeds), dtype=torch.float64, device=seeds.device)
    if len(seeds):
        grid = (triton.cdiv(len(seeds), _BLOCK),)
        uniforms_kernel[grid](seeds, choices, indices, out, len(seeds), PURPOSE=int(purpose), BLOCK=_BLOCK, num_warps=4)
    return out


SHIPPED = (
    Build(
        label="uniforms",
        kernel=uniforms_kernel,
        signature={"seeds": "*i64", "choices": "*i32", "indices": "*i32", "out": "*fp64", "rows": "i32"},
        constants={"PURPOSE": int(Purpose.SAMPLE), "BLOCK": _BLOCK},
        num_warps=4,
    ),
)
