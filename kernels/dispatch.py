"""The single place that picks the implementation of each operation. Importing it loads no torch.

`pick` decides who computes a model on a CPU: the kernels of `kernels.compiled`, torch's operations, or the plain
formulas that tests hold both against. `operations` and `make_linear` are what the latter two are made of. `pick_gpu`
decides the same for a GPU, whose kernels are `kernels.gpu`'s, from facts (`gpu_facts`); `gpu_operations` is what the
engine calls there, whoever computes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .operations import GpuOperations, Int8Operations, KvMoves, Operations
from .picked import Picked

if TYPE_CHECKING:
    import torch

    from .linear import Linear

KERNELS = ("auto", "compiled", "triton", "torch", "reference")
ON_CPU = ("auto", "compiled", "torch", "reference")
ON_GPU = ("auto", "triton", "torch", "reference")
OLDEST_CAPABILITY = (8, 0)
"""Of GPUs that the Triton kernels are compiled and tested for: A100 and newer."""
OLDEST_TRITON = (3, 6)
GPU_OPERATIONS = (
    "activation",
    "candidates",
    "decode_attention",
    "draws",
    "kv_blocks",
    "kv_write",
    "logprobs",
    "norm",
    "penalties",
    "prefill_attention",
    "rotary",
    "sampling",
    "speculative",
    "w4a16",
    "w8a8",
)
"""Modules of `kernels.gpu` that ship kernels."""


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
    """The implementation for a CPU. `kernels`: one of ON_CPU; `unsupported`: why the compiled kernels cannot run the
    model, None: they can.

    Raises ValueError naming the field where what is asked for cannot be had.
    """
    if kernels not in ON_CPU:
        where = " on processors" if kernels in KERNELS else ""
        raise ValueError(f"kernels: {kernels!r} is not allowed{where}; allowed: one of {', '.join(ON_CPU)}")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What there is to compute on a GPU with. Empty strings: not there."""

    driver: bool
    """Whether the system has a device of NVIDIA's driver."""
    torch: str = ""
    """Version."""
    cuda: str = ""
    """That torch is built for."""
    name: str = ""
    """Of the device that was asked about."""
    capability: tuple[int, int] = (0, 0)
    triton: str = ""
    """Version."""


def has_gpu_driver() -> bool:
    """Whether the system has a device of NVIDIA's driver. Loads nothing, and takes nothing of a GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def gpu_facts(device: torch.device | None = None) -> GpuFacts:
    """Of this machine and one GPU, torch's current one if it is not named. Loads torch only where there is a driver to
    ask; initializes CUDA there.
    """
    driver = has_gpu_driver()
    facts = GpuFacts(driver=driver, torch=_version("torch"), triton=_version("triton"))
    if not driver or not facts.torch:
        return facts
    import torch

    facts = dataclasses.replace(facts, cuda=torch.version.cuda or "")
    if not torch.cuda.is_available():
        return facts
    return dataclasses.replace(
        facts, name=torch.cuda.get_device_name(device), capability=torch.cuda.get_device_capability(device)
    )


def interpreter() -> GpuFacts:
    """What stands for a GPU where Triton's interpreter computes, on CPU tensors: in tests."""
    return GpuFacts(
        driver=True,
        torch=_version("torch"),
        cuda="none",
        name="interpreter",
        capability=OLDEST_CAPABILITY,
        triton=_version("triton"),
    )


def gpu_problem(facts: GpuFacts) -> str | None:
    """Why nothing can compute on a GPU here, or None."""
    if not facts.driver:
        return "no GPU: the system has no device of NVIDIA's driver"
    if not facts.torch:
        return "torch is not installed (pip install 'tandem-serve[engine,gpu]')"
    if not facts.cuda:
        return f"torch {facts.torch} is built without CUDA"
    if not facts.name:
        return f"no GPU: torch {facts.torch} (CUDA {facts.cuda}) sees no device"
    return None


def triton_problem(facts: GpuFacts) -> str | None:
    """Why the Triton kernels cannot run on the GPU that is here, or None."""
    if not facts.triton:
        return "triton is not installed (pip install 'tandem-serve[gpu]')"
    if _release(facts.triton) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {facts.triton} is older than {oldest} (pip install 'tandem-serve[gpu]')"
    if facts.capability < OLDEST_CAPABILITY:
        major, minor = facts.capability
        return f"{facts.name} is sm_{major}{minor}, older than sm_{OLDEST_CAPABILITY[0]}{OLDEST_CAPABILITY[1]}"
    return None


