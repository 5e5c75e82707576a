"""Rotary position embedding (Su et al. 2021, section 3.2.2), in the half-split layout of Hugging Face's weights.

Shapes: T tokens, H heads (queries and keys together), D head dim. Channel i < D/2 is paired with channel i + D/2.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch


def rotary_tables(positions_T: torch.Tensor, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [T, 1, D] float32, of position times frequency; made once a step for all layers.

    `sin` is negative in its first half, so that both halves of a head turn by x * cos + swapped(x) * sin.
    """
    angles = torch.outer(positions_T.float(), inverse_frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def rotary_reference(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (a, b) turns by its angle: (a cos - b sin, b cos + a sin)."""
    a, b = x_THD.float().chunk(2, dim=-1)
    cos, sin = cos.chunk(2, dim=-1)[1], sin.chunk(2, dim=-1)[1]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotary_cpu(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same in three operations over whole heads."""
    swapped = torch.roll(x_THD, x_THD.shape[-1] // 2, -1)
    return torch.mul(x_THD, cos).addcmul_(swapped, sin)
