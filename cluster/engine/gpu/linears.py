"""Linear layers on a GPU: y = x W^T + b with x [T, I] and y [T, O] in the model's dtype, logits in float32.

16-bit and float32 products are the vendor's library's, which is at the hardware's bound for them; int8 and 4-bit ones
are `quantized_linears`'. Inputs of int8 products come quantized from the kernel before, where there is one that does
that (`Rows`).
"""
# ruff: noqa: N812

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ....kernels.linear import EmbeddingTable, Linear

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""[T, C] in the model's dtype, or int8 [T, C] with float32 scales [T]."""


class DeviceLinear(Linear):
    """A matrix in the model's dtype."""

    takes_int8 = False
    """Whether inputs may come as integers and scales."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [O, I], `bias` [O]: on the device, of one dtype."""
        self.out_features, self.in_features = weight.shape
        self.resident_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._weight = weight
        self._bias = bias

    def of(self, x: Rows) -> torch.Tensor:
        """The product of what the kernel before made."""
        assert isinstance(x, torch.Tensor)
        return self(x)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def logits(self, x: Rows) -> torch.Tensor:
        """The product in float32: [R, I] -> [R, O]."""
        assert isinstance(x, torch.Tensor)
        if self._bias is None and x.dtype != torch.float32 and _has_wide_product(x.device, x.dtype):
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
        return self(x).float()


class DeviceTable(EmbeddingTable):
    """[V, E] rows by token id, in the model's dtype."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(table)
        self.weight = table

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:  # noqa: N803
        """[T] int32 or int64 -> [T, E]."""
        return self.weight.index_select(0, ids_T)


@functools.cache
def _has_wide_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether 16-bit matrices can be multiplied without rounding the sums to 16 bits (torch 2.8, on a GPU)."""
    if device.type != "cuda":
        return False
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True
