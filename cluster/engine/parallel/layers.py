"""Linears and tables that several ranks of a stage compute together.

Shapes: T tokens, R rows that sample, I inputs and O outputs of a linear, E embedding width, V vocabulary.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from ....kernels.linear import EmbeddingTable, Linear
from ..model import Model
from .ranks import Ranks
from .shard import Shard, share


class SummedLinear(Linear):
    """A linear split by input: every rank's product over its own inputs [T, I/ranks], summed -> [T, O]."""

    def __init__(self, part: Linear, ranks: Ranks) -> None:
        self.in_features, self.out_features = part.in_features, part.out_features
        self.resident_bytes = part.resident_bytes
        self._part = part
        self._ranks = ranks

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.all_reduce(self._part(x))


class VocabularyTable:
    """An embedding of which each rank has the rows of its own token ids."""

    def __init__(self, table: EmbeddingTable, ids: range, ranks: Ranks) -> None:
        self.resident_bytes = table.resident_bytes
        self._table = table
        self._ids = ids
        self._ranks = ranks

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, E] float32: a token's row comes from the one rank that has it, the others add 0."""
        mine = (ids_T >= self._ids.start) & (ids_T < self._ids.stop)
        rows = self._table(torch.where(mine, ids_T - self._ids.start, 0))
        return self._ranks.all_reduce(torch.where(mine[:, None], rows, 0.0))


class VocabularyHead(Linear):
    """An output head of which each rank computes the logits of its own token ids: [R, E] -> [R, V] on all of them."""

    def __init__(self, part: Linear, vocab_size: int, ranks: Ranks) -> None:
        self.in_features, self.out_features = part.in_features, vocab_size
        self.resident_bytes = part.resident_bytes
        self._part = part
        self._ranks = ranks

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return gather_vocabulary(self._part(x), self.out_features, self._ranks)


def gather_vocabulary(logits: torch.Tensor, vocab_size: int, ranks: Ranks) -> torch.Tensor:
    """Each rank's [R, its share of V] -> [R, V] on all."""
    widths = [len(share(vocab_size, ranks.tensor_parallel, place)) for place in range(ranks.tensor_parallel)]
    widest = max(widths)
    if min(widths) == widest:
        return ranks.all_gather(logits)
    together = ranks.all_gather(F.pad(logits, (0, widest - logits.shape[-1])))
    parts = together.split(widest, dim=-1)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=-1)


def join_ranks(model: Model, shard: Shard, ranks: Ranks) -> None:
    """Puts what its ranks compute together into a model that was built of one rank's weights."""
    if shard.tensor_parallel == 1:
        return
    for layer in model.layers:
        layer.attention_out = SummedLinear(layer.attention_out, ranks)
        layer.down = SummedLinear(layer.down, ranks)
    if model.embed is not None:
        assert isinstance(model.embed, EmbeddingTable)
        model.embed = VocabularyTable(model.embed, shard.vocabulary, ranks)
    if model.head is not None:
        model.head = VocabularyHead(model.head, shard.config.vocab_size, ranks)
