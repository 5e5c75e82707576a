"""Draws, logprobs and penalties as `kernels.gpu` has them. Tokens and logprobs are found on the host, by
`kernels.sampling`: those of a processor, to the bit, for the same logits.

`tile` means something to Triton's kernels alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ..gpu_plans.draws import (
    GREEDY_TEMPERATURE,
    INFINITE,
    NOT_A_NUMBER,
    NOTHING,
    Logprobs,
    Penalties,
    Wants,
)
from ..penalties import penalize_reference
from ..philox import uniform_batch
from ..sampling import draw, log_normalizer, most_likely, truncate

_GREEDY = float(np.float32(GREEDY_TEMPERATURE))
"""Temperatures come as float32."""
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor], None]
"""(row [V], ids [E], values [E], how many of them are added, repetition penalty []): what a row asks for, in place; the
other ids are the context's.
"""


def sample(logits: torch.Tensor, wants: Wants, tile: int = 0, *, cuts: bool = True) -> torch.Tensor:
    """[R, V] float32 -> tokens [R] int32; NOTHING, INFINITE or NOT_A_NUMBER of a row that is no distribution."""
    rows = logits.cpu().numpy()
    temperatures, top_ks, min_p_logs, top_ps, seeds, choices, indices = (
        column[: len(rows)].tolist() for column in wants.tensors()
    )
    uniforms = uniform_batch(
        [seed % 2**64 for seed in seeds], [choice % 2**32 for choice in choices], [index % 2**32 for index in indices]
    )[:, 0].tolist()
    each = zip(rows, uniforms, temperatures, top_ks, min_p_logs, top_ps, strict=True)
    return torch.tensor([_token(*row) for row in each], dtype=torch.int32, device=logits.device)


def _token(z: NDArray[np.float32], u: float, temperature: float, top_k: int, min_p_log: float, top_p: float) -> int:
    best = int(z.argmax())
    peak = z[best]
    if not math.isfinite(peak):
        return NOT_A_NUMBER if math.isnan(peak) else INFINITE if peak > 0 else NOTHING
    if temperature < _GREEDY:
        return best
    x = z - peak
    if temperature != 1.0:
        x /= np.float32(temperature)
    ids, left = truncate(x, top_k=top_k, min_p=math.exp(min_p_log), top_p=top_p)
    index = draw(left, u)
    return index if ids is None else int(ids[index])


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, most: int, tile: int = 0
) -> Logprobs:
    """Of some rows of [R, V] float32, as `kernels.gpu.logprobs.logprobs`."""
    drawn, asking = tokens.tolist(), rows.tolist()
    normalizers = torch.full((len(asking),), math.nan, dtype=torch.float64)
    chosen = torch.full((len(asking),), math.nan)
    ids = torch.full((len(asking), most), -1, dtype=torch.int32)
    values = torch.full((len(asking), most), -math.inf)
    for q, (row, count) in enumerate(zip(asking, counts.tolist(), strict=True)):
        x = logits[row].cpu()
        if drawn[row] >= 0:
            chosen[q] = x[drawn[row]]
        if x.max().isfinite():
            normalizers[q] = log_normalizer(x.numpy())
            likely = torch.from_numpy(most_likely(x.numpy(), count))
            ids[q, : len(likely)], values[q, : len(likely)] = likely.int(), x[likely]
    return Logprobs(*(found.to(logits.device) for found in (normalizers, chosen, ids, values)))


def penalize(change: Change, logits: torch.Tensor, asked: Penalties, tile: int = 0) -> None:
    """Changes logits [R, V] float32 in place; a row that is no distribution stays as it is."""
    for p, (row, (begin, middle, end)) in enumerate(zip(asked.rows_P.tolist(), asked.spans_P3.tolist(), strict=True)):
        z, ids = logits[row], asked.ids_E[begin:end].long()
        asked.saved_E[begin:end] = z[ids]
        if z.max().isfinite():
            change(z, ids, asked.values_E[begin:end], middle - begin, asked.repetitions_P[p])


def restore(logits: torch.Tensor, asked: Penalties, tile: int = 0) -> None:
    """Undoes `penalize`."""
    for row, (begin, _, end) in zip(asked.rows_P.tolist(), asked.spans_P3.tolist(), strict=True):
        logits[row, asked.ids_E[begin:end].long()] = asked.saved_E[begin:end]


def change_torch(
    z: torch.Tensor, ids: torch.Tensor, values: torch.Tensor, added: int, repetition: torch.Tensor
) -> None:
    """A `Change`: a few operations over all ids."""
    first, context = ids[:added], ids[added:]
    z[first] += values[:added]
    x = z[context]
    z[context] = torch.where(x > 0, x / repetition, x * repetition) - values[added:]


def change_reference(
    z: torch.Tensor, ids: torch.Tensor, values: torch.Tensor, added: int, repetition: torch.Tensor
) -> None:
    """A `Change`: the formula."""
    entries = list(zip(ids.tolist(), values.tolist(), strict=True))
    z.copy_(penalize_reference(z.cpu(), dict(entries[:added]), dict(entries[added:]), repetition.item()))
