"""A model's weights on a GPU: the sources of `engine.weights`, put where and in the form that they are computed with.

A tensor goes to the device as it is read, into the place that it has in its packed product; nothing of a model but the
tensor in passing is ever whole in host memory. Quantized weights are made on the device, from one product at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ....kernels.int4 import GROUPS, quantize_int4
from ....kernels.int8 import quantize_rows_reference
from ....kernels.linear import EmbeddingTable, Linear
from ...models.config import ModelConfig
from ...models.errors import ModelError
from ..forward import Progress
from ..model import Model, Norm
from ..parallel.shard import Shard
from ..parallel.weights import ShardedWeights, part_shapes
from ..weight_source import WeightSource, check_shapes, expected_shapes, stretches
from ..weights import DTYPES, Builder, assemble
from .linears import DeviceLinear, DeviceTable

if TYPE_CHECKING:
    from ....kernels.gpu.tuning import Tuner

QUANTIZATIONS = (None, "w8a8", "w4a16")
_QUANTIZED_ROWS = 4096


@torch.inference_mode()
def build_on(
    device: torch.device,
    config: ModelConfig,
    source: WeightSource,
    dtype: str,
    quantization: str | None = None,
    *,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> Model:
    """A model on `device` from checked tensors of `source`, all of it or one rank's part. `dtype`: `bfloat16` or
    `float32`; `quantization`: one of QUANTIZATIONS.

    Raises ModelError naming what is wrong with the files or what this model cannot be quantized to.
    """
    check_shapes(config, source)
    shard = shard or Shard(config=config)
    if quantization is not None:
        _check_quantization(shard.local, dtype, quantization)
    builder = DeviceBuilder(device, shard.local, ShardedWeights(source, shard), DTYPES[dtype], quantization, progress)
    return assemble(shard, builder)


def _check_quantization(config: ModelConfig, dtype: str, quantization: str) -> None:
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization: {quantization!r} is not one of w8a8, w4a16")
    if quantization == "w4a16":
        if dtype != "bfloat16":
            raise ModelError(f"quantization: 'w4a16' is not allowed with dtype {dtype}; allowed: bfloat16")
        for inputs in (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim):
            if _group(inputs) is None:
                allowed = " or ".join(map(str, GROUPS))
                raise ModelError(
                    f"quantization: 'w4a16' is not allowed for a model whose products have {inputs} inputs; allowed: "
                    f"multiples of {allowed}"
                )


def expected_bytes(shard: Shard, dtype: str, quantization: str | None) -> int:
    """What `build_on` puts on the device, before any of it is read."""
    shapes, element = part_shapes(shard), DTYPES[dtype].itemsize
    total = sum(_tensor_bytes(name, shape, element, quantization) for name, shape in shapes.items())
    if shard.is_last and shard.config.tie_word_embeddings and _kind("head", quantization) is not None:
        total += _tensor_bytes("head.weight", shapes["embed.weight"], element, quantization)
        if not shard.is_first:  # the table went into the head
            total -= _tensor_bytes("embed.weight", shapes["embed.weight"], element, quantization)
    return total


def _tensor_bytes(name: str, shape: tuple[int, ...], element: int, quantization: str | None) -> int:
    *_, base, what = name.split(".")
    if base.endswith("norm"):
        return 4 * math.prod(shape)
    kind = None if what == "bias" or base in ("embed", "positions") else _kind(base, quantization)
    if kind == "w8a8":
        return shape[0] * (shape[1] + 4)
    group = _group(shape[1]) if kind == "w4a16" else None
    return math.prod(shape) * element if group is None else shape[0] * (shape[1] // 2 + 4 * (shape[1] // group))


def _kind(name: str, quantization: str | None) -> str | None:
    """How a product is quantized. `name`: without its layer's; queries, keys and values are one product."""
    if name in ("q", "k", "v") or name.startswith("project") or (name == "head" and quantization == "w4a16"):
        return None
    return quantization


def _group(inputs: int) -> int | None:
    """The largest group of inputs that share a scale."""
    return next((group for group in reversed(GROUPS) if inputs % group == 0), None)


