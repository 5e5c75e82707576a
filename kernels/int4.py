"""Weights of 4 bits with a scale for each group of inputs (W4A16; as GPTQ [Frantar et al. 2023] and AWQ [Lin et al.
2024] store them), symmetric: weight = (nibble - 8) * scale. Packing, and the plain formula that kernels are held
against.

A byte holds two inputs that are half a group apart: byte j of a group has input j in its low and input j + group / 2
in its high four bits, so that a kernel that takes a group at a time multiplies two contiguous halves and interleaves
nothing.

Shapes: weight [N, K], packed [N, K / 2] uint8, scales [N, K / group] float32.
"""

from __future__ import annotations

import torch

GROUPS = (32, 64, 128)
"""Inputs that share a scale, as the GPU's kernel has them."""


def quantize_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> (packed, scales), nearest: the largest magnitude of a group becomes 7 (or -7). ValueError naming
    `group`.
    """
    n, k = weight.shape
    if group < 2 or group % 2 or k % group:
        raise ValueError(f"group: {group} is not an even divisor of the {k} inputs")
    grouped = weight.float().view(n, k // group, group)
    scales = grouped.abs().amax(-1) / 7
    levels = grouped / torch.where(scales > 0, scales, 1.0)[..., None]
    return pack_int4(levels.round().clamp(-8, 7).view(n, k).to(torch.int8), group), scales


def pack_int4(levels: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] int8 in -8…7 -> [N, K / 2] uint8."""
    n, k = levels.shape
    halves = (levels + 8).to(torch.uint8).view(n, k // group, 2, group // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(n, k // 2)


def unpack_int4(packed: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K / 2] uint8 -> [N, K] int8 in -8…7."""
    n, half = packed.shape
    grouped = packed.view(n, half * 2 // group, 1, group // 2)
    return torch.cat((grouped & 15, grouped >> 4), dim=2).to(torch.int8).view(n, half * 2) - 8


def w4a16_linear_reference(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K] -> [M, N] float32."""
    group = packed.shape[1] * 2 // scales.shape[1]
    weight = unpack_int4(packed, group).float() * scales.float().repeat_interleave(group, dim=1)
    y = x.float() @ weight.t()
    return y if bias is None else y + bias.float()
