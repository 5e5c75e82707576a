"""Compiled decoders of tiny models beside the torch model with the same weights, and steps over their own KV memory."""

from __future__ import annotations

import numpy as np
import torch
from tandem.cluster.engine.compiled import decoder_shape
from tandem.cluster.engine.model import Model
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.engine.runner import Runner
from tandem.cluster.engine.weight_source import WeightSource
from tandem.cluster.models.config import ModelConfig
from tandem.cluster.types import SamplingParams
from tandem.kernels.compiled.decoder import CompiledModel, StepArrays

BLOCK_SIZE = 4


def compiled(config: ModelConfig, source: WeightSource, kind: str, threads: int = 1) -> CompiledModel:
    return CompiledModel.build(
        decoder_shape(config), kind, lambda name: source.read(name).float().numpy(), threads=threads
    )


class CompiledSteps:
    """Drives a `CompiledModel` over KV memory full of NaN; sequences get shuffled, disjoint block tables."""

    def __init__(self, model: CompiledModel, dtype: type = np.float32, num_blocks: int = 120) -> None:
        s = model.shape
        shape = (num_blocks, s.num_layers, 2, s.num_kv_heads, BLOCK_SIZE, s.head_dim)
        nan = np.nan if dtype == np.float32 else 0x7FC0
        self.model = model
        self.kv = np.full(shape, nan, dtype)
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def table(self, tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-tokens // BLOCK_SIZE))]

    def run(self, *rows: tuple[list[int], int, list[int], bool]) -> torch.Tensor:
        """Rows of (tokens, start, table, sample) -> logits [R, V]."""
        tokens: list[int] = []
        tables: list[int] = []
        words, sampled = [], []
        for ids, start, table, sample in rows:
            words.append((len(tokens), start, len(ids), len(tables)))
            tokens += ids
            tables += table
            sampled += [len(tokens) - 1] if sample else []
        arrays = (np.array(values, np.int64) for values in (tokens, words, tables, sampled))
        return torch.from_numpy(self.model.step(StepArrays(*arrays), self.kv))


class TorchSteps:
    """Drives a torch `Model` by the same rows."""

    def __init__(self, model: Model, num_blocks: int = 120) -> None:
        c = model.config
        shape = (num_blocks, c.num_layers, 2, c.num_kv_heads, BLOCK_SIZE, c.head_dim)
        self.runner = Runner(model, torch.full(shape, float("nan")))

    def run(self, *rows: tuple[list[int], int, list[int], bool]) -> torch.Tensor:
        """Rows of (tokens, start, table, sample) -> logits [R, V]."""
        spec = SampleSpec(SamplingParams(), 0, [], [])
        plan = StepPlan(
            0, tuple(StepRow(str(i), at, ids, table, spec if s else None) for i, (ids, at, table, s) in enumerate(rows))
        )
        return self.runner.run(plan)
