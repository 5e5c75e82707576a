"""From a `StepPlan` to logits: flattens the rows of a checked plan and runs the model over the paged KV memory.

The KV memory is one tensor, block-major: kv[block, layer, 2, kv_head, slot, head_dim] (`kvtransfer.layout`).
"""

# ruff: noqa: N803

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.dispatch import operations
from ...kernels.paged_attention import AttentionRow, plan_attention
from ..models.reference import ModelFiles
from .forward import Forward, Progress
from .model import Model, StepBatch
from .plan import StepPlan
from .plan_check import used_blocks
from .weights import load_model


class Runner:
    """Runs steps of one model over one KV memory. One thread."""

    def __init__(self, model: Model, kv: torch.Tensor) -> None:
        self.model = model
        self.kv = kv
        self.num_blocks = kv.shape[0]
        self.block_size = kv.shape[4]
        self._shape = model.attention_shape(self.block_size)

    @torch.inference_mode()
    def run(self, plan: StepPlan, x_TC: torch.Tensor | None = None) -> torch.Tensor:
        """Computes a checked plan; logits [R, V] float32 of the rows that sample, in plan order. Stages of a pipeline:
        as `Model.forward`.
        """
        batch, fresh = self._flatten(plan)
        if fresh:
            self.kv.index_fill_(0, torch.tensor(fresh), 0)
        return self.model.forward(batch, self.kv, x_TC)

    def _flatten(self, plan: StepPlan) -> tuple[StepBatch, list[int]]:
        """The batch, and blocks that begin in this step and stay partly empty.

        Those are cleared: attention gathers whole blocks, and what an earlier owner left in the masked slots must not
        reach a product (0 * NaN is NaN).
        """
        tokens: list[int] = []
        positions, blocks, slots = [], [], []
        rows: list[AttentionRow] = []
        last_rows: list[AttentionRow] = []
        sampled: list[int] = []
        fresh: list[int] = []
        for row in plan.rows:
            length, offset = len(row.token_ids), len(tokens)
            end = row.start + length
            where = np.arange(row.start, end)
            table = used_blocks(row, self.block_size)
            tokens.extend(row.token_ids)
            positions.append(where)
            blocks.append(table[where // self.block_size])
            slots.append(where % self.block_size)
            ids = table.tolist()
            rows.append(AttentionRow(offset, row.start, length, ids))
            if row.sample is not None:
                last_rows.append(AttentionRow(len(sampled), end - 1, 1, ids))
                sampled.append(offset + length - 1)
            if end % self.block_size and end // self.block_size * self.block_size >= row.start:
                fresh.append(ids[-1])
        attention = plan_attention(rows, self._shape)
        everything = len(sampled) == len(tokens)
        batch = StepBatch(
            tokens_T=torch.tensor(tokens),
            positions_T=torch.from_numpy(np.concatenate(positions)),
            blocks_T=torch.from_numpy(np.concatenate(blocks)),
            slots_T=torch.from_numpy(np.concatenate(slots)),
            attention=attention,
            sampled_R=None if everything else torch.tensor(sampled, dtype=torch.int64),
            sampled_attention=attention if everything else plan_attention(last_rows, self._shape),
        )
        return batch, fresh


def torch_view(kv: NDArray[np.generic]) -> torch.Tensor:
    """KV memory as a tensor, without a copy; uint16 is bfloat16."""
    tensor = torch.from_numpy(kv)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


class TorchForward(Forward):
    """A model computed by torch's operations."""

    def __init__(
        self,
        files: ModelFiles,
        dtype: str,
        kernels: str,
        kv: NDArray[np.generic],
        *,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """`kernels`: `torch` or `reference`; `kv`: [N, L, 2, K, S, D], bfloat16 as uint16. ModelError for the files."""
        torch.set_num_threads(threads)
        model = load_model(files, dtype, progress)
        model.ops = operations(kernels)
        self.resident_bytes = model.resident_bytes()
        self._runner: Runner | None = Runner(model, torch_view(kv))
        self._threads = threads
        self._bound_thread: int | None = None

    def run(self, plan: StepPlan) -> NDArray[np.float32]:
        assert self._runner is not None
        current = threading.get_ident()
        if current != self._bound_thread:
            torch.set_num_threads(self._threads)  # torch counts them by thread
            self._bound_thread = current
        logits: NDArray[np.float32] = self._runner.run(plan).numpy()
        return logits

    def close(self) -> None:
        self._runner = None
