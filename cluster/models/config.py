"""Architecture facts of a model, in one shape whatever file they came from. Pure: planner and router use it too."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Architecture(enum.StrEnum):
    """Families that `cluster.engine.model` can run. Mistral and SmolLM2 are `llama` (Mistral with a sliding window)."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    OPT = "opt"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary frequency scaling. `kind`: `linear` or `llama3` (Llama 3.1's wavelength-dependent interpolation)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know to be built. Sizes are element counts."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int
    """Longest context, tokens: prompt and output together."""
    norm: str = "rms"
    """`rms` or `layer` (OPT, with bias)."""
    norm_eps: float = 1e-5
    norm_before: bool = True
    """False: OPT-350m's post-norm."""
    activation: str = "silu"
    """`silu`, `relu` or `gelu`."""
    gated_mlp: bool = True
    learned_positions: bool = False
    """OPT: a learned table with an offset of 2 instead of rotary."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Qwen3: RMS norm of each head's q and k before rotary."""
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    embed_dim: int | None = None
    """Width of the token embedding where it differs from hidden_size (OPT-350m: projected in and out)."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
