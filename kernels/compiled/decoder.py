"""A decoder that computes whole steps in compiled code: weights, the memory that steps work in, and the call.

Legend: T tokens of a step, R sampled ones, B rows, N blocks, L layers, K kv heads, S slots of a block, D head dim, V
vocabulary. `decoder_step` says what is computed.
"""
# ruff: noqa: N815

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numba import types
from numpy.typing import NDArray

from . import attention, decoder_plan, embedding
from . import decoder_step as words
from .activation import ACTIVATIONS
from .decoder_weights import Array, DecoderShape, DecoderWeights, Read, build_weights, unsupported, weights_from_arrays
from .entry import entry
from .linear import linear, scratch_bytes
from .packed import KINDS, aligned_empty, describe, padded
from .team import Team
from .tile import NR

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


_APART = 16
"""Floats between rows of a buffer: rows a multiple of 4 KiB apart would fall into the same few places of the cache (5
to 13 % of a step of several rows).
"""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step's rows, flattened; contiguous int64 arrays."""

    tokens_T: Ints
    rows_B4: Ints
    """Of each row `decoder_plan.ROW`: its first token in T, that token's position, how many tokens, where its block
    table begins in `tables`. Rows cover T in order."""
    tables: Ints
    """Block tables, one after another; each covers its row's context."""
    sampled_R: Ints
    """Indices into T, ascending, of the tokens whose logits are wanted."""


def _power_of_two(count: int) -> int:
    """The smallest that is not less: memory grows a few times in a life, however slowly steps do."""
    return 1 << max(count - 1, 0).bit_length()


def _check(shape: DecoderShape) -> None:
    reason = unsupported(shape)
    if reason is not None:
        raise ValueError(f"shape: {reason}")


