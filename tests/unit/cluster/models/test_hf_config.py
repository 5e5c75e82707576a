"""config.json of every family, in both spellings; what we cannot run is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.models.config import Architecture, ModelConfig, RopeScaling
from tandem.cluster.models.errors import ModelError
from tandem.cluster.models.hf_config import load_hf_config, parse_hf_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def parse(base: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_hf_config(base | changes)


def test_llama_defaults() -> None:
    config = parse(LLAMA)
    assert config.architecture is Architecture.LLAMA
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert not config.tie_word_embeddings
    assert config.rope_scaling is None
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_biases() -> None:
    assert parse(LLAMA, attention_bias=True).qkv_bias
    assert parse(LLAMA, attention_bias=True).attention_out_bias
    assert parse(LLAMA, mlp_bias=True).mlp_bias
    qwen2 = parse(LLAMA, model_type="qwen2")
    assert (qwen2.qkv_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = parse(LLAMA, model_type="qwen3", head_dim=32)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 32)
    assert parse(LLAMA, model_type="qwen3").head_dim == 128


def test_rope_in_both_spellings() -> None:
    old = parse(LLAMA, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
    new = parse(LLAMA, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_position=128)
    linear = parse(LLAMA, rope_scaling={"type": "linear", "factor": 2})
    assert linear.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert parse(LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope_theta == 1e6
    assert parse(LLAMA, rope_scaling=None).rope_scaling is None


def test_sliding_windows() -> None:
    assert parse(LLAMA, sliding_window=64).sliding_window is None
    assert parse(LLAMA, model_type="mistral", sliding_window=64, num_key_value_heads=4).sliding_window == 64
    assert parse(LLAMA, model_type="mistral", sliding_window=None, num_key_value_heads=4).sliding_window is None
    assert parse(LLAMA, model_type="mistral", sliding_window=512, num_key_value_heads=4).sliding_window is None
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 64}
    assert parse(qwen).sliding_window is None
    assert parse(qwen, use_sliding_window=True, max_window_layers=0).sliding_window == 64
    assert parse(qwen, use_sliding_window=True, max_window_layers=4).sliding_window is None
    assert parse(qwen, use_sliding_window=True, layer_types=["sliding_attention"] * 4).sliding_window == 64
    with pytest.raises(ModelError, match="max_window_layers is 2, allowed: the same for all layers"):
        parse(qwen, use_sliding_window=True, max_window_layers=2)
    with pytest.raises(ModelError, match="layer_types"):
        parse(qwen, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"] * 2)


def test_opt() -> None:
    config = parse(OPT)
    assert config.architecture is Architecture.OPT
    assert (config.norm, config.norm_before, config.activation) == ("layer", True, "relu")
    assert (config.gated_mlp, config.learned_positions, config.tie_word_embeddings) == (False, True, True)
    assert (config.qkv_bias, config.attention_out_bias, config.mlp_bias) == (True, True, True)
    assert (config.embed_dim, config.intermediate_size, config.eos_token_ids) == (None, 256, (2,))
    small = parse(OPT, do_layer_norm_before=False, word_embed_proj_dim=32, _remove_final_layer_norm=True)
    assert (small.norm_before, small.embed_dim) == (False, 32)
    assert not parse(OPT, enable_bias=False).qkv_bias


def test_end_tokens(tmp_path: Path) -> None:
    assert parse(LLAMA, eos_token_id=[7, 8, 7]).eos_token_ids == (7, 8)
    assert parse(LLAMA, eos_token_id=None).eos_token_ids == ()
    assert parse(LLAMA, bos_token_id=None).bos_token_id is None
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 5}))
    assert load_hf_config(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load_hf_config(tmp_path).eos_token_ids == (5, 6)
    assert load_hf_config(tmp_path / "config.json").eos_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"model_type": "mamba"}, r"model_type is 'mamba', allowed: llama, mistral, qwen2, qwen3, opt"),
        (LLAMA, {"model_type": None}, "model_type is None"),
        (LLAMA, {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', allowed: silu"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'|type is 'yarn'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, allowed: 1.0"),
        (LLAMA, {"rope_theta": 0}, "rope_theta"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size is '64', allowed: a value of type int"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers is 0, allowed: 1 to 4096"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads is 3, allowed: a divisor"),
        (LLAMA, {"head_dim": 15}, "head_dim is 15, allowed: an even number"),
        (LLAMA, {"eos_token_id": "2"}, "eos_token_id"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (OPT, {"num_attention_heads": 5}, "hidden_size is 64, allowed: a multiple"),
        (OPT, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        (OPT, {"activation_function": "tanh"}, "activation_function"),
    ],
)
def test_what_we_cannot_run_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse(base, **changes)


KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def test_what_is_quantized_for_kv_alone_is_read() -> None:
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": KV_SCHEME}
    assert parse(LLAMA, quantization_config=quantization) == parse(LLAMA)
    assert parse(LLAMA, quantization_config={}) == parse(LLAMA)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_cache_scheme": None},
        {"kv_cache_scheme": KV_SCHEME | {"type": "int"}},
        {"kv_cache_scheme": KV_SCHEME | {"num_bits": 4}},
        {"kv_cache_scheme": KV_SCHEME | {"dynamic": True}},
        {"kv_cache_scheme": KV_SCHEME | {"symmetric": False}},
        {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"quant_algo": "FP8"},
    ],
)
def test_what_is_quantized_beside_kv_is_refused(changes: dict[str, Any]) -> None:
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": KV_SCHEME} | changes
    with pytest.raises(ModelError, match=r"quantization_config is 'set', allowed: unquantized .* scales for KV in fp8"):
        parse(LLAMA, quantization_config=quantization)


def test_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in [(b"{", "not valid JSON"), (b"[1]", "list"), (b"\xff\xfe", "not valid JSON")]:
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            load_hf_config(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "OPT"])
def test_what_transformers_writes(tmp_path: Path, family: str) -> None:
    """The installed transformers' own file of each family, sizes changed from their defaults."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 80} if family == "OPT" else {"intermediate_size": 80, "num_key_value_heads": 2}
    getattr(transformers, f"{family}Config")(**sizes).save_pretrained(tmp_path)
    config = load_hf_config(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads) == (96, 64, 2, 4)
    assert config.num_kv_heads == (4 if family == "OPT" else 2)
    assert config.intermediate_size == 80
    assert config.sliding_window == (4096 if family == "Mistral" else None)
    assert config.tie_word_embeddings == (family == "OPT")
