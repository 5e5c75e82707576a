"""The single place that picks the implementation of each operation.

`operations("cpu")` are the fast CPU paths, `operations("reference")` the plain formulas that tests hold them against;
`make_linear` picks the weight form for a precision and a machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .activation import activation_cpu, activation_reference
from .kv_write import kv_write_cpu, kv_write_reference
from .layer_norm import layer_norm_cpu, layer_norm_reference
from .linear import Linear, PackedHalfLinear, PlainLinear, fits_half
from .paged_attention import paged_attention_cpu, paged_attention_reference
from .rms_norm import rms_norm_cpu, rms_norm_reference
from .rotary import rotary_cpu, rotary_reference


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of every operation of the decoder; signatures are those of the `*_reference` functions."""

    rms_norm: Callable[..., torch.Tensor]
    layer_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    activation: Callable[..., torch.Tensor]
    kv_write: Callable[..., None]
    paged_attention: Callable[..., torch.Tensor]


_OPERATIONS = {
    "cpu": Operations(rms_norm_cpu, layer_norm_cpu, rotary_cpu, activation_cpu, kv_write_cpu, paged_attention_cpu),
    "reference": Operations(
        rms_norm_reference,
        layer_norm_reference,
        rotary_reference,
        activation_reference,
        kv_write_reference,
        paged_attention_reference,
    ),
}


def operations(kind: str) -> Operations:
    """The operations of a device kind. ValueError if there are none for it."""
    if kind not in _OPERATIONS:
        raise ValueError(f"device: {kind!r} is not one of {sorted(_OPERATIONS)}")
    return _OPERATIONS[kind]


@functools.cache
def packs_half() -> bool:
    """Whether this torch and this processor have FBGEMM's packed half-precision product (x86 with AVX2)."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    if not hasattr(torch.ops.quantized, "linear_prepack_fp16"):
        return False
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


def half_dtype(weight: torch.Tensor) -> torch.dtype:
    """How a 16-bit table is stored: IEEE half beside packed weights (more exact), bfloat16 where that is the product's
    own form or half would overflow.
    """
    return torch.float16 if packs_half() and fits_half(weight) else torch.bfloat16


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """The linear object for `weight` [O, I] in precision `dtype` (float32, or bfloat16: 16-bit weights).

    Keeps no reference to `weight` where the form differs from it.
    """
    if dtype == torch.float32:
        return PlainLinear(weight.float().contiguous(), bias)
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype: {dtype} is not one of torch.float32, torch.bfloat16")
    if packs_half() and fits_half(weight):
        return PackedHalfLinear(weight, bias)
    return PlainLinear(weight.to(torch.bfloat16).contiguous(), bias)
