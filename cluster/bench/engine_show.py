"""`bench engine`'s header and table, for people."""

from __future__ import annotations

import os
import platform
from typing import Any

from ..config import EngineConfig
from .engine import CellResult
from .engine_bounds import Bounds
from .machine import processor_name

HEAD = (
    f"{'':<8}{'batch':>6}{'context':>9}{'prompt':>8}{'chunk':>7}  {'ms':>9} {'min … max':>19}"
    f"{'tokens/s':>10}{'memory':>8}{'arith.':>8}"
)


def machine_facts(device: str) -> dict[str, Any]:
    """What timings on `device` depend on, for the header and the saved result."""
    import torch

    from ... import __version__

    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        **gpu,
        "machine": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "tandem": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def header(config: EngineConfig, picked: tuple[str, str], machine: dict[str, Any]) -> str:
    """One line: model, precision, threads, kernels picked and why, machine."""
    kv_dtype = config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    precision = config.quantization or config.dtype
    if kv_dtype != precision:
        precision = f"{precision} ({kv_dtype} KV)"
    threads = _computes(config)
    kernels, reason = picked
    place = f"{machine['machine']}, {machine['cores']} cores, {machine['instructions']}"
    place = f"{machine['gpu']}, CUDA {machine['cuda']}; {place}" if "gpu" in machine else place
    return f"{config.model}, {precision}, {threads}, {kernels} kernels ({reason}); {place}"


def _computes(config: EngineConfig) -> str:
    if config.device == "cuda":
        return "one GPU"
    return f"{config.threads} thread{'s' if config.threads > 1 else ''}"


def bounds_line(bounds: Bounds, config: EngineConfig) -> str:
    """What the machine reached beside the engine."""
    int8 = f"{bounds.int8_ops / 1e9:.0f} GOP/s" if bounds.int8_ops else "no product here"
    floats = f"float32 {bounds.float32_flops / 1e9:.0f} GFLOP/s, bfloat16 {bounds.bfloat16_flops / 1e9:.0f} GFLOP/s"
    return (
        f"bounds with {_computes(config)}: reading {bounds.read_bytes / 1e9:.1f} GB/s; products {floats}, int8 {int8}"
    )


def row_line(row: CellResult) -> str:
    """One line of the table under `HEAD`. A prefill's time is that of the whole prompt."""
    cell = row.cell
    numbers = (cell.batch, cell.context if cell.batch else 0, cell.prompt, cell.chunk)
    shown = [str(number) if number else "-" for number in numbers]
    digits = 1 if row.median_s >= 0.01 else 3
    spread = f"{min(row.times_s) * 1e3:.{digits}f} … {max(row.times_s) * 1e3:.{digits}f}"
    return (
        f"{cell.kind:<8}{shown[0]:>6}{shown[1]:>9}{shown[2]:>8}{shown[3]:>7}  {row.median_s * 1e3:>9.{digits}f} "
        f"{spread:>19}{row.tokens_per_s:>10.0f}{row.memory_share:>8.0%}{row.arithmetic_share:>8.0%}"
    )
