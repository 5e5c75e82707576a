"""How attention on a GPU is cut, and the facts that this hangs on: how KV memory holds numbers, and the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

PLAIN, INT8, FP8_BITS, FP8 = 0, 1, 2, 3
"""How the KV memory holds a number: as queries are; int8; float8 e4m3fn taken apart by us (sm_80 has no conversion); or
by the hardware (from sm_89 on). Stored = value / scale, a scale per side and head."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut: rows of queries (M) and keys (N) of a tile, warps, and stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def form_of(layer: torch.Tensor, dtype: torch.dtype) -> int:
    """How a KV memory holds numbers. Raises ValueError where queries of `dtype` cannot be computed with it."""
    if layer.dtype == dtype and dtype in (torch.bfloat16, torch.float16, torch.float32):
        return PLAIN
    if layer.dtype == torch.int8:
        return INT8
    if layer.dtype == torch.float8_e4m3fn:
        native = layer.is_cuda and torch.cuda.get_device_capability(layer.device) >= (8, 9)
        return FP8 if native else FP8_BITS
    raise ValueError(
        f"kv dtype: {layer.dtype} is not allowed with queries of {dtype}; "
        "allowed: the queries' own bfloat16, float16 or float32, or int8, or float8_e4m3fn"
    )


def architecture(device: torch.device) -> int:
    """Compute capability as two digits; for the interpreter, the newest that is shipped for."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def has_warpgroups(arch: int) -> bool:
    """Whether matrix units read shared memory (sm_90 to sm_110), so that operands take no registers."""
    return 90 <= arch < 120


def has_small_blocks(arch: int) -> bool:
    """Whether a block of threads has 99 KiB of shared memory at most, not 163 and more (`cubin.LIMITS`)."""
    return arch in (86, 89) or arch >= 120


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the interpreter, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
