"""Fit against measurement, drawn by matplotlib (`pip install tandem-serve[plots]`), which is imported when needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..bench.plots import figure_of, label
from ..latency.measured import MeasuredProfile, MeasuredStep

_COLORS = {"prefill": "C0", "decode": "C1", "mixed": "C2"}


def plot_profile(profile: MeasuredProfile, path: str | Path) -> None:
    """Four pictures: predicted against measured, prompts by length, decode by rows, transfers by size; measurements as
    points with their quartiles, the fit as lines. Raises OSError.
    """
    figure, ((against, prompts), (decode, transfers)) = figure_of(2, 2, profile.steps.source)
    _draw_against(against, profile)
    _draw_prompts(prompts, profile)
    _draw_decode(decode, profile)
    _draw_transfers(transfers, profile)
    figure.savefig(path, dpi=120)


def _draw_against(axes: Any, profile: MeasuredProfile) -> None:
    steps = profile.measured.steps.values()
    for kind, color in _COLORS.items():
        of_kind = [step for step in steps if step.kind == kind]
        measured = [step.median_s * 1e3 for step in of_kind]
        predicted = [profile.steps.step_time_s(*step.sizes) * 1e3 for step in of_kind]
        held_out = profile.measured.held_out.get(kind)
        name = kind if held_out is None else f"{kind}: held out {held_out.median:.1%}, p90 {held_out.p90:.1%}"
        axes.plot(measured, predicted, "o", color=color, markersize=4, label=name)
    ends = [min(step.median_s for step in steps) * 1e3, max(step.median_s for step in steps) * 1e3]
    axes.plot(ends, ends, color="gray", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    label(axes, "measured, ms", "predicted, ms")
    axes.legend(fontsize=8)


def _draw_prompts(axes: Any, profile: MeasuredProfile) -> None:
    by_start: dict[int, list[MeasuredStep]] = {}
    for step in profile.measured.steps.values():
        if step.kind == "prefill":
            start = (step.prefill_squares // step.prefill_tokens - step.prefill_tokens) // 2
            by_start.setdefault(start, []).append(step)
    for number, (start, steps) in enumerate(sorted(by_start.items())):
        steps.sort(key=lambda step: step.prefill_tokens)
        lengths = np.linspace(steps[0].prefill_tokens, steps[-1].prefill_tokens, 50).astype(int).tolist()
        line = [profile.steps.step_time_s(n, (start + n) ** 2 - start**2, 0, 0) * 1e3 for n in lengths]
        axes.plot(lengths, line, color=f"C{number}", linewidth=1)
        _points(axes, [step.prefill_tokens for step in steps], steps, f"C{number}", f"behind {start}" if start else "")
    label(axes, "prompt tokens in a step", "ms")
    axes.legend(fontsize=8, loc="upper left")


def _draw_decode(axes: Any, profile: MeasuredProfile) -> None:
    by_context: dict[int, list[MeasuredStep]] = {}
    for step in profile.measured.steps.values():
        if step.kind == "decode":
            by_context.setdefault(step.context_tokens // step.decode_rows, []).append(step)
    for number, (context, steps) in enumerate(sorted(by_context.items())):
        steps.sort(key=lambda step: step.decode_rows)
        rows = range(steps[0].decode_rows, steps[-1].decode_rows + 1)
        line = [profile.steps.step_time_s(0, 0, count, count * context) * 1e3 for count in rows]
        axes.plot(rows, line, color=f"C{number}", linewidth=1)
        _points(axes, [step.decode_rows for step in steps], steps, f"C{number}", f"context {context}")
    label(axes, "decode rows in a step", "ms")
    axes.legend(fontsize=8, loc="upper left")


def _draw_transfers(axes: Any, profile: MeasuredProfile) -> None:
    measured = profile.measured.transfers.values()
    for number, (name, link) in enumerate(profile.links.items()):
        sizes = sorted(transfer.size_bytes for transfer in measured if transfer.link == name)
        grid = np.geomspace(sizes[0], sizes[-1], 50).tolist()
        axes.plot([size / 2**20 for size in grid], [link.transfer_time_s(size) * 1e3 for size in grid], f"C{number}-")
        of_link = sorted((t for t in measured if t.link == name), key=lambda t: t.size_bytes)
        about = f"{name}: {link.bandwidth_gb_s:.2f} GB/s, {link.latency_us / 1e3:.2f} ms"
        _points(axes, [transfer.size_bytes / 2**20 for transfer in of_link], of_link, f"C{number}", about)
    label(axes, "KV, MiB", "ms from the end of prefill")
    if measured:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "transfers were not measured", ha="center", transform=axes.transAxes)


def _points(axes: Any, x: list[Any], measured: list[Any], color: str, name: str) -> None:
    """Medians with their quartiles."""
    low, middle, high = (
        np.array([np.quantile(point.times_s, share) for point in measured]) * 1e3 for share in (0.25, 0.5, 0.75)
    )
    axes.errorbar(
        x, middle, yerr=[middle - low, high - middle], fmt="o", color=color, markersize=4, label=name or "from 0"
    )
