"""Pictures of benchmark runs, drawn by matplotlib (`pip install tandem-serve[plots]`), which is imported when needed.

    plot_sweeps([split, colocated], "curves.png", title="OPT-13B, ShareGPT lengths")  # SweepResult each
    plot_run(result.records, "run.png", title="20 requests/s", promises_ms={"ttft": 200, "tpot": 50})

The file's suffix says what it becomes (.png, .svg, .pdf). `SweepResult.from_json` reads a saved sweep back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..workload.report import RequestRecord, attains
from ..workload.sweep import SweepResult

SUFFIXES = (".png", ".svg", ".pdf")


class PlotsMissing(ValueError):
    """matplotlib is not installed."""


def check_plot(path: str | Path) -> None:
    """Raises ValueError before anything was measured in vain: no matplotlib, no such kind of file, no such folder."""
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"save_plot: {str(path)!r} is not allowed; allowed: a file that ends in {', '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"save_plot: {str(path)!r} is not allowed; allowed: a file in a folder that exists")
    figure_of(1, 1, "")


def plot_sweeps(sweeps: Sequence[SweepResult], path: str | Path, *, title: str = "") -> None:
    """Attainment and goodput against the offered rate: a line for each sweep, its seeds as a band. Raises OSError."""
    figure, (left, right) = figure_of(1, 2, title)
    for number, sweep in enumerate(sweeps):
        color = f"C{number}"
        points = sorted(sweep.points, key=lambda point: point.rate)
        rates = [point.rate for point in points]
        best = sweep.best
        name = f"{sweep.label}: {best.rate:.3g}/s" if best is not None else f"{sweep.label}: none kept"
        for axes, value, of_run in (
            (left, lambda point: point.attainment * 100, lambda run: run.attainment * 100),
            (right, lambda point: point.goodput, lambda run: run.goodput),
        ):
            axes.plot(rates, [value(point) for point in points], "o-", color=color, markersize=4, label=name)
            low = [min(of_run(run) for run in point.runs) for point in points]
            high = [max(of_run(run) for run in point.runs) for point in points]
            axes.fill_between(rates, low, high, color=color, alpha=0.15, linewidth=0)
            if best is not None:
                axes.axvline(best.rate, color=color, linestyle=":", linewidth=1)
    for target in sorted({sweep.target for sweep in sweeps}):
        left.axhline(target * 100, color="gray", linestyle="--", linewidth=1)
    label(left, "offered, requests/s", "requests that kept every promise, %")
    left.set_ylim(0, 105)
    label(right, "offered, requests/s", "goodput, requests/s")
    edge = max([point.rate for sweep in sweeps for point in sweep.points] + [1e-9])
    right.plot([0, edge], [0, edge], color="gray", linestyle="--", linewidth=1)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def plot_run(
    records: Sequence[RequestRecord],
    path: str | Path,
    *,
    title: str = "",
    promises_ms: Mapping[str, float] | None = None,
) -> None:
    """Distributions of TTFT and TPOT, and both against the time at which each request was due. Raises OSError."""
    figure, rows = figure_of(2, 2, title)
    draw_latencies(rows, records, promises_ms or {})
    save_figure(figure, path)


def draw_latencies(
    rows: Any, records: Sequence[RequestRecord], promises: Mapping[str, float], *, lost: str = "failed"
) -> None:
    """The same into two rows of two axes each. `lost`: what became of those without an answer."""
    begin_s = min((record.due_s for record in records), default=0.0)
    kept_colors = [("C0", [record for record in records if not promises or attains(record, promises)])]
    if promises:
        kept_colors.append(("C3", [record for record in records if record.ok and not attains(record, promises)]))
    for column, (metric, attribute) in enumerate((("ttft", "ttft_s"), ("tpot", "tpot_s"))):
        spread, over_time = rows[0][column], rows[1][column]
        values = [getattr(record, attribute) for record in records if record.ok]
        values_ms = sorted(value * 1e3 for value in values if value is not None)
        shares = [100 * (place + 1) / len(values_ms) for place in range(len(values_ms))]
        spread.step(values_ms, shares, where="post", color="C0")
        for color, group in kept_colors:
            shown = [(record.due_s - begin_s, getattr(record, attribute)) for record in group]
            dots = [(due_s, value * 1e3) for due_s, value in shown if value is not None]
            over_time.scatter([x for x, _ in dots], [y for _, y in dots], s=8, color=color)
        if metric in promises:
            spread.axvline(promises[metric], color="gray", linestyle="--", linewidth=1)
            over_time.axhline(promises[metric], color="gray", linestyle="--", linewidth=1)
        label(spread, f"{metric.upper()}, ms", "requests at or below, %")
        label(over_time, "due, s since the start", f"{metric.upper()}, ms")
        spread.set_xlim(left=0)
        over_time.set_ylim(bottom=0)
    for axes in rows[1]:
        for number, due_s in enumerate(record.due_s - begin_s for record in records if not record.ok):
            axes.axvline(due_s, color="black", linewidth=0.5, alpha=0.4, label="" if number else lost)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes the picture, the same bytes for the same picture: no date, no random names. Raises OSError."""
    import matplotlib

    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "tandem"}):
        figure.savefig(path, dpi=120, metadata=dated.get(Path(path).suffix.lower()))


def figure_of(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    """A figure of its own, without pyplot's global state and without a display, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsMissing(
            f"save_plot: matplotlib is missing ({error}); allowed where `pip install tandem-serve[plots]` put it"
        ) from None
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns)


def label(axes: Any, x: str, y: str) -> None:
    """Names both axes, in the size of all pictures here."""
    """Names the axes and draws a grid."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
