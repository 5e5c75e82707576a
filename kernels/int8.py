"""Symmetric int8 with one scale a row: W8A8's activations per token, its weights per output channel (SmoothQuant
[Xiao et al. 2023], section 3). The plain formulas that every int8 kernel is held against.
"""

from __future__ import annotations

import torch


def quantize_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, C] -> (int8 [T, C] in -127…127, float32 scales [T]): round(x * 127 / largest), halves to even.

    A row of zeros has scale 0; one that is not finite has scale NaN.
    """
    x = x.float()
    largest = x.abs().nan_to_num(nan=0.0).amax(-1, keepdim=True)
    divisor = torch.where(largest > 0, largest, 1.0)  # a number divided by a tensor is, to torch, times its reciprocal
    factor = torch.where(largest > 0, torch.full_like(divisor, 127.0) / divisor, 0.0)
    integers = (x * factor).clamp(-127, 127).round().nan_to_num(nan=0.0)
    return integers.to(torch.int8), (largest / 127.0).squeeze(-1) + (x * 0.0).sum(-1)


def w8a8_linear_reference(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, I] int8, weight [O, I] int8, scales [T] and [O] -> [T, O] float32. Sums of integers are exact."""
    total = x.double() @ weight.double().t()
    y = total.float() * x_scales[:, None] * weight_scales[None, :]
    return y if bias is None else y + bias.float()
