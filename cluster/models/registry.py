"""Architectures of published models by name: what `dummy:<name>` runs with random weights and the planner plans for.

Figures are those of each model's published `config.json`; OPT's sizes that were never released as one (175B) are from
Zhang et al. 2022, table 1. `tiny-*` are for tests.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Architecture, ModelConfig, RopeScaling

_LLAMA_31_ROPE = RopeScaling(kind="llama3", factor=8.0)
_LLAMA_32_ROPE = RopeScaling(kind="llama3", factor=32.0)


def _opt(hidden_size: int, num_layers: int, num_heads: int, vocab_size: int = 50272, length: int = 2048) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture.OPT,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        max_model_len=length,
        norm="layer",
        activation="relu",
        gated_mlp=False,
        learned_positions=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_ids=(2,),
    )


def _llama_2(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, intermediate: int) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture.LLAMA,
        vocab_size=32000,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        intermediate_size=intermediate,
        max_model_len=4096,
        norm_eps=1e-5,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _llama_3(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate: int,
    rope_scaling: RopeScaling | None,
    length: int = 131072,
    *,
    tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture.LLAMA,
        vocab_size=128256,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate,
        max_model_len=length,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=rope_scaling,
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def _qwen2(
    hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, intermediate: int, vocab: int, *, tied: bool
) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture.QWEN2,
        vocab_size=vocab,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate,
        max_model_len=32768,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qkv_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_ids=(151645, 151643),
    )


def _qwen3(hidden_size: int, num_layers: int, num_heads: int, intermediate: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture.QWEN3,
        vocab_size=151936,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        max_model_len=40960,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_ids=(151645, 151643),
    )


def _small_llama(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate: int,
    length: int,
) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture.LLAMA,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate,
        max_model_len=length,
        norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


CONFIGS: dict[str, ModelConfig] = {
    "tiny-llama": _small_llama(512, 64, 2, 4, 2, 160, 512),
    "tiny-opt": _opt(64, 2, 4, vocab_size=512, length=512),
    "smollm2-135m": _small_llama(49152, 576, 30, 9, 3, 1536, 8192),
    "smollm2-360m": _small_llama(49152, 960, 32, 15, 5, 2560, 8192),
    "smollm2-1.7b": replace(_small_llama(49152, 2048, 24, 32, 32, 8192, 8192), rope_theta=130000.0),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-7b": _llama_2(4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama_2(5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama_2(8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama_3(4096, 32, 32, 14336, None, 8192),
    "llama-3-70b": _llama_3(8192, 80, 64, 28672, None, 8192),
    "llama-3.1-8b": _llama_3(4096, 32, 32, 14336, _LLAMA_31_ROPE),
    "llama-3.1-70b": _llama_3(8192, 80, 64, 28672, _LLAMA_31_ROPE),
    "llama-3.2-1b": _llama_3(2048, 16, 32, 8192, _LLAMA_32_ROPE, tied=True),
    "llama-3.2-3b": _llama_3(3072, 28, 24, 8192, _LLAMA_32_ROPE, tied=True),
    "llama-3.3-70b": _llama_3(8192, 80, 64, 28672, _LLAMA_31_ROPE),
    "qwen2-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2-1.5b": _qwen2(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, tied=False),
    "qwen2-72b": _qwen2(8192, 80, 64, 8, 29568, 152064, tied=False),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, tied=False),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824, 152064, tied=False),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, 152064, tied=False),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29568, 152064, tied=False),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, tied=False),
}
