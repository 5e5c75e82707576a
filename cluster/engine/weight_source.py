"""What a model needs by name and shape, and the seam through which weights come in, one tensor at a time.

Canonical names: `embed`, `positions`, `project_in`, `project_out`, `final_norm`, `head` and, under `layers.<i>.`,
`attention_norm`, `q`, `k`, `v`, `q_norm`, `k_norm`, `attention_out`, `mlp_norm`, `gate`, `up`, `down`; each with
`.weight` and where the architecture has one `.bias`. `hf_weights` and `gguf_weights` translate from their files' names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from ..models.config import ModelConfig
from ..models.errors import ModelError
from .positions import OPT_POSITION_OFFSET

STRETCH_ELEMENTS = 2**20
"""Tables and output heads are read this many elements at a time."""


def stretches(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a table, some at a time."""
    rows, columns = shape
    step = max(1, STRETCH_ELEMENTS // columns)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


class WeightSource(ABC):
    """Tensors of one model by canonical name. Used by one thread while a model is built."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name -> shape, from headers alone. ModelError if the files hold a tensor that means nothing."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or `rows` of its first dimension, in any float dtype. The caller may not change it."""

    def read_columns(self, name: str, columns: slice) -> torch.Tensor:
        """Some columns of a matrix, otherwise like `read`."""
        return self.read(name)[:, columns]

    @abstractmethod
    def stored_name(self, name: str) -> str:
        """What the files call a canonical name, for error messages."""

    @abstractmethod
    def release(self) -> None:
        """Lets go of whatever reading left in memory (mapped pages, handles); reading may go on afterwards."""


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this architecture has, by canonical name."""
    c = config
    embed_dim = c.embed_dim or c.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (c.vocab_size, embed_dim)}
    if not c.tie_word_embeddings:
        shapes["head.weight"] = (c.vocab_size, embed_dim)
    if c.learned_positions:
        shapes["positions.weight"] = (c.max_model_len + OPT_POSITION_OFFSET, c.hidden_size)
    if c.embed_dim is not None:
        shapes["project_in.weight"] = (c.hidden_size, embed_dim)
        shapes["project_out.weight"] = (embed_dim, c.hidden_size)
    if c.norm_before:
        _add_norm(shapes, "final_norm", c.hidden_size, c)
    for index in range(c.num_layers):
        _add_layer(shapes, f"layers.{index}.", c)
    return shapes


def _add_layer(shapes: dict[str, tuple[int, ...]], prefix: str, c: ModelConfig) -> None:
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    linears = {
        "q": (queries, c.hidden_size, c.qkv_bias),
        "k": (keys, c.hidden_size, c.qkv_bias),
        "v": (keys, c.hidden_size, c.qkv_bias),
        "attention_out": (c.hidden_size, queries, c.attention_out_bias),
        "up": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "down": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }
    if c.gated_mlp:
        linears["gate"] = (c.intermediate_size, c.hidden_size, c.mlp_bias)
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{prefix}{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{prefix}{name}.bias"] = (rows,)
    for name in ("attention_norm", "mlp_norm"):
        _add_norm(shapes, prefix + name, c.hidden_size, c)
    if c.qk_norm:
        shapes[f"{prefix}q_norm.weight"] = shapes[f"{prefix}k_norm.weight"] = (c.head_dim,)


def _add_norm(shapes: dict[str, tuple[int, ...]], name: str, size: int, config: ModelConfig) -> None:
    shapes[f"{name}.weight"] = (size,)
    if config.norm == "layer":
        shapes[f"{name}.bias"] = (size,)


def check_shapes(config: ModelConfig, source: WeightSource) -> None:
    """ModelError naming the first tensor that is missing, mis-shaped or unknown, and the shapes."""
    expected, found = expected_shapes(config), source.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(f"tensor {source.stored_name(name)!r} ({name}) is missing; expected shape {shape}")
        if found[name] != shape:
            raise ModelError(f"tensor {source.stored_name(name)!r} ({name}) has shape {found[name]}, expected {shape}")
    for name, shape in found.items():
        if name not in expected and not (name == "head.weight" and config.tie_word_embeddings):
            raise ModelError(
                f"tensor {source.stored_name(name)!r} ({name}) of shape {shape} has no place in a "
                f"{config.architecture} model with this config; expected: none of that name"
            )
