"""Bias, bans and penalties of one row of logits before temperature: the plain form that kernels are held against.

In this order, each on what the one before left: biases are added to their tokens' logits (a ban is a bias of -inf); the
repetition penalty divides positive logits of the context's tokens and multiplies the others (CTRL, Keskar et al. 2019,
section 4.1, in the form that transformers and vLLM use); what the output's tokens cost by now is subtracted (OpenAI's
presence and frequency penalties).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def penalize_reference(
    row: torch.Tensor, added: Mapping[int, float], subtracted: Mapping[int, float], repetition: float
) -> torch.Tensor:
    """Row [V] float32 -> [V] float32. `added`: by token id; `subtracted`: by token id of the context, 0 for those that
    the repetition penalty alone concerns.
    """
    changed, factor = row.clone(), torch.tensor(repetition, dtype=torch.float32)
    for token_id, value in added.items():
        changed[token_id] += torch.tensor(value, dtype=torch.float32)
    for token_id, value in subtracted.items():
        x = changed[token_id]
        scaled = torch.where(x > 0, x / factor, x * factor)
        changed[token_id] = scaled - torch.tensor(value, dtype=torch.float32)
    return changed
