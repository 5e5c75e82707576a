"""The single place that picks the implementation of each operation. Importing it loads no torch.

`pick` decides who computes a model on a CPU: the kernels of `kernels.compiled`, torch's operations, or the plain
formulas that tests hold both against. `operations` and `make_linear` are what the latter two are made of.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .linear import Linear

KERNELS = ("auto", "compiled", "torch", "reference")


@dataclass(frozen=True, slots=True)
class Picked:
    """Who computes, and why."""

    kernels: str
    """`compiled`, `torch` or `reference`."""
    reason: str
    """One line for people."""


@functools.cache
def numba_problem() -> str | None:
    """Why what compiles the kernels cannot be had here, or None. Imports it, so that what would stop a start shows now.

    Raises ValueError for a TANDEM_CPU_ISA that does not exist.
    """
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'tandem-serve[engine]')"
    try:
        from .compiled import target  # noqa: F401
    except ValueError:
        raise
    except Exception as error:  # whatever numba, llvmlite or a library that they load finds wrong here
        first_line = str(error).strip().partition("\n")[0]
        return f"numba cannot be imported ({type(error).__name__}: {first_line})"
    return None


def pick(kernels: str, quantization: str | None = None, unsupported: str | None = None) -> Picked:
    """The implementation for a CPU. `kernels`: one of KERNELS; `unsupported`: why the compiled kernels cannot run the
    model, None: they can.

    Raises ValueError naming the field where what is asked for cannot be had.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: {kernels!r} is not allowed; allowed: one of {', '.join(KERNELS)}")
    obstacle = (numba_problem() or unsupported) if kernels in ("auto", "compiled") else unsupported
    if kernels in ("auto", "compiled") and obstacle is None:
        from .compiled import check

        obstacle = check.problem()
    if kernels == "compiled" and obstacle is not None:
        raise ValueError(f"kernels: 'compiled' is not allowed: {obstacle}; allowed: auto, torch, reference")
    if kernels in ("auto", "compiled") and obstacle is None:
        from .compiled.target import TARGET

        return Picked("compiled", TARGET.reason)
    if quantization is not None:
        why = obstacle or f"kernels is {kernels!r}"
        raise ValueError(f"quantization: {quantization!r} is not allowed: it needs compiled kernels, and {why}")
    if kernels == "reference":
        return Picked("reference", "asked for")
    return Picked("torch", "asked for" if kernels == "torch" else f"compiled kernels cannot run here: {obstacle}")


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of every operation of the decoder; signatures are those of the `*_reference` functions."""

    rms_norm: Callable[..., torch.Tensor]
    layer_norm: Callable[..., torch.Tensor]
    rotary: Callable[..., torch.Tensor]
    activation: Callable[..., torch.Tensor]
    kv_write: Callable[..., None]
    paged_attention: Callable[..., torch.Tensor]


@functools.cache
def operations(kernels: str) -> Operations:
    """The operations as torch computes them: `torch` the fast ones, `reference` the formulas. ValueError for others."""
    from . import activation, kv_write, layer_norm, paged_attention, rms_norm, rotary

    if kernels == "torch":
        return Operations(
            rms_norm.rms_norm_cpu,
            layer_norm.layer_norm_cpu,
            rotary.rotary_cpu,
            activation.activation_cpu,
            kv_write.kv_write_cpu,
            paged_attention.paged_attention_cpu,
        )
    if kernels == "reference":
        return Operations(
            rms_norm.rms_norm_reference,
            layer_norm.layer_norm_reference,
            rotary.rotary_reference,
            activation.activation_reference,
            kv_write.kv_write_reference,
            paged_attention.paged_attention_reference,
        )
    raise ValueError(f"kernels: {kernels!r} is not one of ['reference', 'torch']")


@functools.cache
def packs_half() -> bool:
    """Whether this torch and this processor have FBGEMM's packed half-precision product (x86 with AVX2)."""
    import torch

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    if not hasattr(torch.ops.quantized, "linear_prepack_fp16"):
        return False
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


def half_dtype(weight: torch.Tensor) -> torch.dtype:
    """How a 16-bit table is stored: IEEE half beside packed weights (more exact), bfloat16 where that is the product's
    own form or half would overflow.
    """
    import torch

    from .linear import fits_half

    return torch.float16 if packs_half() and fits_half(weight) else torch.bfloat16


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """The linear object for `weight` [O, I] in precision `dtype` (float32, or bfloat16: 16-bit weights).

    Keeps no reference to `weight` where the form differs from it.
    """
    import torch

    from .linear import PackedHalfLinear, PlainLinear, fits_half

    if dtype == torch.float32:
        return PlainLinear(weight.float().contiguous(), bias)
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype: {dtype} is not one of torch.float32, torch.bfloat16")
    if packs_half() and fits_half(weight):
        return PackedHalfLinear(weight, bias)
    return PlainLinear(weight.to(torch.bfloat16).contiguous(), bias)
