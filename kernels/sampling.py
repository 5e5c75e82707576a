"""Drawing one token from one row of logits: truncation (top-k, min-p, top-p) and the inverse-CDF draw, on CPU.

Every function works on one row, `z` of shape [V] (V: vocabulary), vectorized over the vocabulary: a row stays in the
processor's cache through all of its passes, and no reduction ever crosses rows, so that a draw depends on nothing but
its own row whatever batch it stands in. The plain references are in the tests.

Ties, the same everywhere: top-k keeps every token that equals the k-th (as vLLM and transformers do); top-p keeps the
smallest set that reaches the mass, and of tokens equal to the last one kept, those with the lowest ids.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_DRAW_BLOCK = 256


def keep_top_k(z: NDArray[np.float32], k: int) -> None:
    """Sets all but the `k` largest logits (and ties with the k-th) to -inf, in place. k <= 0 or k >= V: keeps all."""
    size = z.shape[0]
    if 0 < k < size:
        kth = z.max() if k == 1 else np.partition(z, size - k)[size - k]
        z[z < kth] = -np.inf


def keep_min_p(z: NDArray[np.float32], min_p: float) -> None:
    """Sets tokens less likely than `min_p` times the likeliest to -inf, in place. `z`: logits whose maximum is 0.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling", section 3.
    """
    if min_p > 0.0:
        z[z < math.log(min_p)] = -np.inf


def keep_top_p(z: NDArray[np.float32], top_p: float) -> None:
    """Keeps the smallest set of most likely tokens whose mass reaches `top_p` (at least one), others to -inf, in place.

    `z`: logits whose maximum is 0. Nucleus sampling, Holtzman et al. 2020, section 3.1. Only a head of the row is
    sorted: tokens under (1 - top_p) / V of the likeliest one's probability weigh less than 1 - top_p together, so none
    of them is in the nucleus.
    """
    if top_p >= 1.0:
        return
    floor = math.log((1.0 - top_p) / z.shape[0])
    head = np.sort(z[z >= floor])[::-1]
    mass = np.cumsum(np.exp(head.astype(np.float64)))
    total = float(np.exp(z).sum(dtype=np.float64))
    kept = min(int(np.searchsorted(mass, top_p * total)) + 1, head.shape[0])
    last = head[kept - 1]
    above = z > last
    tied = np.flatnonzero(z == last)[: kept - int(np.count_nonzero(above))]
    above[tied] = True
    z[~above] = -np.inf


def draw(z: NDArray[np.float32], u: float) -> int:
    """Inverse-CDF draw over ascending token ids from softmax(z), with one uniform `u` in [0, 1).

    `z`: logits whose maximum is 0; -inf entries are never drawn. Masses are summed in float64, first within stretches
    of 256 ids, then over stretches: that order is part of the definition, so equal rows give equal tokens.
    """
    size = z.shape[0]
    weights = np.zeros(-(-size // _DRAW_BLOCK) * _DRAW_BLOCK, dtype=np.float32)
    np.exp(z, out=weights[:size])
    blocks = weights.reshape(-1, _DRAW_BLOCK)
    edges = np.cumsum(blocks.sum(axis=1, dtype=np.float64))
    target = u * float(edges[-1])
    block = _first_above(edges, target)
    inner = np.cumsum(blocks[block], dtype=np.float64)
    before = float(edges[block - 1]) if block else 0.0
    return block * _DRAW_BLOCK + _first_above(inner, target - before)


def _first_above(cumulative: NDArray[np.float64], target: float) -> int:
    """First index whose cumulative mass exceeds `target`; where rounding left none, the last index that has mass."""
    index = int(np.searchsorted(cumulative, target, side="right"))
    if index == cumulative.shape[0]:
        index = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    return index


def log_normalizer(x: NDArray[np.float32]) -> float:
    """log(sum(exp(x))) of raw logits, summed in float64: logprob of token t is x[t] minus this."""
    peak = float(x.max())
    return peak + math.log(float(np.exp(x - np.float32(peak)).sum(dtype=np.float64)))


def most_likely(x: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the `k` largest finite logits, largest first, equal ones by lower id. Fewer where fewer are finite."""
    size = x.shape[0]
    k = min(k, size)
    if k == 0:
        return np.empty(0, dtype=np.int64)
    kth = np.partition(x, size - k)[size - k]
    ids = np.flatnonzero((x >= kth) & (x > -np.inf))
    return ids[np.argsort(-x[ids], kind="stable")][:k]
