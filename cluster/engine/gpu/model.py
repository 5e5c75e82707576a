"""The forward pass of a step on a GPU, over the kernels of `kernels.gpu` or what stands for them (`GpuOperations`):
Llama, Mistral, Qwen2, Qwen3, OPT.

The weights are an `engine.model.Model`, the same object as on processors with the device's own linears; the pass is
another one, because what is worth fusing differs. A sum into the residual stream, the norm behind it and, for int8
products, the quantization of its result are one kernel; so are rotation and the writing of keys and values. Decode rows
and prompts have an attention kernel each, over stretches of the same tensors.

Legend: T tokens of a step, B decode rows (the first tokens), R rows that sample, C hidden size, F MLP width, H query
heads, K kv heads, D head dim, N blocks, L layers, S slots. The residual stream is float32 in every precision, as on
processors; everything else between two products has the model's dtype.

Nothing here waits for the device or lets data decide a shape, so that a step of decode rows alone can be captured where
the operations do neither (Triton's).
"""
# ruff: noqa: N803, N815

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....kernels.dispatch import gpu_facts, interpreter, pick_gpu
from ....kernels.gpu_plans.decode import DecodePlan
from ....kernels.gpu_plans.prefill import PrefillPlan
from ....kernels.linear import Linear
from ....kernels.operations import GpuOperations, Int8Operations
from ....kernels.picked import Picked
from ....kernels.rotary import rotary_tables
from ...models.config import ModelConfig
from ..model import DecoderLayer, Model, Norm
from ..positions import OPT_POSITION_OFFSET, inverse_frequencies
from .linears import DeviceLinear, Rows

ACTIVATIONS = ("silu", "relu", "gelu")
_MOST_HEAD_DIM = 256
"""That the Triton kernels compute."""


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A step's rows on the device: those that decode first, then stretches of prompts. Index tensors are int32."""

    tokens_T: torch.Tensor
    sources_T: torch.Tensor
    """Where in `drawn` a token is that is still being drawn; -1: it is among `tokens_T`."""
    positions_T: torch.Tensor
    blocks_T: torch.Tensor
    """Block that each token's KV goes to (-1: padding, written nowhere), …"""
    slots_T: torch.Tensor
    """… and the slot in it."""
    decode_rows: int
    """B, padding included."""
    decode: DecodePlan | None
    """None: B is 0."""
    decode_tables: torch.Tensor
    """[B, .] block tables."""
    prefill: PrefillPlan | None
    prefill_tables: torch.Tensor
    """[., .] block tables of the stretches."""
    sampled_R: torch.Tensor | None
    """Indices into T of the tokens whose logits are wanted; None: all T, in order."""


def unsupported(config: ModelConfig) -> str | None:
    """Why the pass cannot run a model, whatever computes; None: it can."""
    if config.activation not in ACTIVATIONS:
        return f"activation {config.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if config.head_dim % 2:
        return f"head_dim {config.head_dim} is not an even number"
    if not config.norm_before:
        return "the model normalizes behind its sums (OPT-350m)"
    if config.num_heads % config.num_kv_heads or config.num_heads // config.num_kv_heads > 32:
        return f"{config.num_heads} query heads over {config.num_kv_heads} kv heads are no multiple up to 32"
    return None


def beyond_triton(config: ModelConfig) -> str | None:
    """Why the Triton kernels cannot run a model that the pass can; None: they can."""
    if config.head_dim > _MOST_HEAD_DIM:
        return f"head_dim {config.head_dim} is more than {_MOST_HEAD_DIM}"
    return None


def picked_for(config: ModelConfig, device: torch.device, kernels: str, quantization: str | None) -> Picked:
    """Who computes a model on `device`. ValueError where what is asked for cannot run it, or not here."""
    obstacle = unsupported(config)
    if obstacle is not None:
        raise ValueError(f"device: 'cuda' is not allowed for this model: {obstacle}; allowed: cpu")
    facts = gpu_facts(device) if device.type == "cuda" else interpreter()
    return pick_gpu(kernels, facts, quantization, beyond_triton(config))


