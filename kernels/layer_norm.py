"""Layer normalization with bias (Ba et al. 2016, eq. 4) over the last dimension; OPT's.

Shapes: `x` [..., C], `weight` and `bias` [C]. Computed and returned in float32.
"""
# ruff: noqa: N812

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the biased variance."""
    x = x.float()
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight + bias


def layer_norm_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's fused kernel."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
