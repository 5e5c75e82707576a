"""Writes the keys and values of a step's tokens into their slots of the paged KV memory.

Shapes: T tokens, N blocks, K kv heads, S slots of a block, D head dim. One layer of KV is the (strided) view
`kv[:, layer]` [N, 2, K, S, D] of the block-major memory; the values are rounded to its dtype here, once, so that
attention sees the same numbers whether they were computed in this step, in an earlier one or by another worker.
"""
# ruff: noqa: N803, N806

from __future__ import annotations

import torch


def narrowed(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 numbers as a narrow memory holds them, x / scale: int8, or the bits of float8 e4m3fn as uint8. Rounded,
    halves to even; what lies beyond the format's range becomes its largest number. NaN stays NaN in float8; int8 has
    none, and -127 stands for it. `scales` are spread over x.
    """
    scaled = x / scales
    if dtype == torch.int8:
        return scaled.nan_to_num(nan=-127.0).clamp(-127.0, 127.0).round().to(torch.int8)
    assert dtype == torch.float8_e4m3fn
    return scaled.clamp(-448.0, 448.0).to(dtype).view(torch.uint8)


def kv_write_reference(
    layer_N2KSD: torch.Tensor,
    new_T2KD: torch.Tensor,
    blocks_T: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Token by token."""
    for t in range(new_T2KD.shape[0]):
        layer_N2KSD[int(blocks_T[t]), :, :, int(slots_T[t])] = new_T2KD[t].to(layer_N2KSD.dtype)


def kv_write_cpu(
    layer_N2KSD: torch.Tensor,
    new_T2KD: torch.Tensor,
    blocks_T: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """One scatter for all tokens, keys and values together."""
    layer_NS2KD = layer_N2KSD.permute(0, 3, 1, 2, 4)
    layer_NS2KD.index_put_((blocks_T, slots_T), new_T2KD.to(layer_N2KSD.dtype))
