"""A model computed by `kernels.compiled`: one native call a step, without the interpreter lock."""

from __future__ import annotations

from ..models.config import ModelConfig


def unsupported(config: ModelConfig, block_size: int) -> str | None:
    """Why the compiled kernels cannot run this model, one line; None: they can."""
    return f"no compiled decoder for {config.architecture} at block size {block_size}"
