"""The decoder: one forward pass for Llama (SmolLM2, Mistral), Qwen2, Qwen3 and OPT, driven by `ModelConfig`.

Legend: T tokens of a step (all rows flattened), R rows that sample, C hidden size, E embedding width, F MLP width,
H query heads, K kv heads, D head dim, N blocks, L layers, S slots of a block, V vocabulary.

The pass is ragged: rows of any length, decode and prefill mixed, lie one after another in T. Everything but attention
looks at each token alone, so a token's result does not depend on what else is in the batch. The residual stream and all
sums are float32 in every precision; weights and KV are what is narrow.
"""
# ruff: noqa: N803, N806, N815

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...kernels.dispatch import operations
from ...kernels.linear import EmbeddingTable, Linear
from ...kernels.operations import Operations
from ...kernels.paged_attention import AttentionPlan, AttentionShape, Workspace
from ...kernels.rotary import rotary_tables
from ..models.config import ModelConfig
from .positions import OPT_POSITION_OFFSET, inverse_frequencies


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's rows, flattened. Index tensors are int64."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    blocks_T: torch.Tensor
    """Block that each token's KV goes to, …"""
    slots_T: torch.Tensor
    """… and the slot in it."""
    attention: AttentionPlan
    sampled_R: torch.Tensor | None
    """Indices into T of the tokens whose logits are wanted; None: all T, in order."""
    sampled_attention: AttentionPlan
    """Attention of those tokens alone: the last layer computes nothing else (the same plan where `sampled_R` is None).
    """


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm, or layer norm where there is a bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, ops: Operations, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        if self.bias is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(Protocol):
    """Rows of a table by token id."""

    resident_bytes: int

    def __call__(self, ids_T: torch.Tensor, /) -> torch.Tensor:
        """[T] int64 -> [T, E] float32."""


@dataclass(slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer. Linears may be replaced (quantization) and observed (`Linear.observer`)."""

    attention_norm: Norm
    qkv: Linear
    """C -> (H + 2K) * D: queries, keys, values in one product."""
    q_norm: Norm | None
    k_norm: Norm | None
    attention_out: Linear
    mlp_norm: Norm
    up: Linear
    """C -> F, or C -> 2F with the gate first."""
    down: Linear


@dataclass(slots=True, kw_only=True)
class Model:
    """A loaded model, or the part of it that one rank of a worker computes (`engine.parallel`). `forward` is called
    from one thread, under `torch.inference_mode`.
    """

    config: ModelConfig
    """As these layers see it: their number, and the heads and MLP columns of this rank."""
    embed: Embedding | None
    """None: a stage of a pipeline that is not the first."""
    positions: EmbeddingTable | None
    project_in: Linear | None
    layers: list[DecoderLayer]
    final_norm: Norm | None
    project_out: Linear | None
    head: Linear | None
    """None: a stage of a pipeline that is not the last."""
    ops: Operations = field(default_factory=lambda: operations("torch"))
    workspace: Workspace = field(default_factory=Workspace)

    def attention_shape(self, block_size: int) -> AttentionShape:
        """What planning a step's attention needs to know."""
        c = self.config
        return AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, block_size, c.sliding_window)

    def linears(self) -> dict[str, Linear]:
        """Every linear by name, for observers and memory accounting."""
        named = {"project_in": self.project_in, "project_out": self.project_out, "head": self.head}
        for index, layer in enumerate(self.layers):
            for part in ("qkv", "attention_out", "up", "down"):
                named[f"layers.{index}.{part}"] = getattr(layer, part)
        return {name: linear for name, linear in named.items() if linear is not None}

    def resident_bytes(self) -> int:
        """Memory of embeddings and linears (norms are negligible)."""
        tables = [table for table in (self.embed, self.positions) if table is not None]
        return sum(t.resident_bytes for t in tables) + sum(x.resident_bytes for x in self.linears().values())

    def forward(self, batch: StepBatch, kv: torch.Tensor, x_TC: torch.Tensor | None = None) -> torch.Tensor:
        """Computes a step: writes its KV into `kv` [N, L, 2, K, S, D] and returns logits [R, V] float32.

        A stage that does not embed goes on from the hidden state of the one before, `x_TC`; one without a head returns
        its own [T, C].
        """
        x = self._embed(batch) if x_TC is None else x_TC
        rope = None
        if not self.config.learned_positions:
            rope = rotary_tables(batch.positions_T, torch.from_numpy(inverse_frequencies(self.config)))
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1 and self.head is not None
            x = self._layer(layer, x, kv[:, index], batch, rope, narrow=last)
        if self.final_norm is not None:
            x = self.final_norm(self.ops, x)
        if self.project_out is not None:
            x = self.project_out(x)
        return x if self.head is None else self.head(x)

    def _embed(self, batch: StepBatch) -> torch.Tensor:
        assert self.embed is not None, "a later stage needs the hidden state of the one before"
        x: torch.Tensor = self.embed(batch.tokens_T)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + self.positions(batch.positions_T + OPT_POSITION_OFFSET)
        return x

    def _layer(
        self,
        layer: DecoderLayer,
        x_TC: torch.Tensor,
        kv_N2KSD: torch.Tensor,
        batch: StepBatch,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        narrow: bool,
    ) -> torch.Tensor:
        """One layer; with `narrow` it goes on, after all KV is written, for the sampled tokens alone."""
        before = self.config.norm_before
        q_THD = self._attend_inputs(
            layer, layer.attention_norm(self.ops, x_TC) if before else x_TC, kv_N2KSD, batch, rope
        )
        plan = batch.attention
        if narrow and batch.sampled_R is not None:
            x_TC, q_THD = x_TC[batch.sampled_R], q_THD[batch.sampled_R]
            plan = batch.sampled_attention
        shape = self.attention_shape(kv_N2KSD.shape[3])
        attended = self.ops.paged_attention(q_THD, kv_N2KSD, plan, shape, self.workspace)
        x_TC = x_TC + layer.attention_out(attended.flatten(1))
        if not before:
            x_TC = layer.attention_norm(self.ops, x_TC)
        hidden = layer.up(layer.mlp_norm(self.ops, x_TC) if before else x_TC)
        hidden = self.ops.activation(hidden, self.config.activation, gated=self.config.gated_mlp)
        x_TC = x_TC.add_(layer.down(hidden))
        return x_TC if before else layer.mlp_norm(self.ops, x_TC)

    def _attend_inputs(
        self,
        layer: DecoderLayer,
        x_TC: torch.Tensor,
        kv_N2KSD: torch.Tensor,
        batch: StepBatch,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Projects, normalizes and rotates; writes keys and values to memory and returns the queries [T, H, D]."""
        c = self.config
        heads = layer.qkv(x_TC).view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        qk, v = heads[:, : -c.num_kv_heads], heads[:, -c.num_kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q_THD, k = qk[:, : c.num_heads], qk[:, c.num_heads :]
            qk = torch.cat((layer.q_norm(self.ops, q_THD), layer.k_norm(self.ops, k)), dim=1)
        if rope is not None:
            qk = self.ops.rotary(qk, *rope)
        q_THD, k = qk[:, : c.num_heads], qk[:, c.num_heads :]
        self.ops.kv_write(kv_N2KSD, torch.stack((k, v), dim=1), batch.blocks_T, batch.slots_T)
        return q_THD
