"""How positions enter a model: rotary frequencies, or where a learned table begins. Pure."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ..models.config import ModelConfig
from ..models.gguf_config import llama3_rope_factors

OPT_POSITION_OFFSET = 2
"""OPT's position table begins with two rows for padding (fairseq's convention)."""


@functools.lru_cache(maxsize=8)
def inverse_frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """Rotary frequencies [D/2], theta^(-2i/D), scaled as the config says; radians per position. Not to be changed."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies: NDArray[np.float32] = np.reciprocal(
        np.power(np.float32(config.rope_theta), exponents), dtype=np.float32
    )
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        frequencies = np.divide(frequencies, scaling.factor, dtype=np.float32)
        return frequencies
    if scaling.kind == "llama3":
        factors = llama3_rope_factors(config.rope_theta, config.head_dim, scaling)
        frequencies = np.divide(frequencies, factors.astype(np.float32), dtype=np.float32)
        return frequencies
    raise ValueError(f"rope_scaling: kind {scaling.kind!r} is not one of ['linear', 'llama3']")