class DeviceBuilder(Builder):
    """Puts each tensor into the form that computes on a GPU.

    As on processors, `w8a8` leaves queries, keys and values in 16 bits: of all products they lose most as integers.
    `w4a16` leaves them and the output head.
    """

    def __init__(
        self,
        device: torch.device,
        config: ModelConfig,
        source: WeightSource,
        dtype: torch.dtype,
        quantization: str | None,
        progress: Progress | None,
    ) -> None:
        super().__init__(config, source, dtype, progress)
        self._device = device
        self._quantization = quantization
        self._tuner = _tuner(device) if quantization is not None and device.type == "cuda" else None

    def table(self, name: str) -> EmbeddingTable:
        return DeviceTable(self._matrix(name))

    def head(self) -> Linear:
        return self._linear("head", self._matrix("head.weight"), None)

    def tied_head(self, embed: EmbeddingTable) -> Linear:
        assert isinstance(embed, DeviceTable)
        head = self._linear("head", embed.weight, None)
        if isinstance(head, DeviceLinear) and _kind("head", self._quantization) is None:
            head.resident_bytes = 0
        return head

    def linear(self, *names: str) -> Linear:
        columns = self.shapes[f"{names[0]}.weight"][1]
        counts = [self.shapes[f"{name}.weight"][0] for name in names]
        weight = torch.empty(sum(counts), columns, dtype=self.dtype, device=self._device)
        for name, part in zip(names, weight.split(counts), strict=True):
            part.copy_(self.tensor(f"{name}.weight"))
        biases = [self.tensor(f"{name}.bias") for name in names if f"{name}.bias" in self.shapes]
        bias = torch.cat(biases).to(self._device, self.dtype) if biases else None
        self.source.release()
        return self._linear(names[0].rpartition(".")[2], weight, bias)

    def norm(self, name: str) -> Norm:
        norm = super().norm(name)
        bias = None if norm.bias is None else norm.bias.to(self._device)
        return Norm(norm.weight.to(self._device), bias, norm.eps)

    def _matrix(self, name: str) -> torch.Tensor:
        """A table, filled stretch by stretch."""
        table = torch.empty(self.shapes[name], dtype=self.dtype, device=self._device)
        for rows in stretches(self.shapes[name]):
            table[rows].copy_(self.tensor(name, rows))
        self.layer_done()
        return table

    def _linear(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        kind = _kind(name, self._quantization)
        if kind is None:
            return DeviceLinear(weight, bias)
        from .quantized_linears import Int4Linear, Int8Linear

        if kind == "w8a8":
            return Int8Linear(*_quantized(weight), bias, self.dtype, self._tuner)
        group = _group(weight.shape[1])
        assert group is not None
        return Int4Linear(*quantize_int4(weight, group), bias, self._tuner)


def _tuner(device: torch.device) -> Tuner:
    from ....kernels.gpu.tuning import Tuner

    return Tuner.of_device(device)


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and scales by row, some rows at a time: the formula's intermediates are float32."""
    parts = [quantize_rows_reference(rows) for rows in weight.split(_QUANTIZED_ROWS)]
    return torch.cat([integers for integers, _ in parts]), torch.cat([scales for _, scales in parts])


class DeviceDummyWeights(WeightSource):
    """Random weights drawn on the device itself, for benchmarks: an 8B model in a second. Other numbers than those of
    `hf_weights.DummyWeights`, of the same scales.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self._shapes = expected_shapes(config)
        self._dtype = dtype
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def stored_name(self, name: str) -> str:
        return name

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Drawn anew each time."""
        shape = self._shapes[name]
        count = len(range(shape[0])[rows]) if rows is not None else shape[0]
        values = torch.empty(count, *shape[1:], dtype=self._dtype, device=self._generator.device)
        if "norm" in name and name.endswith(".weight"):
            return values.uniform_(0.9, 1.1, generator=self._generator)
        scale = 1 / math.sqrt(shape[1]) if len(shape) > 1 else 0.02
        return values.normal_(0.0, scale, generator=self._generator)

    def release(self) -> None:
        pass
