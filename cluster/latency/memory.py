"""What a worker of a model, a device and a split can hold: weights, activations, blocks of KV. Pure.

    usable = memory · utilization - reserved
    KV     = usable - weights - activations           of the rank that holds most
    blocks = KV // (block size · KV bytes of a token)

`utilization` is what vLLM calls `gpu_memory_utilization`. Activations are those of the largest step: the residual and
the widest intermediate of one layer for its tokens, and float32 logits (twice: as they are and as they are sampled) for
the rows it samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .model_facts import ModelFacts

DEFAULT_UTILIZATION = 0.9
DEFAULT_BATCHED_TOKENS = 8192
DEFAULT_ROWS = 256
_LOGIT_BYTES = 4


class HasMemory(Protocol):
    """A device as far as memory goes: `hardware.Hardware`, or `DeviceMemory`."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def memory_bytes(self) -> int:
        """All of it."""

    @property
    def reserved_bytes(self) -> int:
        """Of that, what the runtime takes before any weight."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device of which nothing but its memory is known."""

    name: str
    memory_bytes: int
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """Bytes of the rank that holds most, and what they come to for the worker."""

    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    block_bytes: int
    """Of one block on this rank."""
    blocks: int
    tokens: int
    """Of context that the worker holds: all blocks full."""
    arithmetic: str
    """The sum, for a person."""


class DoesNotFit(ValueError):
    """The model, so split, does not fit into the device with room for the KV that is wanted; says the arithmetic."""


def worker_memory(
    facts: ModelFacts,
    hardware: HasMemory,
    tensor_parallel: int = 1,
    pipeline_stages: int = 1,
    *,
    block_size: int = 16,
    utilization: float = DEFAULT_UTILIZATION,
    max_batched_tokens: int = DEFAULT_BATCHED_TOKENS,
    max_rows: int = DEFAULT_ROWS,
    min_tokens: int = 1,
) -> WorkerMemory:
    """Memory of one worker. `min_tokens`: the context that it must hold at least, e.g. that of the longest request.

    Raises DoesNotFit (a ValueError) where it cannot, and ValueError naming a number out of range or a split that the
    model does not allow.
    """
    if not 0.0 < utilization <= 1.0:
        raise ValueError(f"utilization: {utilization!r} is not allowed; allowed: above 0, at most 1")
    limits = {"block_size": block_size, "max_batched_tokens": max_batched_tokens, "max_rows": max_rows}
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name}: {value!r} is not allowed; allowed: at least 1")
    usable = int(hardware.memory_bytes * utilization) - hardware.reserved_bytes
    weights = facts.weight_bytes_per_rank(tensor_parallel, pipeline_stages)
    activations = activation_bytes(facts, tensor_parallel, max_batched_tokens, max_rows)
    block = block_size * facts.kv_bytes_per_token_per_rank(tensor_parallel, pipeline_stages)
    kv = max(usable - weights - activations, 0)
    blocks = kv // block
    arithmetic = (
        f"{gib(hardware.memory_bytes)} of {hardware.name} x {utilization:g} "
        f"- {gib(hardware.reserved_bytes)} reserved - {gib(weights)} weights "
        f"- {gib(activations)} activations ({max_batched_tokens} tokens) "
        f"= {gib(usable - weights - activations)} for KV, {blocks} blocks of {block_size} tokens"
    )
    if blocks * block_size < min_tokens or blocks < 1:
        raise DoesNotFit(
            f"{facts.name} in {facts.dtype} with tensor_parallel {tensor_parallel}, pipeline_stages {pipeline_stages} "
            f"does not fit: {arithmetic}; needed: KV of {max(min_tokens, block_size)} tokens, "
            f"{gib(max(-(-min_tokens // block_size), 1) * block)}"
        )
    return WorkerMemory(
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        kv_bytes=kv,
        block_bytes=block,
        blocks=blocks,
        tokens=blocks * block_size,
        arithmetic=arithmetic,
    )


def activation_bytes(facts: ModelFacts, tensor_parallel: int, max_batched_tokens: int, max_rows: int) -> int:
    """Of one rank in its largest step."""
    c = facts.config
    heads, kv_heads = c.num_heads // tensor_parallel, -(-c.num_kv_heads // tensor_parallel)
    attention = 2 * (heads + kv_heads) * c.head_dim  # queries, keys, values, out
    feed_forward = (3 if c.gated_mlp else 2) * -(-c.intermediate_size // tensor_parallel)
    tokens = max_batched_tokens * (2 * c.hidden_size + max(attention, feed_forward)) * facts.activation_bytes
    logits = 2 * min(max_rows, max_batched_tokens) * c.vocab_size * _LOGIT_BYTES
    return tokens + logits


def gib(size_bytes: int) -> str:
    """For a person."""
    return f"{size_bytes / 2**30:.2f} GiB"
