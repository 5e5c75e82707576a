"""Pictures of a simulated run: latencies, and over time how many requests waited where and how full the KV was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plots import draw_latencies, figure_of, label, save_figure
from .simulated import SimulatedRun, promises_ms

_MOST_LINES = 12
"""More workers than these are drawn as their pool's mean and maximum."""


def plot_simulated(result: SimulatedRun, path: str | Path, *, title: str) -> None:
    """Distributions of TTFT and TPOT, both over time, queue lengths and KV use. Raises OSError."""
    figure, rows = figure_of(3, 2, title)
    shown = promises_ms(result.promises) if len(result.promises) == 1 else {}
    draw_latencies(rows[:2], result.records, shown, lost=lost_text(result.refused, result.summary.failed))
    _draw_queues(rows[2][0], result)
    _draw_kv(rows[2][1], result)
    save_figure(figure, path)


def lost_text(refused: int, failed: int) -> str:
    """What became of the `failed` requests without an answer, of which `refused` at the door."""
    parts = [f"{count} {what}" for count, what in ((refused, "refused"), (failed - refused, "failed")) if count]
    return ", ".join(parts)


def title_of(name: str, rate: float | str, served: float) -> str:
    """What the picture is of: who, what came and what was served, requests/s."""
    came = rate if isinstance(rate, str) else f"{rate:g} requests/s came"
    return f"{name}, virtual time: {came}, {served:.2f} requests/s served"


def _draw_queues(axes: Any, result: SimulatedRun) -> None:
    samples = result.recorder.samples if result.recorder is not None else []
    times = [at_s for at_s, _, _ in samples]
    axes.plot(times, [waiting for _, waiting, _ in samples], color="black", linewidth=1, label="at the router")
    for role, places in _pools(result).items():
        for name, attribute in (("waiting", "waiting"), ("running", "running"), ("held for handoff", "held")):
            counts = [sum(getattr(workers[place], attribute) for place in places) for _, _, workers in samples]
            if any(counts):
                axes.plot(times, counts, linewidth=1, label=f"{role}: {name}")
    label(axes, "s", "requests")
    axes.legend(fontsize=7)


def _draw_kv(axes: Any, result: SimulatedRun) -> None:
    samples = result.recorder.samples if result.recorder is not None else []
    times = [at_s for at_s, _, _ in samples]
    for role, places in _pools(result).items():
        used = [
            [100.0 * workers[place].used_blocks / max(1, workers[place].num_blocks) for place in places]
            for _, _, workers in samples
        ]
        if len(places) <= _MOST_LINES:
            for column, place in enumerate(places):
                name = samples[0][2][place].worker_id if samples else role
                axes.plot(times, [row[column] for row in used], linewidth=1, label=name)
        else:
            axes.plot(times, [max(row) for row in used], linewidth=1, label=f"{role}, the fullest")
            axes.plot(times, [sum(row) / len(row) for row in used], linewidth=1, label=f"{role}, mean")
    label(axes, "s", "KV blocks in use, %")
    axes.set_ylim(0, 105)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def _pools(result: SimulatedRun) -> dict[str, list[int]]:
    """Places of workers by role, as their ids tell it."""
    found: dict[str, list[int]] = {}
    if result.recorder is not None and result.recorder.samples:
        for place, worker in enumerate(result.recorder.samples[0][2]):
            found.setdefault(worker.worker_id.rpartition("-")[0], []).append(place)
    return found
