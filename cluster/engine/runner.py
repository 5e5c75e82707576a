"""From a `StepPlan` to logits: flattens the plan's rows, checks them, and runs the model over the paged KV memory.

The KV memory is one tensor, block-major: kv[block, layer, 2, kv_head, slot, head_dim] (`kvtransfer.layout`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.paged_attention import AttentionRow, plan_attention
from .model import Model, StepBatch
from .plan import StepPlan, StepRow


class Runner:
    """Runs steps of one model over one KV memory. One thread."""

    def __init__(self, model: Model, kv: torch.Tensor) -> None:
        self.model = model
        self.kv = kv
        self.num_blocks = kv.shape[0]
        self.block_size = kv.shape[4]
        self._shape = model.attention_shape(self.block_size)

    def check(self, plan: StepPlan) -> None:
        """ValueError if a row of `plan` is malformed; nothing has been written then."""
        c = self.model.config
        for row in plan.rows:
            end = row.start + len(row.token_ids)
            if not row.token_ids or row.start < 0 or end > c.max_model_len:
                raise ValueError(
                    f"row {row.seq_id!r}: positions {row.start}…{end - 1} are empty or not in 0…{c.max_model_len - 1}"
                )
            if len(row.block_ids) * self.block_size < end:
                raise ValueError(
                    f"row {row.seq_id!r}: {len(row.block_ids)} blocks of {self.block_size} do not hold {end} tokens"
                )
            if min(row.token_ids) < 0 or max(row.token_ids) >= c.vocab_size:
                raise ValueError(f"row {row.seq_id!r}: token_ids are not all in 0…{c.vocab_size - 1}")
            blocks = self._table(row)
            if blocks.min() < 0 or blocks.max() >= self.num_blocks:
                raise ValueError(f"row {row.seq_id!r}: block_ids are not all in 0…{self.num_blocks - 1}")

    def _table(self, row: StepRow) -> npt.NDArray[np.int64]:
        """The blocks that the row's context lies in, its own stretch included."""
        used = -(-(row.start + len(row.token_ids)) // self.block_size)
        return np.asarray(row.block_ids[:used], dtype=np.int64)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Computes a checked plan; logits [R, V] float32 of the rows that sample, in plan order."""
        batch, fresh = self._flatten(plan)
        if fresh:
            self.kv.index_fill_(0, torch.tensor(fresh), 0)
        return self.model.forward(batch, self.kv)

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
            table = self._table(row)
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
