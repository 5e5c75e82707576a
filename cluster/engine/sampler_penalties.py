"""Changes to one row of logits before temperature: bias, bans, penalties. In place, on rows that ask for them only.

A penalised row costs O(context) per step (one pass over the ids it already has); other rows cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..types import SamplingParams
from .plan import SampleSpec


def is_plain(spec: SampleSpec) -> bool:
    """Whether the row's logits go to temperature as they are."""
    params = spec.params
    return not (
        params.logit_bias
        or spec.banned_token_ids
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def apply_processors(row: NDArray[np.float32], spec: SampleSpec) -> None:
    """Bias, bans, repetition penalty, presence and frequency penalties, in this order. `row`: [V], changed in place.

    Raises:
        ValueError: a bias names a token id that the vocabulary does not have.
    """
    params = spec.params
    if params.logit_bias:
        add_bias(row, params.logit_bias)
    if spec.banned_token_ids:
        ban(row, spec.banned_token_ids)
    if params.repetition_penalty != 1.0:
        size = row.shape[0]
        context = np.concatenate((_ids(spec.prompt_token_ids, size), _ids(spec.output_token_ids, size)))
        penalize_repetition(row, context, params.repetition_penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        penalize_output(row, spec.output_token_ids, params)


def add_bias(row: NDArray[np.float32], bias: Sequence[tuple[int, float]]) -> None:
    """Adds each bias to its token's logit (OpenAI's `logit_bias`)."""
    problem = bias_problem(bias, row.shape[0])
    if problem is not None:
        raise ValueError(problem)
    for token_id, value in bias:
        row[token_id] += value


def bias_problem(bias: Sequence[tuple[int, float]], vocab_size: int) -> str | None:
    """Why a bias cannot be added; None: it can."""
    for token_id, _ in bias:
        if not 0 <= token_id < vocab_size:
            return f"logit_bias: token id {token_id} is not in 0…{vocab_size - 1}"
    return None


def ban(row: NDArray[np.float32], token_ids: Sequence[int]) -> None:
    """Sets the tokens' logits to -inf. Ids outside the vocabulary cannot be drawn anyway: passed over."""
    size = row.shape[0]
    for token_id in token_ids:
        if 0 <= token_id < size:
            row[token_id] = -np.inf


def penalize_repetition(row: NDArray[np.float32], token_ids: NDArray[np.int64], penalty: float) -> None:
    """Divides positive logits of `token_ids` by `penalty`, multiplies the others; once per token, not per occurrence.

    CTRL (Keskar et al. 2019), section 4.1, in the form that transformers and vLLM use.
    """
    logits = row[token_ids]
    row[token_ids] = np.where(logits > 0, logits / np.float32(penalty), logits * np.float32(penalty))


def penalize_output(row: NDArray[np.float32], output_token_ids: Sequence[int], params: SamplingParams) -> None:
    """Subtracts presence_penalty + frequency_penalty × count from each token of the output so far (OpenAI's rule)."""
    ids, counts = np.unique(_ids(output_token_ids, row.shape[0]), return_counts=True)
    penalty = params.presence_penalty + params.frequency_penalty * counts
    row[ids] -= penalty.astype(np.float32)


def _ids(token_ids: Sequence[int], size: int) -> NDArray[np.int64]:
    """Those below `size`: a context may hold ids that the output layer lacks, which cannot be drawn anyway."""
    ids = np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
    return ids[(ids >= 0) & (ids < size)]
