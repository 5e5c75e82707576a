"""GGUF metadata -> `ModelConfig`. Keys: "Standardized key-value pairs" of ggml's docs/gguf.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import Architecture, ModelConfig, RopeScaling
from .errors import ModelError
from .gguf import GgufFile

ARCHITECTURES = {"llama": Architecture.LLAMA, "qwen2": Architecture.QWEN2, "qwen3": Architecture.QWEN3}
MAX_SIZE = 2**28
"""Of any dimension: far beyond every model, far below what would make a lying header cost memory."""
MAX_LAYERS = 4096
END_TOKENS = ("eos", "eot", "eom")
"""End of sequence, of turn and of message: each ends an answer."""


def gguf_config(file: GgufFile) -> ModelConfig:
    """The architecture facts of an open GGUF file. Raises `ModelError` naming the key and what is allowed."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise _refuse(file, "general.architecture", name, ", ".join(ARCHITECTURES))
    architecture = ARCHITECTURES[name]
    if _number(file, f"{name}.expert_count", int, 0):
        raise _refuse(file, f"{name}.expert_count", file.metadata[f"{name}.expert_count"], "0 (no mixture of experts)")
    hidden_size = _size(file, f"{name}.embedding_length")
    num_heads = _size(file, f"{name}.attention.head_count")
    num_kv_heads = _size(file, f"{name}.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise _refuse(file, f"{name}.attention.head_count_kv", num_kv_heads, f"a divisor of {num_heads}")
    head_dim = _size(file, f"{name}.attention.key_length", hidden_size // num_heads)
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if _size(file, key, head_dim) != head_dim:
            raise _refuse(file, key, file.metadata[key], f"the head dimension, {head_dim}")
    if head_dim % 2:
        raise _refuse(file, f"{name}.attention.key_length", head_dim, "an even number")
    max_model_len = _size(file, f"{name}.context_length")
    window = _number(file, f"{name}.attention.sliding_window", int, 0)
    rope_theta = _number(file, f"{name}.rope.freq_base", float, 10000.0)
    if not rope_theta > 0:
        raise _refuse(file, f"{name}.rope.freq_base", rope_theta, "more than 0")
    return ModelConfig(
        architecture=architecture,
        vocab_size=file.tensor("token_embd.weight").shape[0],
        hidden_size=hidden_size,
        num_layers=_size(file, f"{name}.block_count", most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_size(file, f"{name}.feed_forward_length"),
        max_model_len=max_model_len,
        norm_eps=_number(file, f"{name}.attention.layer_norm_rms_epsilon", float, 1e-5),
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, name, rope_theta, head_dim),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        sliding_window=window if 0 < window < max_model_len else None,
        bos_token_id=_token_id(file, "bos"),
        eos_token_ids=_end_tokens(file),
    )


def llama3_rope_factors(rope_theta: float, head_dim: int, scaling: RopeScaling) -> npt.NDArray[np.float64]:
    """What Llama 3.1 divides each rotary frequency by, [head_dim / 2]; as transformers `_compute_llama3_parameters`."""
    wavelengths = 2 * math.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_position / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / scaling.factor + smooth))


def _rope_scaling(file: GgufFile, name: str, rope_theta: float, head_dim: int) -> RopeScaling | None:
    kind = file.metadata.get(f"{name}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return _recover_llama3(file, rope_theta, head_dim)
    factor = _number(file, f"{name}.rope.scaling.factor", float, _number(file, f"{name}.rope.scale_linear", float, 1.0))
    if kind == "linear" or (kind == "none" and f"{name}.rope.scale_linear" in file.metadata):
        if not factor > 0:
            raise _refuse(file, f"{name}.rope.scaling.factor", factor, "more than 0")
        return None if factor == 1.0 else RopeScaling(kind="linear", factor=factor)
    if kind != "none":
        raise _refuse(file, f"{name}.rope.scaling.type", kind, "none, linear")
    return None


def _recover_llama3(file: GgufFile, rope_theta: float, head_dim: int) -> RopeScaling:
    """GGUF stores Llama 3.1's scaling as its factors; all published models have the other values' defaults."""
    factors = file.load("rope_freqs.weight")
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or not factors.min() > 0:
        raise _refuse(file, "rope_freqs.weight", "a table of another kind", f"{head_dim // 2} positive factors")
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()))
    expected = llama3_rope_factors(rope_theta, head_dim, scaling)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise _refuse(file, "rope_freqs.weight", "a table of another kind", "Llama 3.1's factors")
    return scaling


def _end_tokens(file: GgufFile) -> tuple[int, ...]:
    ids = [_token_id(file, kind) for kind in END_TOKENS]
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _token_id(file: GgufFile, kind: str) -> int | None:
    token_id: int = _number(file, f"tokenizer.ggml.{kind}_token_id", int, -1)
    return None if token_id < 0 else token_id


def _number(file: GgufFile, key: str, kind: type, default: Any) -> Any:
    value = file.metadata.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or (kind is int and not isinstance(value, int)):
        raise _refuse(file, key, value, f"one {kind.__name__}")
    if not math.isfinite(value):
        raise _refuse(file, key, value, "a finite number")
    return kind(value)


def _size(file: GgufFile, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
    if key not in file.metadata and default is None:
        raise ModelError(f"{file.path}: {key} is missing")
    value: int = _number(file, key, int, default)
    if not 1 <= value <= most:
        raise _refuse(file, key, value, f"1 to {most}")
    return value


def _refuse(file: GgufFile, key: str, value: object, allowed: str) -> ModelError:
    shown = value if not isinstance(value, list) else f"a list of {len(value)}"
    return ModelError(f"{file.path}: {key} is {shown!r}, allowed: {allowed}")
