"""What `tandem profile` says of itself: what it measures and where, and what came of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from ..bench.machine import processor_name
from ..config import EngineConfig
from ..latency.measured import MeasuredProfile

OTHERS = 0.1
"""Of the machine, from which on others are mentioned."""
_COMPUTING = {"cpu": ("numba", "torch"), "cuda": ("torch", "triton")}
"""Packages that compute on a device."""


def machine_facts(device: str) -> dict[str, Any]:
    """What timings depend on, beside the options."""
    from ... import __version__

    packages = ["numpy", "grpcio", *_COMPUTING.get(device, ())]
    versions = {"tandem": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = f"{processor_name()}, {cores} cores"
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        machine, memory_bytes = f"{properties.name}; {machine}", properties.total_memory
    return {"machine": machine, "memory_bytes": memory_bytes, "versions": versions}


def headline(config: EngineConfig, machine: dict[str, Any], points: int, budget_s: float) -> str:
    """One line: what is measured, where, for how long."""
    computes = "" if config.device != "paced" else " (a paced device: nothing is computed, its times are given)"
    precision = config.dtype if config.quantization is None else f"{config.quantization} ({config.dtype} KV)"
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''}"
    engine = f"{config.model}, {precision}, {config.device}{computes}, {threads}"
    return f"{engine}; {machine['machine']}; {points} points, at most {budget_s:.0f} s"


def summary(profile: MeasuredProfile) -> str:
    """The fit for people: terms, errors, links, what was left out."""
    terms, measured = profile.steps, profile.measured
    lines = [
        f"prompts     {terms.prefill_step_s * 1e3:.3g} ms + {terms.prefill_token_s * 1e6:.4g} us a token "
        f"+ {terms.prefill_square_s * 1e9:.3g} ns a token squared"
    ]
    halves = [(terms.decode, "decode")]
    if terms.large_decode != terms.decode:
        halves.append((terms.large_decode, f"{terms.large_batch_rows}+ rows"))
    lines += [
        f"{name:<12}{half.step_s * 1e3:.3g} ms + {half.row_s * 1e3:.3g} ms a row "
        f"+ {half.context_token_s * 1e6:.3g} us a token of context"
        for half, name in halves
    ]
    lines.append(f"engine      {measured.engine_overhead_s * 1e3:.2f} ms between two steps")
    lines += [
        f"{name:<12}{link.bandwidth_gb_s:.2f} GB/s, {link.latency_us / 1e3:.2f} ms before the first byte"
        for name, link in profile.links.items()
    ]
    lines.append(
        f"{'error':<18}{'held out: median':>17}{'p90':>8}{'worst':>8}{'fitted: median':>16}{'p90':>8}{'points':>8}"
    )
    lines += [
        f"{name:<18}{out.median:>17.1%}{out.p90:>8.1%}{out.worst:>8.1%}{measured.fitted[name].median:>16.1%}"
        f"{measured.fitted[name].p90:>8.1%}{out.points:>8}"
        for name, out in measured.held_out.items()
    ]
    if busy := others(measured.others_busy):
        lines.append(f"noise       {busy}: what is measured is a machine with that beside it")
    if measured.left_out:
        lines.append(f"left out    {', '.join(measured.left_out)}")
    return "\n".join(lines)


def others(share: float) -> str:
    """What others did meanwhile; empty: next to nothing."""
    return f"others used {share:.0%} of the machine's processors meanwhile" if share >= OTHERS else ""