class CompiledModel:
    """A loaded decoder. Steps are called by one thread at a time."""

    def __init__(
        self, shape: DecoderShape, kind: str, weights: DecoderWeights, *, threads: int = 1, cpus: Sequence[int] = ()
    ) -> None:
        """`kind`: one of `linear.KINDS`; `cpus`: processors that helper threads are pinned to (`Team`).

        Loads, or makes and keeps, the compiled code. ValueError for a model that is not supported.
        """
        _check(shape)
        self.shape = shape
        self.kind = kind
        self._weights = weights
        self._kept: list[Array] = []
        self._model = self._describe_model()
        self._team = Team(threads, cpus)
        self._step = np.zeros(words.STEP, np.int64)
        self._geometry = np.zeros(attention.GEOMETRY, np.int64)
        self._counters = np.zeros(shape.num_layers, np.int64)
        linear_scratch = max(scratch_bytes(w.kind, w.in_features, 1 << 30) for w in weights.linears.values())
        group = shape.num_heads // shape.num_kv_heads
        rank_bytes = max(linear_scratch, attention.scratch_bytes(group, shape.head_dim))
        rank_bytes = -(-rank_bytes // 4096) * 4096 + 64  # ranks do not share a cache line, nor all places of a cache
        self._scratch = aligned_empty(rank_bytes * threads)
        self._set(S_SCRATCH=self._scratch.ctypes.data, S_SCRATCH_BYTES=rank_bytes, S_BARRIER=self._team.barrier)
        self._set(S_GEOMETRY=self._geometry.ctypes.data, S_COUNTERS=self._counters.ctypes.data)
        self._tokens = self._sampled = 0
        self._buffers: dict[str, Array] = {}
        words.decoder_step.compile((types.int64,) * 4)

    @classmethod
    def build(
        cls, shape: DecoderShape, kind: str, read: Read, *, threads: int = 1, cpus: Sequence[int] = ()
    ) -> CompiledModel:
        """Packs the tensors that `read` gives by canonical name (`decoder_weights`)."""
        if kind not in KINDS:
            raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
        _check(shape)
        return cls(shape, kind, build_weights(shape, kind, read), threads=threads, cpus=cpus)

    @classmethod
    def from_arrays(
        cls, shape: DecoderShape, kind: str, arrays: Mapping[str, Array], *, threads: int = 1, cpus: Sequence[int] = ()
    ) -> CompiledModel:
        """A model of what `arrays` gave, under the same `linear.layout`; the arrays are used, not copied."""
        return cls(shape, kind, weights_from_arrays(shape, kind, arrays), threads=threads, cpus=cpus)

    def arrays(self) -> dict[str, Array]:
        """The weights as they compute, by unique name."""
        return self._weights.arrays()

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights."""
        return sum(array.nbytes for array in self.arrays().values())

    def close(self) -> None:
        """Ends the helper threads; no step may follow."""
        self._team.close()

    def step(self, batch: StepArrays, kv: Array) -> Floats:
        """Computes a step: writes its keys and values into `kv` and returns the sampled tokens' logits [R, V] float32.

        `kv`: [N, L, 2, K, S, D], contiguous, float32, or any 16-bit dtype holding bfloat16. What a step is given is not
        checked: tokens and blocks out of range read or write foreign memory.
        """
        tokens, sampled = len(batch.tokens_T), len(batch.sampled_R)
        if tokens > self._tokens or sampled > self._sampled:
            self._grow(max(_power_of_two(tokens), self._tokens), max(_power_of_two(sampled), self._sampled))
        logits = np.empty((sampled, padded(self.shape.vocab_size) + _APART), np.float32)
        self._plan(batch, kv)
        self._set(
            S_TOKENS=tokens,
            S_SAMPLED=sampled,
            S_NARROW=int(sampled != tokens),
            S_IDS=batch.tokens_T.ctypes.data,
            S_SAMPLED_ROWS=batch.sampled_R.ctypes.data,
            S_LOGITS=logits.ctypes.data,
            S_LOGITS_STRIDE=logits.strides[0],
        )
        self._counters.fill(0)
        self._team.run(words.decoder_step, self._model.ctypes.data, self._step.ctypes.data)
        return logits[:, : self.shape.vocab_size]

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self._step[getattr(words, name)] = value

    def _plan(self, batch: StepArrays, kv: Array) -> None:
        """Describes the KV memory and works out the step's places and items."""
        _, _, _, kv_heads, slots, _ = kv.shape
        slot_bytes, block_bytes = kv.strides[4], kv.strides[0]
        half = int(kv.itemsize == 2)
        self._set(S_KV=kv.ctypes.data, S_KV_HALF=half, S_KV_LAYER_BYTES=kv.strides[1], S_KV_HEAD_BYTES=kv.strides[3])
        geometry = self._geometry
        geometry[attention.TABLES] = batch.tables.ctypes.data
        geometry[attention.BLOCK_BYTES] = block_bytes
        geometry[attention.SLOTS] = slots
        geometry[attention.HALF] = half
        at = {name: buffer.ctypes.data for name, buffer in self._buffers.items() if name in _PLANNED}
        count = decoder_plan.plan_rows(
            batch.rows_B4.ctypes.data,
            len(batch.rows_B4),
            batch.tables.ctypes.data,
            attention.tile_tokens(self.shape.num_heads // kv_heads),
            slots,
            block_bytes,
            slot_bytes,
            at["positions"],
            at["places"],
            at["table_of"],
            at["items"],
        )
        self._set(S_ITEM_COUNT=count, S_SAMPLED_ITEM_COUNT=len(batch.sampled_R))
        if len(batch.sampled_R) != len(batch.tokens_T):
            decoder_plan.plan_sampled(
                batch.sampled_R.ctypes.data, len(batch.sampled_R), at["positions"], at["table_of"], at["sampled_items"]
            )

    def _grow(self, tokens: int, sampled: int) -> None:
        """Memory for steps of so many tokens. Zeroed: padding of rows stays zero."""
        s = self.shape
        self._tokens, self._sampled = tokens, sampled
        hidden, heads = padded(s.hidden_size), s.num_heads + 2 * s.num_kv_heads
        mlp = padded(s.intermediate_size)
        columns = {
            "x": (tokens, hidden),
            "narrowed": (sampled, hidden),
            "normed": (tokens, hidden),
            "qkv": (tokens, padded(heads * s.head_dim)),
            "attended": (tokens, padded(s.num_heads * s.head_dim)),
            "up": (tokens, 2 * mlp if s.gated_mlp else mlp),
            "mlp": (tokens, mlp),
            "embedded": (tokens if s.embed_dim is not None else 0, padded(s.embed_width)),
        }
        self._buffers = {}
        columns = {name: (rows, width + _APART) for name, (rows, width) in columns.items()}
        columns["rotary"] = (tokens, s.head_dim)
        for name, (rows, width) in columns.items():
            self._buffers[name] = aligned_empty(4 * rows * width).view(np.float32).reshape(rows, width)
            self._buffers[name].fill(0.0)
        for name in ("positions", "places", "table_of"):
            self._buffers[name] = np.zeros(tokens, np.int64)
        for name, count in (("items", tokens), ("sampled_items", sampled)):
            self._buffers[name] = np.zeros(count * attention.ITEM, np.int64)
        at = {name: buffer.ctypes.data for name, buffer in self._buffers.items()}
        stride = {name: 4 * width for name, (_, width) in columns.items()}
        self._set(S_POSITIONS=at["positions"], S_KV_PLACES=at["places"], S_ITEMS=at["items"])
        self._set(S_SAMPLED_ITEMS=at["sampled_items"], S_ROTARY=at["rotary"])
        self._set(S_X=at["x"], S_X_STRIDE=stride["x"], S_NARROWED=at["narrowed"], S_NORMED=at["normed"])
        self._set(S_QKV=at["qkv"], S_QKV_STRIDE=stride["qkv"])
        self._set(S_ATTENDED=at["attended"], S_ATTENDED_STRIDE=stride["attended"])
        self._set(S_UP=at["up"], S_UP_STRIDE=stride["up"], S_MLP=at["mlp"], S_MLP_STRIDE=stride["mlp"])
        self._set(S_EMBEDDED=at["embedded"], S_EMBEDDED_STRIDE=stride["embedded"])
        geometry = self._geometry
        geometry[attention.Q], geometry[attention.Q_STRIDE] = at["qkv"], stride["qkv"]
        geometry[attention.OUT], geometry[attention.OUT_STRIDE] = at["attended"], stride["attended"]
        geometry[attention.KV_HEADS], geometry[attention.GROUP] = s.num_kv_heads, s.num_heads // s.num_kv_heads
        geometry[attention.HEAD_DIM], geometry[attention.WINDOW] = s.head_dim, s.sliding_window or 0

    def _keep(self, array: Array) -> int:
        """Keeps an array as long as the model lives; its address."""
        self._kept.append(array)
        return int(array.ctypes.data)

    def _describe_model(self) -> Ints:
        s, weights = self.shape, self._weights
        linears = {name: self._keep(describe(packed)) for name, packed in weights.linears.items()}
        vectors = {name: array.ctypes.data for name, array in weights.vectors.items()}
        model = np.zeros(words.MODEL, np.int64)
        layers = np.zeros((s.num_layers, words.LAYER), np.int64)
        for index, layer in enumerate(layers):
            prefix = f"layers.{index}."
            for word, name in _LAYER_VECTORS.items():
                layer[word] = vectors.get(prefix + name, 0)
            for word, name in _LAYER_LINEARS.items():
                layer[word] = linears[prefix + name]
        values = {
            words.M_LAYERS: s.num_layers,
            words.M_LAYER_TABLE: self._keep(layers),
            words.M_HIDDEN: s.hidden_size,
            words.M_HEADS: s.num_heads,
            words.M_KV_HEADS: s.num_kv_heads,
            words.M_HEAD_DIM: s.head_dim,
            words.M_MLP_PANELS: padded(s.intermediate_size) // NR,
            words.M_ACTIVATION: ACTIVATIONS[s.activation],
            words.M_GATED: int(s.gated_mlp),
            words.M_NORM_BEFORE: int(s.norm_before),
            words.M_EPS: self._keep(np.array([s.norm_eps], np.float32)),
            words.M_POSITION_OFFSET: s.position_offset,
            words.M_EMBED: self._table("embed.weight", linears["head"]),
            words.M_PROJECT_IN: linears.get("project_in", 0),
            words.M_PROJECT_OUT: linears.get("project_out", 0),
            words.M_FINAL_WEIGHT: vectors.get("final_norm.weight", 0),
            words.M_FINAL_BIAS: vectors.get("final_norm.bias", 0),
            words.M_HEAD: linears["head"],
            words.M_LINEAR: entry(linear).address,
            words.M_ATTEND: entry(attention.attend).address,
        }
        if s.rotary_frequencies is None:
            values[words.M_POSITIONS] = self._table("positions.weight", 0)
        else:
            values[words.M_FREQUENCIES] = self._keep(np.array(s.rotary_frequencies, np.float32))
        for word, value in values.items():
            model[word] = value
        return model

    def _table(self, name: str, head: int) -> int:
        """Words of a plain table, or of the packed head where embeddings are tied."""
        table = self._weights.tables.get(name)
        if table is None:
            return self._keep(np.array([embedding.PACKED, head, self.shape.embed_width], np.int64))
        kind = embedding.PLAIN_FLOAT if table.itemsize == 4 else embedding.PLAIN_BF16
        return self._keep(np.array([kind, table.ctypes.data, table.shape[1]], np.int64))


_PLANNED = ("positions", "places", "table_of", "items", "sampled_items")
_LAYER_VECTORS = {
    words.L_NORM_WEIGHT: "attention_norm.weight",
    words.L_NORM_BIAS: "attention_norm.bias",
    words.L_Q_NORM: "q_norm.weight",
    words.L_K_NORM: "k_norm.weight",
    words.L_MLP_NORM_WEIGHT: "mlp_norm.weight",
    words.L_MLP_NORM_BIAS: "mlp_norm.bias",
}
_LAYER_LINEARS = {
    words.L_QKV: "qkv",
    words.L_OUT: "attention_out",
    words.L_UP: "up",
    words.L_DOWN: "down",
}
