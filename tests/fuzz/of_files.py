"""Parsers of files: models, tokenizers, configuration, traces, keys."""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path

import gguf
import numpy as np
from feeding import as_json, scratch
from tandem.cluster.models.errors import ModelError
from tandem.cluster.models.gguf import gguf_tokenizer, open_gguf
from tandem.cluster.models.gguf_config import gguf_config
from tandem.cluster.models.hf_config import load_hf_config
from tandem.cluster.models.reference import ModelFiles
from tandem.router.chat_template import compile_chat_template
from tandem.router.gguf_tokenizer import build_gguf_backend
from tandem.router.hf_tokenizer import read_hf_tokenizer


@functools.cache
def gguf_seed() -> bytes:
    """A whole model of one layer."""
    path = scratch() / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, number in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 8,
    }.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "<s>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_file(path: Path) -> None:
    file = open_gguf(path)
    for read in (gguf_config, lambda file: build_gguf_backend(gguf_tokenizer(file))):
        try:
            read(file)
        except ValueError:
            continue
    for name in file.tensors:
        try:
            file.load(name)
        except ModelError:
            continue


def hf_file(path: Path) -> None:
    load_hf_config(path.parent)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "eos_token_id": [1, 2],
    "tie_word_embeddings": True,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "max_position_embeddings": 64,
}
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "use_sliding_window": True, "sliding_window": 8}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "special": True, "normalized": False, **PLAIN}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
YAML = b"""model: dummy:tiny-llama
engine: {device: paced, kv_cache_bytes: 1MiB, block_size: 16}
prefill: {workers: 2, engine: {max_batched_tokens: 1024}}
decode: 1
router: &r
  http_port: 0
  slo: {ttft_s: 1.0, tpot_s: 0.1}
  slo_classes:
    night: {share: 0.5}
worker: {lease_s: 10}
"""
TRACE_JSON = b'{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}\n' * 2
TRACE_CSV = b"arrival_s,input_tokens,output_tokens,prefix_hashes\n0.0,10,2,1 2\n0.5,20,3,\n"
PROMPTS = b'{"prompt": "a"}\n{"turns": ["b"]}\n{"messages": [{"role": "user", "content": "c"}]}\n"d"\n'
KV_SCALES = {
    "format": "tandem-kv-scales",
    "version": 1,
    "model": "tiny",
    "made_by": "hand",
    "layers": [{"keys": [1.5, 0.0], "values": [2.0, 3e38]}] * 2,
}
KEYS = b"# clients\nabcdefghijklmnop\nqrstuvwxyz012345\n"


def safetensors_seed() -> bytes:
    header = as_json(
        {
            "__metadata__": {"format": "pt"},
            "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "lm_head.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [16, 32]},
            "model.layers.0.self_attn.kv_scale": {"dtype": "BF16", "shape": [2], "data_offsets": [32, 36]},
            "model.layers.1.self_attn.k_scale": {"dtype": "F16", "shape": [], "data_offsets": [36, 38]},
            "model.layers.1.self_attn.v_proj.v_scale": {"dtype": "F16", "shape": [1], "data_offsets": [38, 40]},
        }
    )
    out = io.BytesIO()
    out.write(struct.pack("<Q", len(header)))
    out.write(header)
    out.write(bytes(range(40)))
    return out.getvalue()


def safetensors_file(path: Path) -> None:
    from tandem.cluster.engine.hf_weights import HfWeights
    from tandem.cluster.engine.kv_scales import checkpoint_scales
    from tandem.cluster.engine.weight_source import check_shapes
    from tandem.cluster.models.registry import CONFIGS

    config = CONFIGS["tiny-llama"]
    checkpoint_scales(ModelFiles(name="fuzz", kind="hf", path=path.parent, config=config))
    weights = HfWeights(path.parent, config)
    for name in weights.shapes():
        weights.read(name)
    check_shapes(config, weights)


def kv_scales_file(path: Path) -> None:
    from tandem.cluster.engine.kv_scales import KVScales
    from tandem.cluster.models.registry import CONFIGS

    KVScales.load(path, CONFIGS["tiny-llama"]).scales("int8")


def api_keys_file(path: Path) -> None:
    from tandem.router.api_keys import ApiKeys

    path.chmod(0o600)
    ApiKeys((), path).admit("abcdefghijklmnop")


def hf_generation(path: Path) -> None:
    (path.parent / "config.json").write_bytes(as_json(LLAMA))
    load_hf_config(path.parent)


def hf_tokenizer_config(path: Path) -> None:
    (path.parent / "tokenizer.json").write_bytes(as_json(TOKENIZER))
    template = read_hf_tokenizer(path.parent).chat_template
    if template is not None:
        compile_chat_template(template)
