"""A decoder's weights in the form that computes, from tensors by canonical name or from arrays of a cache.

Names of tensors: `embed`, `positions`, `project_in`, `project_out`, `final_norm`, `head` and, under `layers.<i>.`,
`attention_norm`, `q`, `k`, `v`, `q_norm`, `k_norm`, `attention_out`, `mlp_norm`, `gate`, `up`, `down`; each with
`.weight` and where there is one `.bias`. Packed, q, k and v are one product `qkv`, and a gate's panels stand between
those of `up`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .activation import ACTIVATIONS
from .packed import PackedWeight, pack_weight, padded
from .tile import NR

Array = NDArray[np.generic]
Read = Callable[[str], NDArray[np.float32]]
"""A tensor by canonical name, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """What a decoder is: the facts of `cluster.models.config.ModelConfig` that its computation depends on."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm: str = "rms"
    """`rms` or `layer`."""
    norm_eps: float = 1e-5
    norm_before: bool = True
    activation: str = "silu"
    """`silu`, `relu` or `gelu`."""
    gated_mlp: bool = True
    rotary_frequencies: tuple[float, ...] | None = None
    """[D/2] float32, radians per position; None: learned positions instead."""
    position_offset: int = 0
    """Row of position 0 in the table of learned positions."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    embed_dim: int | None = None
    """Width of the embedding where it differs from hidden_size."""

    @property
    def embed_width(self) -> int:
        """E."""
        return self.embed_dim or self.hidden_size


def unsupported(shape: DecoderShape) -> str | None:
    """Why the compiled decoder cannot run a model; None: it can."""
    if shape.activation not in ACTIVATIONS:
        return f"activation {shape.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if shape.norm not in ("rms", "layer"):
        return f"norm {shape.norm!r} is not one of rms, layer"
    if shape.rotary_frequencies is not None and 2 * len(shape.rotary_frequencies) != shape.head_dim:
        return f"{len(shape.rotary_frequencies)} rotary frequencies are not half of head_dim {shape.head_dim}"
    if shape.num_heads % shape.num_kv_heads:
        return f"{shape.num_heads} heads are no multiple of {shape.num_kv_heads} kv heads"
    return None


@dataclass(slots=True)
class DecoderWeights:
    """Packed linears, and vectors and tables padded to whole panels, by name."""

    linears: dict[str, PackedWeight] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    tables: dict[str, Array] = field(default_factory=dict)
    """[rows, padded width] float32, or uint16 holding bfloat16."""

    def arrays(self) -> dict[str, Array]:
        """Everything, by unique name; the arrays themselves."""
        named: dict[str, Array] = {**self.vectors, **self.tables}
        for name, packed in self.linears.items():
            named.update({f"{name}.{part}": array for part, array in packed.arrays().items()})
        return named


def kind_of(name: str, kind: str) -> str:
    """The kind in which a linear of a model of `kind` is packed: W8A8 keeps q, k and v in bfloat16.

    Of all linears these lose most as integers (half of what W8A8 costs in perplexity), and they are an eighth of it.
    """
    return "bfloat16" if kind == "w8a8" and name.endswith(".qkv") else kind


