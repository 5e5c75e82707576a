"""Hugging Face `config.json` -> `ModelConfig`, in the spellings of transformers 4 and 5.

What the decoder cannot run is refused here, naming the field and what is allowed: a model that would load and talk
nonsense is worse than one that does not load. Fields that a file leaves out have the defaults of transformers' classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from .config import Architecture, ModelConfig, RopeScaling
from .errors import ModelError

ARCHITECTURES = {
    "llama": Architecture.LLAMA,
    "mistral": Architecture.LLAMA,
    "qwen2": Architecture.QWEN2,
    "qwen3": Architecture.QWEN3,
    "opt": Architecture.OPT,
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"}
DEFAULT_BOS = {"llama": 1, "mistral": 1, "opt": 2}
DEFAULT_EOS = {"llama": 2, "mistral": 2, "opt": 2}
ROPE_KINDS = ("default", "linear", "llama3")
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
MAX_JSON_BYTES = 16 * 2**20
MAX_SIZE = 2**28
"""Of any dimension: far beyond every model, far below what would make a lying file cost memory."""
MAX_LAYERS = 4096
MAX_SHOWN_CHARS = 200


def load_hf_config(path: Path) -> ModelConfig:
    """Reads a model folder (`config.json`, `generation_config.json` if there is one) or a config file by itself."""
    config_path = path / CONFIG_NAME if path.is_dir() else path
    generation_path = config_path.with_name(GENERATION_CONFIG_NAME)
    generation = _read_json(generation_path) if config_path.name == CONFIG_NAME and generation_path.is_file() else {}
    return parse_hf_config(_read_json(config_path), generation, source=str(config_path))


def parse_hf_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, source: str = CONFIG_NAME
) -> ModelConfig:
    """The architecture facts of a parsed `config.json`. Raises `ModelError` naming the field and what is allowed."""
    fields = _Fields(config, source)
    model_type = fields.get("model_type", str)
    if model_type not in ARCHITECTURES:
        raise fields.refuse("model_type", model_type, ", ".join(ARCHITECTURES))
    if not _quantizes_only_kv(fields.get("quantization_config", dict, {})):
        allowed = "unquantized safetensors (float32, float16, bfloat16), with or without scales for KV in fp8"
        raise fields.refuse("quantization_config", "set", allowed)
    default_eos = DEFAULT_EOS.get(model_type)
    eos = _token_ids((generation or {}).get("eos_token_id", config.get("eos_token_id", default_eos)), fields)
    if ARCHITECTURES[model_type] is Architecture.OPT:
        return _parse_opt(fields, eos)
    return _parse_llama_like(fields, model_type, eos)


class _Fields:
    """Typed access to the fields of one config, with errors that name field, value and what is allowed."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def refuse(self, field: str, value: object, allowed: str) -> ModelError:
        return ModelError(f"{self.source}: {field} is {_shown(value)}, allowed: {allowed}")

    def get(self, field: str, kind: type, default: Any = None) -> Any:
        """The value of a field; absent and null both mean `default`. An int is accepted where a float is wanted."""
        value = self.config.get(field)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refuse(field, value, f"a value of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.refuse(field, value, "a finite number")
        return value

    def size(self, field: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        """A positive count; required where there is no default."""
        value: int | None = self.get(field, int, default)
        if value is None:
            raise ModelError(f"{self.source}: {field} is missing")
        if not 1 <= value <= most:
            raise self.refuse(field, value, f"1 to {most}")
        return value

    def bos(self, model_type: str) -> int | None:
        """The beginning-of-sequence token; null is none, absent the family's default."""
        if "bos_token_id" not in self.config:
            return DEFAULT_BOS.get(model_type)
        token_id: int | None = self.get("bos_token_id", int)
        return token_id

    def require(self, field: str, value: object, allowed: object) -> None:
        """Refuses any value of a switch but the one that the decoder implements."""
        if value != allowed:
            raise self.refuse(field, value, repr(allowed))

    def activation(self, field: str, default: str) -> str:
        name = self.get(field, str, default)
        if name not in ACTIVATIONS:
            raise self.refuse(field, name, ", ".join(ACTIVATIONS))
        return ACTIVATIONS[name]


def _quantizes_only_kv(quantization: Mapping[str, Any]) -> bool:
    """Whether there is nothing, or a `kv_cache_scheme` (compressed-tensors, ModelOpt) of fixed scales for e4m3 alone:
    weights are then as ever, and `engine.kv_scales` reads the scales.
    """
    if not quantization:
        return True
    scheme = quantization.get("kv_cache_scheme")
    if not isinstance(scheme, dict) or quantization.get("config_groups") or quantization.get("quant_algo"):
        return False
    kind = (scheme.get("type"), scheme.get("num_bits"), scheme.get("dynamic", False), scheme.get("symmetric", True))
    return kind == ("float", 8, False, True)


def _parse_llama_like(fields: _Fields, model_type: str, eos: tuple[int, ...]) -> ModelConfig:
    architecture = ARCHITECTURES[model_type]
    hidden_size = fields.size("hidden_size")
    num_layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", {"mistral": 8}.get(model_type, num_heads))
    if num_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    head_dim = fields.size("head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", head_dim, "an even number")
    max_model_len = fields.size("max_position_embeddings")
    rope_theta, rope_scaling = _rope(fields)
    attention_bias = fields.get("attention_bias", bool, False) if model_type in ("llama", "qwen3") else False
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size("intermediate_size"),
        max_model_len=max_model_len,
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        activation=fields.activation("hidden_act", "silu"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=architecture is Architecture.QWEN2 or attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=fields.get("mlp_bias", bool, False) if model_type == "llama" else False,
        qk_norm=architecture is Architecture.QWEN3,
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
        sliding_window=_sliding_window(fields, model_type, num_layers, max_model_len),
        bos_token_id=fields.bos(model_type),
        eos_token_ids=eos,
    )


def _parse_opt(fields: _Fields, eos: tuple[int, ...]) -> ModelConfig:
    """OPT (Zhang et al. 2022): learned positions, layer norm, biased linears; 350m is post-norm and projected."""
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.refuse("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
    fields.require("layer_norm_elementwise_affine", fields.get("layer_norm_elementwise_affine", bool, True), True)
    norm_before = fields.get("do_layer_norm_before", bool, True)
    if norm_before:  # post-norm models have no final norm in the first place
        fields.require("_remove_final_layer_norm", fields.get("_remove_final_layer_norm", bool, False), False)
    bias = fields.get("enable_bias", bool, True)
    embed_dim = fields.size("word_embed_proj_dim", hidden_size)
    return ModelConfig(
        architecture=Architecture.OPT,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers", most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=fields.size("ffn_dim"),
        max_model_len=fields.size("max_position_embeddings"),
        norm="layer",
        norm_eps=1e-5,
        norm_before=norm_before,
        activation=fields.activation("activation_function", "relu"),
        gated_mlp=False,
        learned_positions=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, True),
        embed_dim=None if embed_dim == hidden_size else embed_dim,
        bos_token_id=fields.bos("opt"),
        eos_token_ids=eos,
    )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    name = "rope_parameters" if fields.config.get("rope_parameters") is not None else "rope_scaling"
    table = fields.get(name, dict, {})
    nested = next((key for key, value in table.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise fields.refuse(f"{name}.{nested}", "a table", f"one set of rope values for all layers in {name}")
    values = _Fields(table, f"{fields.source}: {name}")
    theta = values.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
    if theta <= 0:
        raise fields.refuse("rope_theta", theta, "more than 0")
    partial = values.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    fields.require("partial_rotary_factor", partial, 1.0)
    kind = values.get("rope_type", str, values.get("type", str, "default"))
    if kind not in ROPE_KINDS:
        raise values.refuse("rope_type", kind, ", ".join(ROPE_KINDS))
    if kind == "default":
        return theta, None
    factor = _positive(values, "factor")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    low, high = _positive(values, "low_freq_factor"), _positive(values, "high_freq_factor")
    if high <= low:
        raise values.refuse("high_freq_factor", high, f"more than low_freq_factor ({low})")
    original = values.size("original_max_position_embeddings", fields.get("original_max_position_embeddings", int))
    return theta, RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=original
    )


def _positive(values: _Fields, field: str) -> float:
    value: float | None = values.get(field, float)
    if value is None:
        raise ModelError(f"{values.source}: {field} is missing")
    if not 0 < value < float("inf"):
        raise values.refuse(field, value, "more than 0")
    return value


def _sliding_window(fields: _Fields, model_type: str, num_layers: int, max_model_len: int) -> int | None:
    """The attention window, tokens, of all layers; None where every position sees the whole context.

    Qwen2 and Qwen3 use theirs only with `use_sliding_window`, and then from layer `max_window_layers` upward;
    `layer_types` (transformers 4.53 and later) says the same per layer. Windows on some layers only are refused.
    """
    window: int | None = fields.get("sliding_window", int)
    if model_type == "llama" or (model_type != "mistral" and not fields.get("use_sliding_window", bool, False)):
        return None
    if window is None or window >= max_model_len:
        return None
    if window < 1:
        raise fields.refuse("sliding_window", window, "1 or more, or null")
    if model_type == "mistral":
        return window
    first = fields.get("max_window_layers", int, 28)
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    kinds = set(fields.get("layer_types", list, default))
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return window
    field = "layer_types" if fields.config.get("layer_types") is not None else "max_window_layers"
    raise fields.refuse(field, sorted(map(str, kinds)) if field == "layer_types" else first, "the same for all layers")


def _shown(value: object) -> str:
    text = f"an integer of {value.bit_length()} bits" if _is_huge(value) else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def _is_huge(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value.bit_length() > 256


def _token_ids(value: object, fields: _Fields) -> tuple[int, ...]:
    """One id, a list of ids or null, in the file's order."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool):
            raise fields.refuse("eos_token_id", value, "an integer, a list of integers or null")
    return tuple(dict.fromkeys(items))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, allowed: at most {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value
