"""What this machine can do, measured in the same run as what the engine does: the bounds of `bench.engine`.

Reading: the best of several reductions over a buffer far larger than any cache, with as many threads as the engine has
(which of them is best differs by processor and thread count). Arithmetic: the best of large matrix products in float32
and bfloat16, and in int8 where torch has a product for this processor. They are what libraries reach, not what a data
sheet promises: an engine whose own kernels are better goes beyond 100 %.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

READ_BYTES = 256 * 2**20
_MATRIX = 1024
_REPEATS = 6
_INT8_ROWS = 512


@dataclass(frozen=True, slots=True)
class Bounds:
    """Per second, with the run's threads. 0: no such product here."""

    read_bytes: float
    float32_flops: float
    bfloat16_flops: float
    int8_ops: float

    def best(self, other: Bounds) -> Bounds:
        """Field by field the higher one: a disturbance can only lower what was measured."""
        return Bounds(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def float_flops(self) -> float:
        """For 16- and 32-bit weights: sums are float32 either way, so the faster of the two forms bounds both."""
        return max(self.float32_flops, self.bfloat16_flops)


@torch.inference_mode()
def measure_bounds(threads: int) -> Bounds:
    """Takes a few seconds and 512 MiB. Sets torch's thread count for the calling thread."""
    torch.set_num_threads(threads)
    return Bounds(_read_rate(), _product_rate(torch.float32), _product_rate(torch.bfloat16), _int8_rate())


def _best_s(call: Callable[[], object]) -> float:
    """The shortest of several calls, after one that does not count; no more of them once a second has gone."""
    call()
    best, until = float("inf"), time.perf_counter() + 1.0
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > until:
            break
    return best


def _read_rate() -> float:
    numbers = torch.ones(READ_BYTES // 4)
    others = torch.ones(READ_BYTES // 4)
    rows, vector = numbers.view(-1, 4096), torch.ones(4096)
    times = [
        _best_s(numbers.sum) / READ_BYTES,
        _best_s(lambda: torch.mv(rows, vector)) / READ_BYTES,
        _best_s(lambda: torch.dot(numbers, others)) / (2 * READ_BYTES),
    ]
    return 1 / min(times)


def _product_rate(dtype: torch.dtype) -> float:
    size = _MATRIX
    small = torch.ones(size // 4, size // 4, dtype=dtype)
    start = time.perf_counter()
    small @ small
    if time.perf_counter() - start > 0.02:  # no instructions for it here: the large product would take seconds
        size //= 4
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _best_s(lambda: torch.mm(left, right, out=out))


def _int8_rate() -> float:
    """int8 weights: unsigned int8 activations against FBGEMM's packed panels, or torch's plain int8 product."""
    operations = 2 * _INT8_ROWS * _MATRIX * _MATRIX
    rates = [0.0]
    try:
        left = torch.ones(64, 64, dtype=torch.int8)
        start = time.perf_counter()
        torch._int_mm(left, left)
        if time.perf_counter() - start < 0.001:
            left = torch.ones(_INT8_ROWS, _MATRIX, dtype=torch.int8)
            right = torch.ones(_MATRIX, _MATRIX, dtype=torch.int8)
            rates.append(operations / _best_s(lambda: torch._int_mm(left, right)))
    except (AttributeError, RuntimeError):
        pass  # not in this torch, or not for this processor
    if "fbgemm" in torch.backends.quantized.supported_engines:
        rates.append(operations / _best_s(_fbgemm_product()))
    return max(rates)


def _fbgemm_product() -> Callable[[], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that these types move elsewhere
        scales = torch.full((_MATRIX,), 0.01)
        weight = torch.quantize_per_channel(
            torch.ones(_MATRIX, _MATRIX), scales, torch.zeros(_MATRIX, dtype=torch.int64), 0, torch.qint8
        )
        rows = torch.quantize_per_tensor(torch.ones(_INT8_ROWS, _MATRIX), 0.02, 128, torch.quint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda: torch.ops.quantized.linear(rows, packed, 0.1, 128)
