"""How a `Model` is built from a source of weights (`weight_source`).

Memory rule: one resident copy, in the form that computes, and at most one layer in passing. So sources hand out one
tensor (or a stretch of rows) at a time, every linear is packed as soon as its own tensors are read, and `release` after
each layer lets go of mapped file pages. All shapes are checked against the files' headers before anything is read.
"""

from __future__ import annotations

import ctypes

import torch

from ...kernels.dispatch import half_dtype, make_linear
from ...kernels.linear import EmbeddingTable, Linear, StackedLinear, TiedHead, fits_half
from ..models.config import ModelConfig
from ..models.errors import ModelError
from ..models.reference import ModelFiles
from .forward import Progress
from .gguf_weights import GgufWeights
from .hf_weights import DummyWeights, HfWeights
from .model import DecoderLayer, Model, Norm
from .parallel.shard import Shard
from .parallel.weights import ShardedWeights
from .weight_source import WeightSource, check_shapes, stretches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_weights(files: ModelFiles) -> WeightSource:
    """The source for a resolved model. ModelError if its files cannot be read."""
    if files.kind == "dummy":
        return DummyWeights(files.config)
    assert files.path is not None
    return GgufWeights(files.path, files.config) if files.kind == "gguf" else HfWeights(files.path, files.config)


def load_model(files: ModelFiles, dtype: str, progress: Progress | None = None) -> Model:
    """Reads and packs a model. `dtype`: `bfloat16` (16-bit weights, float32 sums) or `float32`.

    Raises ModelError (a ValueError) naming what is wrong with the files or `dtype`.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: {dtype!r} is not one of {sorted(DTYPES)}")
    source = open_weights(files)
    return build_model(files.config, source, DTYPES[dtype], progress)


@torch.inference_mode()
def build_model(
    config: ModelConfig, source: WeightSource, dtype: torch.dtype, progress: Progress | None = None
) -> Model:
    """A model from checked tensors of `source`, one layer in passing at a time."""
    check_shapes(config, source)
    return build_part(Shard(config=config), source, dtype, progress)


@torch.inference_mode()
def build_part(shard: Shard, source: WeightSource, dtype: torch.dtype, progress: Progress | None = None) -> Model:
    """What one rank of a worker computes of a model, or all of it; `source` has the whole model and was checked. Its
    linears are the rank's own: what ranks compute together is put in by `parallel.layers`.
    """
    return assemble(shard, Builder(shard.local, ShardedWeights(source, shard), dtype, progress))


def assemble(shard: Shard, builder: Builder) -> Model:
    """What `builder` makes of one rank's part of a model, layer by layer."""
    held, tied = builder.shapes, shard.config.tie_word_embeddings
    embed = builder.table("embed.weight") if "embed.weight" in held else None
    layers = [builder.layer(f"layers.{index}.") for index in shard.layers]
    head: Linear | None = None
    if shard.is_last:
        head = builder.tied_head(embed) if tied and embed is not None else builder.head()
    model = Model(
        config=shard.local,
        embed=embed if shard.is_first else None,
        positions=builder.table("positions.weight") if "positions.weight" in held else None,
        project_in=builder.linear("project_in") if "project_in.weight" in held else None,
        layers=layers,
        final_norm=builder.norm("final_norm") if "final_norm.weight" in held else None,
        project_out=builder.linear("project_out") if "project_out.weight" in held else None,
        head=head,
    )
    builder.finish()
    return model


class Builder:
    """Reads tensors in the order in which the model wants them, counts elements for `progress`, and puts each into the
    form that computes on processors.
    """

    def __init__(
        self, config: ModelConfig, source: WeightSource, dtype: torch.dtype, progress: Progress | None
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.shapes = source.shapes()
        self._progress = progress or (lambda share: None)
        self._total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        self._read = 0

    def finish(self) -> None:
        self.source.release()
        self._progress(1.0)

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """As the source has it."""
        tensor = self.source.read(name, rows)
        self._read += tensor.numel()
        return tensor

    def layer_done(self) -> None:
        """Lets go of what reading left behind, and tells how far it is."""
        self.source.release()
        _return_free_memory()
        self._progress(self._read / self._total)

    def table(self, name: str) -> EmbeddingTable:
        """An embedding table in compute form, filled stretch by stretch."""
        table: torch.Tensor | None = None
        for rows in stretches(self.shapes[name]):
            values = self.tensor(name, rows)
            if table is None:
                dtype = self.dtype if self.dtype == torch.float32 else half_dtype(values)
                table = torch.empty(self.shapes[name], dtype=dtype)
            if table.dtype == torch.float16 and not fits_half(values):
                table = table.to(torch.bfloat16)
            table[rows] = values.to(table.dtype)
            del values
            self.layer_done()
        assert table is not None
        return EmbeddingTable(table)

    def tied_head(self, embed: EmbeddingTable) -> Linear:
        """The output head of a model that embeds with the same table."""
        return TiedHead(embed)

    def head(self) -> Linear:
        """An output head of its own, packed stretch by stretch."""
        parts = []
        for rows in stretches(self.shapes["head.weight"]):
            parts.append(make_linear(self.tensor("head.weight", rows), None, self.dtype))
            self.layer_done()
        return parts[0] if len(parts) == 1 else StackedLinear(parts)

    def linear(self, *names: str) -> Linear:
        """One linear of the named ones stacked, so that packed projections are one product."""
        weights = [self.tensor(f"{name}.weight") for name in names]
        biases = [self.tensor(f"{name}.bias") for name in names if f"{name}.bias" in self.shapes]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
        if self.dtype == torch.float32 and len(names) == 1:
            weight = weight.to(torch.float32, copy=True)  # never a view of a mapped file: those pages are let go
        self.source.release()
        return make_linear(weight, torch.cat(biases).float() if biases else None, self.dtype)

    def norm(self, name: str) -> Norm:
        """A norm's vectors, float32 in every precision."""
        bias = f"{name}.bias"
        return Norm(
            weight=self.tensor(f"{name}.weight").to(torch.float32, copy=True),
            bias=self.tensor(bias).to(torch.float32, copy=True) if bias in self.shapes else None,
            eps=self.config.norm_eps,
        )

    def layer(self, prefix: str) -> DecoderLayer:
        gated, normed = self.config.gated_mlp, self.config.qk_norm
        layer = DecoderLayer(
            attention_norm=self.norm(f"{prefix}attention_norm"),
            qkv=self.linear(f"{prefix}q", f"{prefix}k", f"{prefix}v"),
            q_norm=self.norm(f"{prefix}q_norm") if normed else None,
            k_norm=self.norm(f"{prefix}k_norm") if normed else None,
            attention_out=self.linear(f"{prefix}attention_out"),
            mlp_norm=self.norm(f"{prefix}mlp_norm"),
            up=self.linear(f"{prefix}gate", f"{prefix}up") if gated else self.linear(f"{prefix}up"),
            down=self.linear(f"{prefix}down"),
        )
        self.layer_done()
        return layer


def _return_free_memory() -> None:
    """Gives freed heap back to the system. Packed weights lie between the freed float32 of their layers; without this
    glibc keeps those holes, up to a fifth of a model. Other C libraries lack the call and need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
