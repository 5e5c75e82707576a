"""What a GPU can do, as `engine_bounds` says it of processors: one reduction over more than its caches hold, and large
products of random matrices (a GPU multiplies ones faster than it multiplies numbers).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .engine_bounds import Bounds

READ_BYTES = 2 * 2**30
_MATRIX = 8192
_REPEATS = 6


@torch.inference_mode()
def measure_gpu_bounds(where: str = "cuda", *, read_bytes: int = READ_BYTES, matrix: int = _MATRIX) -> Bounds:
    """Takes a second, and 2 GiB of the GPU's memory at a time. Its int8 rate is 0 where torch has no such product."""
    device = torch.device(where)
    return Bounds(
        _read_rate(device, read_bytes),
        _product_rate(device, torch.float32, matrix),
        _product_rate(device, torch.bfloat16, matrix),
        _int8_rate(device, matrix),
    )


def _best_s(device: torch.device, call: Callable[[], object]) -> float:
    """The shortest of several calls to their end on the device, after one that does not count."""
    times_s = []
    for _ in range(1 + _REPEATS):
        _finish(device)
        start_s = time.perf_counter()
        call()
        _finish(device)
        times_s.append(time.perf_counter() - start_s)
    return min(times_s[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_rate(device: torch.device, read_bytes: int) -> float:
    return read_bytes / _best_s(device, torch.ones(read_bytes // 4, device=device).sum)


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_s(device, lambda: left @ right)


def _int8_rate(device: torch.device, size: int) -> float:
    left, right = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    try:
        return 2 * size**3 / _best_s(device, lambda: torch._int_mm(left, right.t()))
    except (AttributeError, RuntimeError):
        return 0.0  # not in this torch, or not for this device
