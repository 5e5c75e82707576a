"""What an implementation of the decoder's operations consists of: `dispatch` makes them, models call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .gpu_plans.draws import Logprobs


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of every operation of the decoder; signatures are those of the `*_reference` functions."""

    rms_norm: Callable[..., torch.Tensor]
    layer_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    activation: Callable[..., torch.Tensor]
    kv_write: Callable[..., None]
    paged_attention: Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Int8Operations:
    """Those whose results a product takes as integers: (int8 [T, C], float32 scales [T])."""

    rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    layer_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    activation: Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class GpuOperations:
    """One implementation of what a step on a GPU launches between its products; signatures are those of `kernels.gpu`'s
    functions of the same names.
    """

    rms_norm: Callable[..., torch.Tensor]
    layer_norm: Callable[..., torch.Tensor]
    activation: Callable[..., torch.Tensor]
    kv_write: Callable[..., torch.Tensor]
    decode_attention: Callable[..., torch.Tensor]
    prefill_attention: Callable[..., torch.Tensor]
    sample: Callable[..., torch.Tensor]
    penalize: Callable[..., None]
    restore: Callable[..., None]
    logprobs: Callable[..., Logprobs]
    int8: Int8Operations | None = None
    """None: there are no quantized products beside it."""


@dataclass(frozen=True, slots=True)
class KvMoves:
    """One implementation of moves of KV blocks; signatures are those of `kernels.gpu.kv_blocks`'s functions."""

    gather_blocks: Callable[..., torch.Tensor]
    scatter_blocks: Callable[..., None]
    copy_blocks: Callable[..., None]
    repack: Callable[..., None]
    compiles: bool
    """Whether the first call of each compiles it."""
