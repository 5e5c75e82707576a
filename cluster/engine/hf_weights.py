"""Weights from a Hugging Face folder (safetensors, sharded or not), and random ones of any architecture (`dummy`).

Tensors are read lazily, one at a time; files are opened anew after each `release`, so that no mapped page outlives the
layer that was read from it.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..models.config import Architecture, ModelConfig
from ..models.errors import ModelError
from .weight_source import WeightSource, expected_shapes, stretches

FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
INDEX_NAME = "model.safetensors.index.json"
_LLAMA_GLOBAL = {
    "model.embed_tokens": "embed",
    "model.norm": "final_norm",
    "lm_head": "head",
}
_LLAMA_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "attention_out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_OPT_GLOBAL = {
    "model.decoder.embed_tokens": "embed",
    "model.decoder.embed_positions": "positions",
    "model.decoder.project_in": "project_in",
    "model.decoder.project_out": "project_out",
    "model.decoder.final_layer_norm": "final_norm",
    "lm_head": "head",
}
_OPT_LAYER = {
    "self_attn_layer_norm": "attention_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "attention_out",
    "final_layer_norm": "mlp_norm",
    "fc1": "up",
    "fc2": "down",
}
_IGNORED = re.compile(
    r".*\.(rotary_emb\.inv_freq|masked_bias|self_attn\.(attn\.)?(q|prob)_scale|q_proj\.output_scale|prob_output_scale)"
)
"""Buffers that old checkpoints carry, which follow from the config; scales of narrow queries and probabilities."""
_KV_SCALE = re.compile(
    r"(?:model\.)?(?:decoder\.)?layers\.(\d{1,6})\.self_attn\."
    r"(?:(?:attn\.|qkv_proj\.)?([kv])_scale|([kv])_proj\.(?:\3_scale|output_scale)|(kv_scale))"
)
"""Scales of KV memory as vLLM reads them (`maybe_remap_kv_scale_name`): `k_scale` of compressed-tensors, that of a
projection of ModelOpt, `output_scale` of Quark, `kv_scale` (one for both) of old files."""
_TABLES = ("embed.weight", "head.weight", "positions.weight")
_LAYER_NAME = re.compile(r"model\.(?:decoder\.)?layers\.(\d+)\.(.+)\.(weight|bias)")


class HfWeights(WeightSource):
    """Tensors of a folder with `model.safetensors`, or shards and their index."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._opt = config.architecture is Architecture.OPT
        self._where: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kv_scales: dict[tuple[int, int], tuple[Path, str]] = {}
        self._open: dict[Path, Any] = {}
        for path in _shards(folder):
            self._index(path)
        if config.tie_word_embeddings and "embed.weight" not in self._where and "head.weight" in self._where:
            self._where["embed.weight"] = self._where["head.weight"]  # savers keep either name of a shared tensor
            self._shapes["embed.weight"] = self._shapes["head.weight"]
        self.release()

    def _index(self, path: Path) -> None:
        file = self._handle(path)
        for stored in file.keys():  # noqa: SIM118 (not a dict)
            if _IGNORED.fullmatch(stored):
                continue
            scale = _KV_SCALE.fullmatch(stored)
            name = self._canonical(stored, path) if scale is None else ""
            if name in self._where:
                raise ModelError(f"tensor {stored!r} comes twice: in {self._where[name][0].name} and {path.name}")
            found = file.get_slice(stored)
            if found.get_dtype() not in FLOAT_TYPES:
                allowed = ", ".join(FLOAT_TYPES)
                raise ModelError(f"{path}: tensor {stored!r} has type {found.get_dtype()}, allowed: {allowed}")
            if scale is not None:
                self._index_kv_scale(scale, path)
                continue
            self._where[name] = (path, stored)
            self._shapes[name] = tuple(found.get_shape())

    def _index_kv_scale(self, found: re.Match[str], path: Path) -> None:
        for kind in found[2] or found[3] or "kv":
            key = (int(found[1]), "kv".index(kind))
            if key in self._kv_scales:
                raise ModelError(f"{path}: {found[0]!r} and {self._kv_scales[key][1]!r} are scales of the same KV")
            self._kv_scales[key] = (path, found[0])

    def kv_scales(self) -> dict[tuple[int, int], tuple[str, torch.Tensor]]:
        """Of (layer, 0 for keys or 1 for values), where the files have scales of KV memory: stored name and tensor."""
        return {key: (stored, self._handle(path).get_tensor(stored)) for key, (path, stored) in self._kv_scales.items()}

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read as safetensors: {error}") from error
        return self._open[path]

    def _canonical(self, stored: str, path: Path) -> str:
        full = stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"  # saved without the head
        layer = _LAYER_NAME.fullmatch(full)
        if layer is not None:
            name = (_OPT_LAYER if self._opt else _LLAMA_LAYER).get(layer[2])
            if name is not None:
                return f"layers.{int(layer[1])}.{name}.{layer[3]}"
        base, _, kind = full.rpartition(".")
        name = (_OPT_GLOBAL if self._opt else _LLAMA_GLOBAL).get(base)
        if name is None or kind not in ("weight", "bias"):
            raise ModelError(f"{path}: tensor {stored!r} is not known")
        return f"{name}.{kind}"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def stored_name(self, name: str) -> str:
        if name in self._where:
            return self._where[name][1]
        *prefix, part, kind = name.split(".")
        if prefix:
            table, start = (_OPT_LAYER, "model.decoder.") if self._opt else (_LLAMA_LAYER, "model.")
            start += f"layers.{prefix[1]}."
        else:
            table, start = (_OPT_GLOBAL if self._opt else _LLAMA_GLOBAL), ""
        return f"{start}{({canonical: key for key, canonical in table.items()}).get(part, part)}.{kind}"

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        path, stored = self._where[name]
        file = self._handle(path)
        tensor: torch.Tensor = file.get_tensor(stored) if rows is None else file.get_slice(stored)[rows]
        return tensor

    def read_columns(self, name: str, columns: slice) -> torch.Tensor:
        path, stored = self._where[name]
        tensor: torch.Tensor = self._handle(path).get_slice(stored)[:, columns]
        return tensor

    def release(self) -> None:
        self._open.clear()


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder: those that the index names, or all there are. ModelError if one is missing."""
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        try:
            names = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
            raise ModelError(f"{index_path} is not an index of safetensors: {error!r}") from error
        paths = [folder / str(name) for name in names]
        if any(path.parent != folder for path in paths):
            raise ModelError(f"{index_path} names files outside of its folder")
    else:
        paths = sorted(folder.glob("*.safetensors"))
    try:
        missing = [path.name for path in paths if not path.is_file()]
    except OSError as error:  # a name that no file can have
        raise ModelError(f"{index_path} names a file that cannot be: {error.strerror}") from error
    if missing or not paths:
        raise ModelError(f"{folder} lacks weights: {', '.join(missing) or 'no *.safetensors'}")
    return paths


class DummyWeights(WeightSource):
    """Random weights, the same in every process and however they are read: each tensor is drawn from a generator seeded
    with its name, a table's stretches each from their own.

    Scales keep activations near 1, so that logits are neither flat nor infinite.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = expected_shapes(config)
        self._seed = seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def stored_name(self, name: str) -> str:
        return name

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        shape = self._shapes[name]
        first, last, _ = (rows or slice(None)).indices(shape[0])
        every = stretches(shape) if name in _TABLES else [slice(0, shape[0])]
        needed = [part for part in every if part.start < last and part.stop > first]
        drawn = [self._draw(name, part.start, part.stop - part.start, shape) for part in needed]
        values = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        begin = first - needed[0].start
        return values[begin : begin + last - first]

    def _draw(self, name: str, first: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}/{first}".encode()))
        if "norm" in name and name.endswith(".weight"):
            return torch.empty(count).uniform_(0.9, 1.1, generator=generator)
        scale = 1 / math.sqrt(shape[1]) if len(shape) > 1 else 0.02
        return torch.empty(count, *shape[1:]).normal_(0.0, scale, generator=generator)

    def release(self) -> None:
        pass
