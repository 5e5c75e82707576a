"""One rank's part of a step: its layers of every micro-batch, hidden states in from the stage before and out to the one
behind. The last stage's first rank sends the logits to the leader.

In a pipeline the leader is in the first stage: when its part is done (`begin`), it may begin the next step, and learns
later that the step is over everywhere (`finish`). Other ranks compute one step after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ....kernels.dispatch import operations
from ...models.reference import ModelFiles
from ..devices.kv_memory import STORED_AS
from ..forward import Progress
from ..model import Model
from ..plan import StepPlan
from ..runner import Runner, torch_view
from ..weight_source import check_shapes
from ..weights import DTYPES, build_part, open_weights
from .layers import join_ranks
from .micro_batches import micro_batches
from .ranks import Ranks
from .shard import Shard


def load_part(
    files: ModelFiles, shard: Shard, ranks: Ranks, dtype: str, progress: Progress | None = None, *, kernels: str
) -> Model:
    """One rank's part of a model, joined with the others'. `kernels`: `torch` or `reference`. Raises ModelError."""
    source = open_weights(files)
    check_shapes(files.config, source)
    model = build_part(shard, source, DTYPES[dtype], progress)
    model.ops = operations(kernels)
    join_ranks(model, shard, ranks)
    return model


def rank_kv(memory: memoryview, shard: Shard, dtype: str, block_size: int) -> torch.Tensor:
    """A rank's KV memory as the tensor that it computes with: [N, L, 2, K, S, D]."""
    local = shard.local
    shape = (-1, local.num_layers, 2, local.num_kv_heads, block_size, local.head_dim)
    return torch_view(np.frombuffer(memory, dtype=STORED_AS[dtype]).reshape(shape))


class Begun(NamedTuple):
    """A step of which this rank has computed its part."""

    logits: tuple[torch.Tensor, ...]
    """[R, V] of micro-batches, where this rank has them."""
    coming: tuple[Callable[[], torch.Tensor], ...]
    """Waits for what comes from the last stage: logits, and a word where the last micro-batch has none."""
    sampled: int
    """How many of `coming` are logits."""


class StageRunner:
    """Runs steps on one rank. One thread, but for `finish`; every rank of the worker is given the same plans in the
    same order.
    """

    def __init__(self, model: Model, kv: torch.Tensor, shard: Shard, ranks: Ranks) -> None:
        """`kv`: [N, L, 2, K, S, D] of this rank's layers and heads."""
        self._runner = Runner(model, kv)
        self._shard = shard
        self._ranks = ranks
        self._last_stage = shard.pipeline_stages - 1

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Computes a checked plan. The leader (rank 0) gets the logits [R, V] of the rows that sample, in plan order;
        what other ranks get means nothing. When the leader's call returns, the KV of the step is there on every rank:
        others may read it then. Raises RankLost.
        """
        return self.finish(self.begin(plan))

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> Begun:
        """Computes this rank's part. The leader of a pipeline may begin the next plan then. Raises RankLost."""
        shard, ranks = self._shard, self._ranks
        parts = micro_batches(plan, shard.pipeline_stages)
        logits = []
        for part in parts:
            x = None
            if not shard.is_first:
                x = ranks.recv(torch.empty(part.num_tokens, shard.config.hidden_size), shard.stage - 1)
            y = self._runner.run(part, x)
            if not shard.is_last:
                ranks.send(y, shard.stage + 1)
            elif y.shape[0] and shard.rank == 0:
                logits.append(y)
            elif y.shape[0] and shard.place == 0:
                ranks.send(y, 0)
        counts = [sum(row.sample is not None for row in part.rows) for part in parts]
        shapes = []
        if shard.rank == 0 and not shard.is_last:
            shapes = [(count, shard.config.vocab_size) for count in counts if count]
        sampled = len(shapes)
        if not counts[-1]:
            shapes += self._end_together()
        coming = [ranks.begin_recv(torch.empty(*shape), self._last_stage) for shape in shapes]
        return Begun(tuple(logits), tuple(coming), sampled)

    @torch.inference_mode()
    def finish(self, begun: Begun) -> torch.Tensor:
        """Waits for the end of the step: as `run`. From any one thread, in plan order. Raises RankLost."""
        came = [wait() for wait in begun.coming]
        logits = (*begun.logits, *came[: begun.sampled])
        return torch.cat(logits) if logits else torch.empty(0, self._shard.config.vocab_size)

    def _end_together(self) -> list[tuple[int, int]]:
        """Tells the leader that every rank has computed the last micro-batch. Its logits would say so: they follow the
        hidden states through all stages, and all ranks of the last one take part in them. Returns the shape of the word
        that comes to this rank, if one does.
        """
        shard, ranks = self._shard, self._ranks
        if shard.is_last:
            done = ranks.all_reduce(torch.zeros(1, 1))
            if shard.place == 0 and not shard.is_first:
                ranks.send(done, 0)
        return [(1, 1)] if shard.rank == 0 and not shard.is_last else []
