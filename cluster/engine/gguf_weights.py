"""Weights from a GGUF file: mapped, dequantized tensor by tensor (or stretch of rows by stretch), pages let go after.

Names: "Standardized tensor names" of ggml's docs/gguf.md. For architecture `llama`, llama.cpp's converter stores query
and key rows in interleaved rotary order (convert_hf_to_gguf.py, `LlamaModel.permute`); they are put back into the
half-split order of `kernels.rotary`.
"""

from __future__ import annotations

import math
import mmap
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import gguf as ggml
import numpy as np
import torch

from ..models.config import Architecture, ModelConfig
from ..models.errors import ModelError
from ..models.gguf import GgufTensor, open_gguf
from .weight_source import WeightSource

_GLOBAL = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}
_LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "attn_output": "attention_out",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_IGNORED = {"rope_freqs.weight"}
"""Said by `ModelConfig.rope_scaling`."""
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class GgufWeights(WeightSource):
    """Tensors of one GGUF file."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = open_gguf(path)
        self._config = config
        self._stored: dict[str, str] = {}
        for stored in self._file.tensors:
            if stored not in _IGNORED:
                self._stored[_canonical(stored, path)] = stored

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self._file.tensors[stored].shape for name, stored in self._stored.items()}

    def stored_name(self, name: str) -> str:
        return self._stored.get(name) or _stored_as(name)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """float32, dequantized; for float files possibly a view of the mapped file."""
        tensor = self._file.tensor(self._stored[name])
        raw = np.asarray(self._file.raw(tensor.name)).reshape(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)
        shape = tensor.shape
        if rows is not None:
            assert len(shape) > 1
            raw = raw[rows]
            shape = (raw.shape[0], *shape[1:])
        values = _dequantized(raw, tensor).reshape(shape)
        part = name.split(".")[-2]
        if self._config.architecture is Architecture.LLAMA and part in ("q", "k"):
            values = self._half_split(values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only memory; nobody writes to it
            return torch.from_numpy(values)

    def read_columns(self, name: str, columns: slice) -> torch.Tensor:
        """Dequantizes no more than the quantization blocks that the columns lie in."""
        tensor = self._file.tensor(self._stored[name])
        rows, width = tensor.shape
        block_size, type_bytes = ggml.GGML_QUANT_SIZES[tensor.type]
        first, last, _ = columns.indices(width)
        low, high = first // block_size, -(-last // block_size)
        raw = np.asarray(self._file.raw(tensor.name)).reshape(rows, -1)
        taken = np.ascontiguousarray(raw[:, low * type_bytes : high * type_bytes])
        values = _dequantized(taken, tensor).reshape(rows, -1)
        begin = first - low * block_size
        return torch.from_numpy(np.ascontiguousarray(values[:, begin : begin + last - first]))

    def _half_split(self, values: np.ndarray) -> np.ndarray:
        heads = values.shape[0] // self._config.head_dim  # of the rows that were read: whole heads
        rest = values.shape[1:]
        pairs = values.reshape(heads, self._config.head_dim // 2, 2, math.prod(rest))
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)

    def release(self) -> None:
        mapped = getattr(self._file.data, "_mmap", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def _dequantized(raw: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    """float32 of some of a tensor's quantization blocks, in their order."""
    try:
        # Blocks are independent of rows; as one long row the library makes one pass instead of one per 16 rows.
        return np.asarray(ggml.dequantize(raw.reshape(1, -1), tensor.type), dtype=np.float32)
    except NotImplementedError as error:
        raise ModelError(f"tensor {tensor.name!r} has type {tensor.type.name}: {error}") from error


def _canonical(stored: str, path: Path) -> str:
    match = _NAME.fullmatch(stored)
    if match is not None:
        layer, part, kind = match.groups()
        name = _GLOBAL.get(part) if layer is None else _LAYER.get(part)
        if name is not None:
            return f"{name}.{kind}" if layer is None else f"layers.{int(layer)}.{name}.{kind}"
    raise ModelError(f"{path}: tensor {stored!r} is not known")


def _stored_as(name: str) -> str:
    table = _LAYER if name.startswith("layers.") else _GLOBAL
    *prefix, part, kind = name.split(".")
    stored = {canonical: key for key, canonical in table.items()}.get(part, part)
    return f"blk.{prefix[1]}.{stored}.{kind}" if prefix else f"{stored}.{kind}"
