"""How much KV a loaded model leaves room for on its GPU: the largest step and the largest decode step are run, over a
KV memory that is just large enough for them, and what they take at their peak is left beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ....kvtransfer.layout import KVLayout
from ..plan import StepPlan, StepRow
from .inputs import Limits
from .memory import (
    DeviceShare,
    KVRoom,
    StepMemory,
    check_asked_kv,
    check_weights,
    device_share,
    graph_bytes,
    held_bytes,
    kv_room,
    step_peak_bytes,
)
from .sampling import DEMANDING


def own_share(device: torch.device, utilization: float, kernels: str) -> DeviceShare:
    """A worker's part of its GPU, before it takes any of it. ValueError where no step can be measured (DoesNotFit where
    others hold too much).
    """
    if kernels == "reference":
        raise ValueError(
            "kv_cache_bytes: 0 is not allowed with kernels 'reference', whose steps are too slow to profile one; "
            "allowed: bytes of a block and more"
        )
    if device.type != "cuda":
        raise ValueError(
            "kv_cache_bytes: 0 is not allowed without a GPU to measure; allowed: bytes of a block and more"
        )
    share = device_share(device, utilization)
    share.check_free()
    return share


def check_model(
    device: torch.device, share: DeviceShare | None, *, model: str, weight_bytes: int, blocks: int, block_bytes: int
) -> None:
    """DoesNotFit, with the arithmetic, for what cannot be served from a GPU: before its weights are read. `share`: as
    of `own_share`; None: `blocks` of KV are asked for, from whatever is free now.
    """
    if share is not None:
        check_weights(share, model=model, weight_bytes=weight_bytes, block_bytes=block_bytes)
    elif device.type == "cuda":
        now = device_share(device, 1.0)
        check_asked_kv(now, model=model, weight_bytes=weight_bytes, kv_bytes=blocks * block_bytes)


def blocks_to_profile(limits: Limits, block_size: int) -> int:
    """Of the memory that profiling steps write to: that of the longest prompt, which all write over."""
    return min(limits.table_width, -(-limits.tokens // block_size))


def prompt_plan(tokens: int, limits: Limits, block_size: int, num_blocks: int) -> StepPlan:
    """A step of so many prompt tokens, of prompts as long as may be, which all write over each other's KV."""
    longest = limits.table_width * block_size
    lengths = [min(longest, tokens - first) for first in range(0, tokens, longest)]
    rows = (
        StepRow(
            f"prompt {index}", 0, [0] * length, [i % num_blocks for i in range(-(-length // block_size))], DEMANDING
        )
        for index, length in enumerate(lengths)
    )
    return StepPlan(0, tuple(rows))


def decode_plan(rows: int) -> StepPlan:
    """Rows of one token that are all sampled, all of them in one block."""
    return StepPlan(0, tuple(StepRow(f"row {i}", 0, [0], [0], DEMANDING) for i in range(rows)))


def measure_room(
    device: torch.device,
    share: DeviceShare,
    layout: KVLayout,
    limits: Limits,
    *,
    model: str,
    most_sampled: int,
    temporary_bytes: int,
    graphs: int,
    run: Callable[[StepPlan], object],
) -> KVRoom:
    """The KV that fits beside what is loaded now. `most_sampled`: rows that a step samples at most;
    `temporary_bytes`: of the KV memory to profile with, which goes again; `graphs`: how many decode steps will be
    captured; `run` computes a plan to its end.

    Raises DoesNotFit with the arithmetic.
    """
    weights = held_bytes(device) - temporary_bytes
    largest = prompt_plan(limits.tokens, limits, layout.block_size, blocks_to_profile(limits, layout.block_size))
    activations = step_peak_bytes(device, lambda: run(largest))
    drawn = step_peak_bytes(device, lambda: run(decode_plan(most_sampled)))
    widest = step_peak_bytes(device, lambda: run(decode_plan(limits.rows)))
    taken = StepMemory(
        weight_bytes=weights,
        activation_bytes=max(activations, drawn, widest),
        graph_bytes=graph_bytes(widest, graphs),
        max_batched_tokens=limits.tokens,
    )
    return kv_room(share, taken, model=model, block_bytes=layout.block_bytes, block_size=layout.block_size)