def pick_gpu(kernels: str, facts: GpuFacts, quantization: str | None = None, unsupported: str | None = None) -> Picked:
    """The implementation for a GPU. `kernels`: one of ON_GPU; `unsupported`: why the Triton kernels cannot run the
    model, None: they can.

    Raises ValueError naming the field where what is asked for cannot be had.
    """
    if kernels not in ON_GPU:
        where = " on a GPU" if kernels in KERNELS else ""
        raise ValueError(f"kernels: {kernels!r} is not allowed{where}; allowed: one of {', '.join(ON_GPU)}")
    absent = gpu_problem(facts)
    if absent is not None:
        raise ValueError(f"device: 'cuda' is not allowed: {absent}; allowed: cpu, paced")
    obstacle = triton_problem(facts) or unsupported
    if kernels == "triton" and obstacle is not None:
        raise ValueError(f"kernels: 'triton' is not allowed: {obstacle}; allowed: auto, torch, reference")
    if kernels in ("auto", "triton") and obstacle is None:
        major, minor = facts.capability
        return Picked("triton", f"{facts.name}, sm_{major}{minor}, triton {facts.triton}, CUDA {facts.cuda}")
    if quantization is not None:
        why = obstacle if kernels == "auto" else f"kernels is {kernels!r}"
        raise ValueError(f"quantization: {quantization!r} is not allowed: it needs Triton kernels, and {why}")
    eager = "; decode steps are not captured"
    if kernels == "auto":
        return Picked("torch", f"Triton kernels cannot run here: {obstacle}{eager}")
    return Picked(kernels, f"asked for{eager}")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, int]:
    """Major and minor; what is no number counts as 0."""
    numbers = [int(part) if part.isdigit() else 0 for part in version.split("+")[0].split(".")[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)


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
def gpu_operations(kernels: str) -> GpuOperations:
    """Those of `triton`, `torch` or `reference`. ValueError for others."""
    if kernels == "triton":
        return _triton_operations()
    by = operations(kernels)
    from .on_device import attention, draws, rows

    attend, change = attention.attend_reference, draws.change_reference
    if kernels == "torch":
        attend, change = attention.attend_torch, draws.change_torch
        by = dataclasses.replace(by, rms_norm=rows.fused_rms_norm)
    return GpuOperations(
        rms_norm=functools.partial(rows.rms_norm, by),
        layer_norm=functools.partial(rows.layer_norm, by),
        activation=functools.partial(rows.activation, by),
        kv_write=functools.partial(rows.kv_write, by),
        decode_attention=functools.partial(attention.decode_attention, attend),
        prefill_attention=functools.partial(attention.prefill_attention, attend),
        sample=draws.sample,
        penalize=functools.partial(draws.penalize, change),
        restore=draws.restore,
        logprobs=draws.logprobs,
    )


def _triton_operations() -> GpuOperations:
    from .gpu import activation, decode_attention, kv_write, logprobs, norm, penalties, prefill_attention, sampling

    return GpuOperations(
        rms_norm=norm.rms_norm,
        layer_norm=norm.layer_norm,
        activation=activation.activation,
        kv_write=kv_write.kv_write,
        decode_attention=decode_attention.decode_attention,
        prefill_attention=prefill_attention.prefill_attention,
        sample=sampling.sample,
        penalize=penalties.penalize,
        restore=penalties.restore,
        logprobs=logprobs.logprobs,
        int8=Int8Operations(norm.rms_norm_int8, norm.layer_norm_int8, activation.activation_int8),
    )


@functools.cache
def kv_moves(device: torch.device) -> KvMoves:
    """Those for memory on `device`: Triton's where its kernels can run there, whoever computes, else torch's. Bytes are
    the same.
    """
    facts = gpu_facts(device) if device.type == "cuda" else interpreter()
    if triton_problem(facts) is None:
        from .gpu import kv_blocks

        return KvMoves(
            kv_blocks.gather_blocks, kv_blocks.scatter_blocks, kv_blocks.copy_blocks, kv_blocks.repack, compiles=True
        )
    from .on_device import kv_blocks as by_torch

    return KvMoves(
        by_torch.gather_blocks, by_torch.scatter_blocks, by_torch.copy_blocks, by_torch.repack, compiles=False
    )


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
