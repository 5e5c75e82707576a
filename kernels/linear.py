"""Linear layers as objects: y = x W^T + b with x [T, I] float32, W [O, I], y [T, O] float32.

A quantizer replaces the object, an observer sees every input; the model only calls it. Forms of the weight on a CPU:

- `PlainLinear`: a float32 or bfloat16 matrix and torch's own product;
- `PackedHalfLinear`: half-precision weights in FBGEMM's packed panels, widened in registers, with float32 activations
  and sums. torch's bfloat16 product on machines without bfloat16 instructions is a matrix-vector product per token:
  SmolLM2-135M's layers take 512 tokens at 42 tokens/s, this one at 375 (one Zen 3 core, AVX2, torch 2.13). It reads
  half of float32's bytes and computes at float32's speed.

IEEE half has 10 bits of fraction against bfloat16's 7, so every bfloat16 weight between 2^-14 and 65504 is exact in it;
smaller ones are off by at most 2^-25, larger ones are never packed (`fits_half`).
"""
# ruff: noqa: N803, N812

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

HALF_MAX = 65504.0
_TABLE_TILE_ELEMENTS = 1024 * 576
"""Elements widened to float32 at a time by `EmbeddingTable.logits`: 2.4 MB stay in the last-level cache."""


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b in float32."""
    y = (x.float().unsqueeze(-2) * weight.float()).sum(-1)
    return y if bias is None else y + bias.float()


class Linear(ABC):
    """y = x W^T + b. Called by the model once per step; not thread-safe."""

    in_features: int
    out_features: int
    resident_bytes: int
    """Memory that the weights take."""
    observer: Callable[[torch.Tensor], None] | None = None
    """If set, sees every input [T, I] before the product (calibration, SmoothQuant). Must not change it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, I] float32 -> [T, O] float32."""
        if self.observer is not None:
            self.observer(x)
        return self.apply(x)

    @abstractmethod
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The product itself; pure."""


class PlainLinear(Linear):
    """A matrix as torch holds it; `weight` is float32 or bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.resident_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._weight = weight
        self._bias = None if bias is None else bias.to(weight.dtype)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias).float()


class PackedHalfLinear(Linear):
    """Half-precision weights in FBGEMM's packed form; float32 in, float32 sums, float32 out."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.resident_bytes = weight.numel() * 2 + (0 if bias is None else bias.numel() * 4)
        bias = None if bias is None else bias.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        self._product = torch.ops.quantized.linear_dynamic_fp16.default

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._product(x, self._packed)
        return y


class StackedLinear(Linear):
    """Linears over the same input, outputs side by side: a large matrix that was packed piece by piece."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.resident_bytes = sum(part.resident_bytes for part in parts)
        self._parts = tuple(parts)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self._parts], dim=-1)


class EmbeddingTable:
    """[V, E] rows by token id and, with tied embeddings, the output head over the same memory.

    A table in 16 bits is widened tile by tile for the head's product, into a scratch that stays in cache.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.rows, self.width = table.shape
        self.resident_bytes = table.nbytes
        self._table = table
        self._tile_rows = max(1, _TABLE_TILE_ELEMENTS // self.width)
        self._scratch: torch.Tensor | None = None

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, E] float32."""
        return self._table.index_select(0, ids_T).float()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[R, E] float32 -> [R, V] float32: x times the table, transposed."""
        if self._table.dtype == torch.float32:
            return F.linear(x, self._table)
        if self._scratch is None:
            self._scratch = torch.empty(self._tile_rows, self.width)
        out = torch.empty(x.shape[0], self.rows)
        for first in range(0, self.rows, self._tile_rows):
            stored = self._table[first : first + self._tile_rows]
            tile = self._scratch[: stored.shape[0]].copy_(stored)
            torch.mm(x, tile.t(), out=out[:, first : first + self._tile_rows])
        return out


class TiedHead(Linear):
    """The output head that shares the embedding's memory."""

    resident_bytes = 0

    def __init__(self, table: EmbeddingTable) -> None:
        self.in_features, self.out_features = table.width, table.rows
        self._table = table

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._table.logits(x)


def fits_half(weight: torch.Tensor) -> bool:
    """Whether no element overflows IEEE half (or is not a number)."""
    low, high = torch.aminmax(weight)
    return bool(low >= -HALF_MAX) and bool(high <= HALF_MAX)
