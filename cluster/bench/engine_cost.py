"""What a step of a model must read and compute at least, from its config: the yardstick of `bench.engine`. Pure.

Bytes of a step: every weight that it multiplies with, once (an embedding table only where it is also the output head),
plus the KV of each row's context, once. Operations of a step, two for each multiply-add: all linears for each token,
the output head for each token that is sampled, and attention, 4 * heads * head_dim for each pair of a query and a key
that it sees. What the last layer would compute for tokens that nobody samples is not counted: nothing needs it.
Norms, rotary and activations are left out of both; they are below one part in a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class RowShape:
    """One row of a step: `length` tokens from position `start` on; the last one is sampled, or none."""

    start: int
    length: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class StepCost:
    """Sums over a step, or over several."""

    read_bytes: int = 0
    linear_flops: int = 0
    """In the products that W8A8 computes in integers: all linears but those that make q, k and v."""
    qkv_flops: int = 0
    """In those: bfloat16 also where the others are integers, see `kernels.compiled.decoder_weights`."""
    attention_flops: int = 0

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(
            self.read_bytes + other.read_bytes,
            self.linear_flops + other.linear_flops,
            self.qkv_flops + other.qkv_flops,
            self.attention_flops + other.attention_flops,
        )


def layer_flops_per_token(config: ModelConfig) -> tuple[int, int]:
    """Of a layer's linears: (query, key and value projection; all others)."""
    c = config
    qkv = 2 * c.hidden_size * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    out = 2 * c.num_heads * c.head_dim * c.hidden_size
    mlp = 2 * c.hidden_size * c.intermediate_size * (3 if c.gated_mlp else 2)
    return qkv, out + mlp


def seen_keys(config: ModelConfig, start: int, length: int) -> int:
    """Pairs of a query at start … start+length-1 and a key that it sees, in one layer."""
    window = config.sliding_window
    if window is None or start + length <= window:
        return length * start + length * (length + 1) // 2
    growing = max(0, window - start)  # queries that still see everything before them
    return growing * start + growing * (growing + 1) // 2 + (length - growing) * window


def step_cost(config: ModelConfig, rows: Sequence[RowShape], *, weight_bytes: int, kv_token_bytes: int) -> StepCost:
    """The least that a step of `rows` reads and computes. `weight_bytes`: read by every step; `kv_token_bytes`: KV of
    one token in all layers.
    """
    c = config
    first, rest = layer_flops_per_token(c)
    read, linear, qkv, pairs = weight_bytes, 0, 0, 0
    for row in rows:
        oldest = 0 if c.sliding_window is None else max(0, row.start - c.sliding_window + 1)
        read += (row.start + row.length - oldest) * kv_token_bytes
        qkv += row.length * c.num_layers * first
        linear += row.length * (c.num_layers - 1) * rest
        pairs += (c.num_layers - 1) * seen_keys(c, row.start, row.length)
        if row.sampled:
            linear += rest + 2 * c.vocab_size * (c.embed_dim or c.hidden_size)
            pairs += seen_keys(c, row.start + row.length - 1, 1)
    return StepCost(read, linear, qkv, 4 * c.num_heads * c.head_dim * pairs)


def step_weight_bytes(config: ModelConfig, precision: str) -> int:
    """Weights that a step reads whole: all linears and the output head. `precision`: `float32`, `bfloat16` or `w8a8`
    (a byte each and a float32 scale for each output; q, k and v in bfloat16, see `kernels.compiled.decoder_weights`).
    """
    c = config
    first, rest = layer_flops_per_token(c)
    embed_dim = c.embed_dim or c.hidden_size
    elements = c.num_layers * (first + rest) // 2 + c.vocab_size * embed_dim
    if precision == "w8a8":
        scales = c.num_layers * (2 * c.hidden_size + c.intermediate_size * (2 if c.gated_mlp else 1)) + c.vocab_size
        return elements + c.num_layers * first // 2 + 4 * scales
    return elements * {"float32": 4, "bfloat16": 2}[precision]
