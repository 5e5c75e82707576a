"""Linears and tables that the GPUs of a stage compute together (as `engine.parallel.layers` on processors).

Sums and gathers are queued behind the products, on their stream, and captured with them. A row-parallel product is
rounded to the model's dtype on each rank before it is summed. Products that quantize do so by rank: a column of int8
weights and a token's activations have a scale for each rank's own inputs, which is what keeps ranks from having to ask
each other for the largest; groups of 4-bit weights must not span ranks (`weights.build_on` says which do).
"""

from __future__ import annotations

import torch

from ....kernels.linear import EmbeddingTable, Linear
from ..model import Model
from ..parallel.layers import VocabularyTable, gather_vocabulary
from ..parallel.ranks import Ranks
from .linears import DeviceLinear, Rows
from .part import Part


class SummedDeviceLinear(DeviceLinear):
    """Split by input: [T, I/ranks] on each rank -> [T, O] on all."""

    def __init__(self, part: DeviceLinear, ranks: Ranks) -> None:
        self.in_features, self.out_features = part.in_features, part.out_features
        self.resident_bytes = part.resident_bytes
        self.takes_int8 = part.takes_int8
        self._part = part
        self._ranks = ranks

    def of(self, x: Rows) -> torch.Tensor:
        return self(x) if isinstance(x, torch.Tensor) else self._ranks.all_reduce(self._part.of(x))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.all_reduce(self._part.of(x))


class VocabularyDeviceHead(DeviceLinear):
    """Split by vocabulary: each rank's logits of its own ids, gathered: [R, E] -> [R, V] on all."""

    def __init__(self, part: DeviceLinear, vocab_size: int, ranks: Ranks) -> None:
        self.in_features, self.out_features = part.in_features, vocab_size
        self.resident_bytes = part.resident_bytes
        self.takes_int8 = part.takes_int8
        self._part = part
        self._ranks = ranks

    def logits(self, x: Rows) -> torch.Tensor:
        return gather_vocabulary(self._part.logits(x), self.out_features, self._ranks)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(x)


def join_part(model: Model, part: Part) -> None:
    """Puts what its stage's ranks compute together into a model that was built of one rank's weights."""
    shard = part.shard
    if shard.tensor_parallel == 1:
        return
    for layer in model.layers:
        layer.attention_out = SummedDeviceLinear(_linear(layer.attention_out), part.ranks)
        layer.down = SummedDeviceLinear(_linear(layer.down), part.ranks)
    if model.embed is not None:
        assert isinstance(model.embed, EmbeddingTable)
        model.embed = VocabularyTable(model.embed, shard.vocabulary, part.ranks)
    if model.head is not None:
        model.head = VocabularyDeviceHead(_linear(model.head), shard.config.vocab_size, part.ranks)


def _linear(linear: Linear) -> DeviceLinear:
    assert isinstance(linear, DeviceLinear)
    return linear
