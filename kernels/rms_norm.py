"""Root-mean-square normalization (Zhang & Sennrich 2019, eq. 4) over the last dimension.

Shapes: `x` [..., C], `weight` [C]. Computed and returned in float32.
"""

from __future__ import annotations

import functools
import math

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, as the paper writes it."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same with two full-size operations instead of four: at batch 1 the cost is the number of calls.

    sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(C * eps)) / sqrt(C), with |x| the Euclidean norm.
    """
    channels = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    root = torch.hypot(length, _constant(math.sqrt(channels * eps))).mul_(1 / math.sqrt(channels))
    return torch.div(x, root).mul_(weight)


@functools.cache
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value)
