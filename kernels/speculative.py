"""Verifying drafted tokens so that what is emitted is distributed as if the target had drawn every token itself
(Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", ICML'23, section 2.3; Chen et
al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling", algorithm 2). The plain form that
kernels are held against.

Drafted token d at a position with draft distribution q and target distribution p is accepted with probability
min(1, p(d) / q(d)). The first rejected one is replaced by a draw from max(0, p - q), normalized, and the rest of the
draft is dropped; if none is rejected, one more token is drawn from the target's distribution behind the last.

The draws are `philox`'s, of purposes of their own: whether the token at an output index is accepted is ACCEPT's, its
replacement RESIDUAL's, the one more token SAMPLE's, as if it were drawn without speculation. The draft's own draws
must not be ACCEPT's or RESIDUAL's.

Shapes: R rows, G drafted tokens at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .philox import Purpose, uniform


def verify_reference(
    target: NDArray[np.float32],
    draft: NDArray[np.float32] | None,
    drafted: Sequence[int],
    seed: int,
    choice: int,
    index: int,
) -> list[int]:
    """One row: the tokens to emit, 1 to G + 1 of them; the first stands at output index `index`.

    Args:
        target: [G + 1, V] probabilities of the target, behind the context and behind each drafted token.
        draft: [G, V] probabilities that the drafted tokens were drawn from; None: they are certain, as a look-up's are.
        drafted: G ids.
        seed: coordinates of the draws, with the next two.
        choice: as `philox` has it.
        index: of the first token to emit.

    Returns:
        The ids; none where what the last one would be drawn from is no distribution (NaN, or no mass).
    """
    emitted: list[int] = []
    for g, token in enumerate(drafted):
        p, q = target[g], _certain(token, target.shape[1]) if draft is None else draft[g]
        u = uniform(seed, choice, index + g, Purpose.ACCEPT)[0]
        if u * float(q[token]) < float(p[token]):
            emitted.append(token)
            continue
        residual = np.maximum(p - q, np.float32(0))
        weights = residual if residual.any() else p
        return _drawn(emitted, weights, uniform(seed, choice, index + g, Purpose.RESIDUAL)[0])
    last = len(drafted)
    return _drawn(emitted, target[last], uniform(seed, choice, index + last, Purpose.SAMPLE)[0])


def _certain(token: int, size: int) -> NDArray[np.float32]:
    q = np.zeros(size, dtype=np.float32)
    q[token] = 1
    return q


def _drawn(emitted: list[int], weights: NDArray[np.float32], u: float) -> list[int]:
    """By inverse CDF over ascending ids; nothing where the weights are no distribution."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    total = float(cumulative[-1])
    if not 0 < total < np.inf:
        return []
    index = int(np.searchsorted(cumulative, u * total, side="right"))
    if index == len(weights):
        index = int(np.searchsorted(cumulative, total, side="left"))
    return [*emitted, index]