def linear_shapes(shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every packed linear."""
    s = shape
    queries, keys = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    up = 2 * padded(s.intermediate_size) if s.gated_mlp else s.intermediate_size
    shapes = {"head": (s.embed_width, s.vocab_size)}
    if s.embed_dim is not None:
        shapes["project_in"], shapes["project_out"] = (s.embed_dim, s.hidden_size), (s.hidden_size, s.embed_dim)
    for index in range(s.num_layers):
        shapes[f"layers.{index}.qkv"] = (s.hidden_size, queries + 2 * keys)
        shapes[f"layers.{index}.attention_out"] = (queries, s.hidden_size)
        shapes[f"layers.{index}.up"] = (s.hidden_size, up)
        shapes[f"layers.{index}.down"] = (s.intermediate_size, s.hidden_size)
    return shapes


def _vector_names(shape: DecoderShape) -> Iterator[str]:
    parts = ("weight",) if shape.norm == "rms" else ("weight", "bias")
    norms = [f"layers.{index}.{name}" for index in range(shape.num_layers) for name in ("attention_norm", "mlp_norm")]
    if shape.norm_before:
        norms.append("final_norm")
    for name in norms:
        yield from (f"{name}.{part}" for part in parts)
    if shape.qk_norm:
        yield from (f"layers.{i}.{name}.weight" for i in range(shape.num_layers) for name in ("q_norm", "k_norm"))


def _table_names(shape: DecoderShape) -> list[str]:
    names = [] if shape.tie_word_embeddings else ["embed.weight"]
    return names if shape.rotary_frequencies is not None else [*names, "positions.weight"]


def _pad_columns(values: NDArray[np.float32]) -> NDArray[np.float32]:
    width = values.shape[-1]
    return np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, padded(width) - width)]).astype(np.float32, copy=False)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _interleaved(gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]:
    """[F, …] twice -> [2 F, …], F padded to whole panels: a panel of the gate, a panel of up, and so on."""
    rows = padded(gate.shape[0])
    out = np.zeros((rows // NR, 2, NR, *gate.shape[1:]), np.float32)
    for place, values in enumerate((gate, up)):
        whole = np.zeros((rows, *gate.shape[1:]), np.float32)
        whole[: values.shape[0]] = values
        out[:, place] = whole.reshape(rows // NR, NR, *gate.shape[1:])
    return out.reshape(2 * rows, *gate.shape[1:])


def build_weights(shape: DecoderShape, kind: str, read: Read) -> DecoderWeights:
    """Packs tensor by tensor; `read` is called once for each."""
    weights = DecoderWeights()
    for name in _vector_names(shape):
        weights.vectors[name] = _pad_columns(read(name))
    for name in _table_names(shape):
        table = _pad_columns(read(name))
        weights.tables[name] = table if kind == "float32" else to_bfloat16(table)
        del table
    head = "embed.weight" if shape.tie_word_embeddings else "head.weight"
    weights.linears["head"] = pack_weight(read(head), kind)
    if shape.embed_dim is not None:
        for name in ("project_in", "project_out"):
            weights.linears[name] = pack_weight(read(f"{name}.weight"), kind)
    for index in range(shape.num_layers):
        for name, packed in _pack_layer(shape, kind, read, f"layers.{index}."):
            weights.linears[name] = packed
    return weights


def _pack_layer(shape: DecoderShape, kind: str, read: Read, prefix: str) -> Iterator[tuple[str, PackedWeight]]:
    def vector(names: tuple[str, ...], there: bool) -> NDArray[np.float32] | None:
        return np.concatenate([read(f"{prefix}{name}.bias") for name in names]) if there else None

    qkv = np.concatenate([read(f"{prefix}{name}.weight") for name in ("q", "k", "v")])
    yield f"{prefix}qkv", pack_weight(qkv, kind_of(f"{prefix}qkv", kind), vector(("q", "k", "v"), shape.qkv_bias))
    out_bias = vector(("attention_out",), shape.attention_out_bias)
    yield f"{prefix}attention_out", pack_weight(read(f"{prefix}attention_out.weight"), kind, out_bias)
    up, up_bias = read(f"{prefix}up.weight"), vector(("up",), shape.mlp_bias)
    if shape.gated_mlp:
        up = _interleaved(read(f"{prefix}gate.weight"), up)
        if up_bias is not None:
            up_bias = _interleaved(read(f"{prefix}gate.bias"), up_bias)
    yield f"{prefix}up", pack_weight(up, kind, up_bias)
    down_bias = vector(("down",), shape.mlp_bias)
    yield f"{prefix}down", pack_weight(read(f"{prefix}down.weight"), kind, down_bias)


def weights_from_arrays(shape: DecoderShape, kind: str, arrays: Mapping[str, Array]) -> DecoderWeights:
    """The inverse of `DecoderWeights.arrays`, without a copy. ValueError if an array is missing or does not fit."""
    weights = DecoderWeights()
    try:
        weights.vectors = {name: _checked_vector(name, arrays[name], shape) for name in _vector_names(shape)}
        weights.tables = {name: _checked_table(name, arrays[name], shape, kind) for name in _table_names(shape)}
        for name, (inputs, outputs) in linear_shapes(shape).items():
            parts = ("data", "scale", "bias", "compensation")
            found = {part: arrays[f"{name}.{part}"] for part in parts if f"{name}.{part}" in arrays}
            weights.linears[name] = _linear_from_arrays(name, kind_of(name, kind), inputs, outputs, found)
    except KeyError as error:
        raise ValueError(f"arrays: {error.args[0]} is missing") from None
    return weights


def _checked_vector(name: str, array: Array, shape: DecoderShape) -> NDArray[np.float32]:
    width = padded(shape.head_dim if name.endswith(("q_norm.weight", "k_norm.weight")) else shape.hidden_size)
    if array.dtype != np.float32 or array.shape != (width,):
        raise ValueError(f"arrays: {name}: is {array.dtype} {array.shape}, not float32 {(width,)}")
    return array.view(np.float32)


def _checked_table(name: str, array: Array, shape: DecoderShape, kind: str) -> Array:
    dtype = np.dtype(np.float32 if kind == "float32" else np.uint16)
    is_embed = name == "embed.weight"
    width = padded(shape.embed_width if is_embed else shape.hidden_size)
    rows = shape.vocab_size if is_embed or array.ndim == 0 else array.shape[0]
    if array.dtype != dtype or array.shape != (rows, width):
        raise ValueError(f"arrays: {name}: is {array.dtype} {array.shape}, not {dtype} {(rows, width)}")
    return array


def _linear_from_arrays(name: str, kind: str, inputs: int, outputs: int, arrays: Mapping[str, Array]) -> PackedWeight:
    try:
        return PackedWeight.from_arrays(kind, inputs, outputs, arrays)
    except ValueError as error:
        raise ValueError(f"arrays: {name}: {error}") from None
