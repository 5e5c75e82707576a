"""Rotary position embedding (Su et al. 2021, section 3.2.2), in the half-split layout of Hugging Face's weights.

Shapes: T tokens, H heads (queries and keys together), D head dim. Channel i < D/2 is paired with channel i + D/2.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch


def rotary_tables(positions_T: torch.Tensor, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [T, 1, D/2] float32, of position times frequency; made once a step for all layers."""
    angles = torch.outer(positions_T.float(), inverse_frequencies)
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotary_reference(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (a, b) turns by its angle: (a cos - b sin, b cos + a sin)."""
    a, b = x_THD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotary_cpu(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same in three operations, without the intermediate halves."""
    tokens, heads, dim = x_THD.shape
    pairs = x_THD.reshape(tokens, heads, 2, dim // 2)  # [T, H, 2, D/2]
    out = torch.mul(pairs, cos.unsqueeze(2))
    out[:, :, 0].addcmul_(pairs[:, :, 1], sin, value=-1.0)
    out[:, :, 1].addcmul_(pairs[:, :, 0], sin)
    return out.view(tokens, heads, dim)