class GpuModel:
    """A loaded model over one KV memory. Called from one thread, under `torch.inference_mode`."""

    def __init__(
        self,
        model: Model,
        kv: torch.Tensor,
        dtype: torch.dtype,
        operations: GpuOperations,
        scales: torch.Tensor | None = None,
    ) -> None:
        """`kv`: [N, L, 2, K, S, D] on the device of the weights; `scales`: [L, 2, K] float32 where it is narrow."""
        self.weights = model
        self.kv = kv
        self._scales = [None] * len(model.layers) if scales is None else list(scales)
        self.shape = model.attention_shape(kv.shape[4])
        self._config = model.config
        self._dtype = dtype
        self._operations = operations
        frequencies = torch.from_numpy(inverse_frequencies(model.config).copy())
        self._frequencies = frequencies.to(kv.device)

    def forward(self, batch: DeviceBatch, drawn: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Computes a step: writes its KV and returns logits [R, V] float32. `drawn` int32: tokens of the step before;
        -1 is none, and computed as token 0.

        A stage of a pipeline that does not embed goes on from the residual stream of the one before, `residual` [T, C]
        float32, which is overwritten; one without a head returns its own. What travels so is the whole state between
        two layers, unrounded: a pipeline's numbers are one rank's.
        """
        layers, last = self.weights.layers, len(self.weights.layers) - 1
        if residual is None:
            waiting = drawn.index_select(0, batch.sources_T.clamp(min=0)).clamp(min=0)
            x = self._embed(torch.where(batch.sources_T < 0, batch.tokens_T, waiting), batch.positions_T)
            residual = x.float()
            normed = self._norm(layers[0].attention_norm, x, None, layers[0].qkv)
        else:
            nothing = torch.zeros_like(residual, dtype=self._dtype)
            normed = self._norm(layers[0].attention_norm, nothing, residual, layers[0].qkv)
        rope = None
        if not self._config.learned_positions:
            rope = rotary_tables(batch.positions_T, self._frequencies)
        narrow = None if self.weights.head is None else batch.sampled_R
        for index, layer in enumerate(layers):
            y = self._attention(layer, index, normed, batch, rope)
            if index == last and narrow is not None:  # all KV is written: the rest is for sampled tokens only
                y, residual = y.index_select(0, narrow), residual.index_select(0, narrow)
            hidden = _linear(layer.up).of(self._norm(layer.mlp_norm, y, residual, layer.up))
            y = _linear(layer.down).of(self._activation(hidden, layer.down))
            if index < last:
                normed = self._norm(layers[index + 1].attention_norm, y, residual, layers[index + 1].qkv)
        return residual.add_(y) if self.weights.head is None else self._logits(y, residual)

    def _embed(self, tokens_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        weights = self.weights
        assert weights.embed is not None
        x = weights.embed(tokens_T)
        if weights.project_in is not None:
            x = weights.project_in(x)
        if weights.positions is not None:
            x = x + weights.positions(positions_T + OPT_POSITION_OFFSET)
        return x

    def _attention(
        self,
        layer: DecoderLayer,
        index: int,
        normed: Rows,
        batch: DeviceBatch,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """[T, C] -> [T, C]; writes the layer's keys and values."""
        c, operations = self._config, self._operations
        memory, scales = self.kv[:, index], self._scales[index]
        heads = _linear(layer.qkv).of(normed).view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._head_norm(layer.q_norm, q), self._head_norm(layer.k_norm, k)
        q = operations.kv_write(q, k, v, rope, memory, batch.blocks_T, batch.slots_T, scales)
        out = torch.empty_like(q)
        if batch.decode is not None:
            rows, tables = batch.decode_rows, batch.decode_tables
            operations.decode_attention(q[:rows], memory, tables, batch.decode, self.shape, out[:rows], scales)
        if batch.prefill is not None:
            tables = batch.prefill_tables
            operations.prefill_attention(q, memory, tables, batch.prefill, self.shape, out, scales)
        return _linear(layer.attention_out).of(out.flatten(1))

    def _activation(self, hidden: torch.Tensor, down: Linear) -> Rows:
        c = self._config
        if _fuses_int8(down):
            return self._int8.activation(hidden, c.activation, gated=c.gated_mlp)
        return self._operations.activation(hidden, c.activation, gated=c.gated_mlp)

    def _logits(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        weights = self.weights
        assert weights.head is not None
        assert weights.final_norm is not None
        if weights.project_out is not None:
            y = weights.project_out(self._plain_norm(weights.final_norm, y, residual))
            return _linear(weights.head).logits(y)
        return _linear(weights.head).logits(self._norm(weights.final_norm, y, residual, weights.head))

    def _norm(self, norm: Norm, x: torch.Tensor, residual: torch.Tensor | None, into: Linear) -> Rows:
        """`x` added to the residual stream, normalized, as `into` takes it. `residual` is changed."""
        if not _fuses_int8(into):
            return self._plain_norm(norm, x, residual)
        if norm.bias is None:
            return self._int8.rms_norm(x, norm.weight, norm.eps, residual)
        return self._int8.layer_norm(x, norm.weight, norm.bias, norm.eps, residual)

    def _plain_norm(self, norm: Norm, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if norm.bias is None:
            return self._operations.rms_norm(x, norm.weight, norm.eps, residual)
        return self._operations.layer_norm(x, norm.weight, norm.bias, norm.eps, residual)

    def _head_norm(self, norm: Norm, x_THD: torch.Tensor) -> torch.Tensor:
        """Each head's channels alone."""
        flat = x_THD.reshape(-1, x_THD.shape[2])
        return self._operations.rms_norm(flat, norm.weight, norm.eps).view(x_THD.shape)

    @property
    def _int8(self) -> Int8Operations:
        int8 = self._operations.int8
        assert int8 is not None, "who computes has no quantized products: `dispatch.pick_gpu` refuses them"
        return int8


def _linear(linear: Linear) -> DeviceLinear:
    assert isinstance(linear, DeviceLinear)
    return linear


def _fuses_int8(linear: Linear) -> bool:
    """Whether its input comes quantized: an observer wants to see it before."""
    return _linear(linear).takes_int8 and linear.observer is None
