"""The roofline of an A100-80G, of which nothing was fitted to OPT or to DistServe, against the step times that
DistServe's authors fitted to their own engine there (OSDI '24, appendix A).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..latency.hardware import load_hardware
from ..latency.model_facts import model_facts
from ..latency.profile import distserve_profile
from ..latency.roofline import Roofline

PREFILL_BY_HAND = 1.1
"""What DistServe's simulator multiplies its own prefill fit with: published, but not measured."""
CONTROL_S = 1e-3
"""What it adds to a stage of prefill."""
PROMPTS = tuple((length, length**2, 0, 0) for length in (64, 128, 256, 512, 1024, 2048))
DECODE = tuple((0, 0, rows, rows * context) for rows in (1, 8, 32, 64, 94, 128, 256) for context in (256, 512, 1024))


@dataclass(frozen=True, slots=True, kw_only=True)
class CostErrors:
    """Of one model and split: relative errors of the roofline over sizes of one phase, roofline / measured - 1."""

    model: str
    tensor_parallel: int
    phase: str
    errors: tuple[float, ...]


def compare_costs(data: Path) -> list[CostErrors]:
    """Over all models and tensor parallelisms of the file. `data`: the folder of DistServe's coefficients. ValueError,
    OSError.
    """
    path, found = data / "profiler-a100-80g.distserve.json", []
    for name, splits in json.loads(path.read_text(encoding="utf-8")).items():
        model = name.partition("/")[2]
        for ranks in map(int, splits):
            profile = distserve_profile(path, name, tensor_parallel=ranks)
            bare_s = profile.prefill_step_s - CONTROL_S
            measured = replace(profile, prefill_step_s=bare_s, overhead_s=0.0, overhead_token_s=0.0)
            costs = Roofline(model_facts(model, dtype="float16"), load_hardware("a100-80g"), ranks)
            for phase, shapes, by_hand in (("prefill", PROMPTS, PREFILL_BY_HAND), ("decode", DECODE, 1.0)):
                errors = (costs.step_time_s(*s) * by_hand / measured.step_time_s(*s) - 1.0 for s in shapes)
                found.append(CostErrors(model=model, tensor_parallel=ranks, phase=phase, errors=tuple(errors)))
    return found


def show_costs(rows: Sequence[CostErrors]) -> str:
    """A table of Markdown."""
    lines = [
        "| model | TP | phase | sizes | median error | 90th percentile | largest | mean, signed |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        size = np.abs(row.errors)
        cells = (np.median(size), np.percentile(size, 90), size.max())
        numbers = " | ".join(f"{100 * cell:.1f} %" for cell in cells)
        signed = f"{100 * float(np.mean(row.errors)):+.1f} %"
        lines.append(
            f"| {row.model} | {row.tensor_parallel} | {row.phase} | {len(row.errors)} | {numbers} | {signed} |"
        )
    return "\n".join(lines)
