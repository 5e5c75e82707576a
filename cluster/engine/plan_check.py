"""What a step plan must be before a device computes it. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..models.config import ModelConfig
from .plan import StepPlan, StepRow


def check_plan(plan: StepPlan, config: ModelConfig, num_blocks: int, block_size: int) -> None:
    """ValueError if a row of `plan` is malformed for this model and KV memory."""
    for row in plan.rows:
        end = row.start + len(row.token_ids)
        if not row.token_ids or row.start < 0 or end > config.max_model_len:
            raise ValueError(
                f"row {row.seq_id!r}: positions {row.start}…{end - 1} are empty or not in 0…{config.max_model_len - 1}"
            )
        if len(row.block_ids) * block_size < end:
            raise ValueError(
                f"row {row.seq_id!r}: {len(row.block_ids)} blocks of {block_size} do not hold {end} tokens"
            )
        if min(row.token_ids) < 0 or max(row.token_ids) >= config.vocab_size:
            raise ValueError(f"row {row.seq_id!r}: token_ids are not all in 0…{config.vocab_size - 1}")
        blocks = used_blocks(row, block_size)
        if blocks.min() < 0 or blocks.max() >= num_blocks:
            raise ValueError(f"row {row.seq_id!r}: block_ids are not all in 0…{num_blocks - 1}")


def used_blocks(row: StepRow, block_size: int) -> npt.NDArray[np.int64]:
    """The blocks that the row's context lies in, its own stretch included."""
    used = -(-(row.start + len(row.token_ids)) // block_size)
    return np.asarray(row.block_ids[:used], dtype=np.int64)
