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
_HEAD = 1024


def top_k_ids(z: NDArray[np.float32], k: int) -> NDArray[np.int64] | None:
    """The `k` largest logits, and ties with the k-th, ascending by id; None (all) for k <= 0 or k >= V."""
    if not 0 < k < z.shape[0]:
        return None
    return np.flatnonzero(z >= _kth_largest(z, k))


def min_p_ids(z: NDArray[np.float32], min_p: float) -> NDArray[np.int64] | None:
    """Tokens at least `min_p` times as likely as the likeliest, ascending by id; None (all) for min_p <= 0.

    `z`: logits whose maximum is 0. Nguyen et al., "Turning Up the Heat: Min-p Sampling", section 3.
    """
    if min_p <= 0.0:
        return None
    return np.flatnonzero(z >= math.log(min_p))


def top_p_ids(z: NDArray[np.float32], top_p: float) -> NDArray[np.int64] | None:
    """The smallest set of most likely tokens whose mass reaches `top_p` (at least one), ascending; None (all) for 1.

    `z`: logits whose maximum is 0. Nucleus sampling, Holtzman et al. 2020, section 3.1. Only a head of the row is
    sorted: the largest 1,024 if they reach the mass, else all but those under (1 - top_p) / V of the likeliest one's
    probability, which weigh less than 1 - top_p together.
    """
    if top_p >= 1.0:
        return None
    size = z.shape[0]
    mass = top_p * float(np.exp(z).sum(dtype=np.float64))
    ids: NDArray[np.int64] | None = None
    if size > _HEAD:
        ids = np.flatnonzero(z >= _kth_largest(z, _HEAD))
        if float(np.exp(z[ids]).sum(dtype=np.float64)) < mass:
            ids = np.flatnonzero(z >= math.log((1.0 - top_p) / size))
    head = z if ids is None else z[ids]
    ordered = np.sort(head)[::-1]
    count = int(np.searchsorted(np.cumsum(np.exp(ordered), dtype=np.float64), mass)) + 1
    count = min(count, head.shape[0])
    last = ordered[count - 1]
    kept = head > last
    kept[np.flatnonzero(head == last)[: count - int(np.count_nonzero(kept))]] = True
    return np.flatnonzero(kept) if ids is None else ids[kept]


def truncate(
    z: NDArray[np.float32], *, top_k: int = 0, min_p: float = 0.0, top_p: float = 1.0
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """Top-k, then min-p, then top-p, each on what the one before left. `z`: logits whose maximum is 0.

    Returns:
        The ids that are left, ascending (None: all), and their logits.
    """
    ids = top_k_ids(z, top_k)
    left = z if ids is None else z[ids]
    ids, left = _narrow(ids, left, min_p_ids(left, min_p))
    return _narrow(ids, left, top_p_ids(left, top_p))


def _narrow(
    ids: NDArray[np.int64] | None, z: NDArray[np.float32], kept: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    if kept is None:
        return ids, z
    return (kept if ids is None else ids[kept]), z[kept]


def _kth_largest(z: NDArray[np.float32], k: int) -> np.float32:
    """The `k`-th largest logit, 1 <= k <= V. Few are looked at: k stretches of the row have one that is not less than
    the k-th largest of the stretches' largest.
    """
    stretches = z.shape[0] // _DRAW_BLOCK
    if k <= stretches:
        tops = z[: stretches * _DRAW_BLOCK].reshape(stretches, _DRAW_BLOCK).max(axis=1)
        z = z[z >= np.partition(tops, stretches - k)[stretches - k]]
    largest: np.float32 = np.partition(z, z.shape[0] - k)[z.shape[0] - k]
    return largest


def draw(z: NDArray[np.float32], u: float) -> int:
    """Inverse-CDF draw of an index from softmax(z), with one uniform `u` in [0, 1).

    `z`: logits whose maximum is 0; -inf entries are never drawn. Masses are summed in float64, first within stretches
    of 256, then over stretches: that order is part of the definition, so equal rows give equal tokens.
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
    kth = _kth_largest(x, k)
    ids = np.flatnonzero(x >= kth)
    ids = ids[x[ids] > -np.inf]
    return ids[np.argsort(-x[ids], kind="stable")][:k]
