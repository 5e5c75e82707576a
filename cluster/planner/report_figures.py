"""The pictures of a plan's report, drawn by matplotlib (`pip install tandem-serve[plots]`), imported when needed:

* attainment against offered rate per GPU, of the best plans and the runners-up: mean over seeds, all seeds as a band
* the map of the search: goodput per GPU over split of prefill x split of decode, what was refused marked
* each phase alone over TP x PP, and the numbers of workers of the best pair of splits
* goodput of the best plans and the runners-up as bars

A figure holds no date and its ids are salted alike: the same result gives the same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Role
from .report_maps import LOOKED, Cell, Key, Map, Split, count_map, pair_map, phase_map, split_of
from .result import Evaluation, Fate, PlanResult
from .show import alternatives, runners_up
from .words import number

_SIGNS = "x: refused, it does not fit or cannot be split so. -: not even one request alone keeps the promises."
GRID = 160
"""Rates at which the curves of several seeds are averaged."""
COLORS = {"disaggregated": "#1f6fb4", "colocated": "#d9731a"}
_PALE = {"disaggregated": "#8fbbe0", "colocated": "#efb98a"}
_MUTED, _EDGE = "#666666", "#bbbbbb"
_SHADES = {Fate.SIMULATED: 0.8, Fate.SCREENED: 0.8, Fate.ESTIMATED: 0.35}
"""How dark the best cell is; what was only estimated is pale."""
_PER_GPU = "requests/s per GPU"


class PlotsMissing(ValueError):
    """matplotlib is not installed."""


def legend(result: PlanResult) -> str:
    """What the signs in the maps mean."""
    cut = "" if result.decided else " ≥: cut short, at least so much."
    return f"{_SIGNS} ~: estimated, <: at most; neither simulated.{cut} Framed: the best disaggregated plan."


def png(result: PlanResult, target: float, title: str, caption: str) -> bytes:
    """Everything as one picture: verdict above, curves and maps, inputs below."""
    counted = len(count_map(result).cells) > 1
    with _figure((13.0, 8.6)) as figure:
        figure.suptitle("\n".join(textwrap.wrap(title, 118)), fontsize=11, fontweight="bold", x=0.01, ha="left")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1.0))
        left, right = top.subplots(1, 2, width_ratios=(1.15, 1.0))
        draw_curves(left, result, target)
        draw_pairs(right, result)
        axes = bottom.subplots(
            1, 4 if counted else 3, width_ratios=(1.0, 1.0, 1.0, 1.3) if counted else (1.0, 1.0, 1.3)
        )
        draw_phase(axes[0], result, Role.PREFILL)
        draw_phase(axes[1], result, Role.DECODE)
        if counted:
            draw_counts(axes[2], result)
        draw_goodputs(axes[-1], result)
        below = [line for text in (legend(result), *caption.split("\n")) for line in textwrap.wrap(text, 230)]
        figure.text(0.01, 0.0, "\n".join(below), fontsize=8, color=_MUTED, va="top", ha="left")
        return _saved(figure, "png")


def svg_curves(result: PlanResult, target: float) -> str:
    """The curves alone, as an `<svg>` element."""
    with _figure((7.4, 4.2)) as figure:
        draw_curves(figure.subplots(), result, target)
        return _svg(figure)


def svg_map(result: PlanResult) -> str:
    """Both maps over splits, as an `<svg>` element."""
    with _figure((12.6, 4.0)) as figure:
        axes = figure.subplots(1, 3, width_ratios=(1.4, 1.0, 1.0))
        draw_pairs(axes[0], result)
        draw_phase(axes[1], result, Role.PREFILL)
        draw_phase(axes[2], result, Role.DECODE)
        return _svg(figure)


def svg_counts(result: PlanResult) -> str:
    """Numbers of workers, as an `<svg>` element; empty where only one pair of numbers was looked at."""
    if len(count_map(result).cells) < 2:
        return ""
    with _figure((5.0, 4.0)) as figure:
        draw_counts(figure.subplots(), result)
        return _svg(figure)


def svg_goodputs(result: PlanResult) -> str:
    """The best plans and the runners-up as bars, as an `<svg>` element."""
    with _figure((7.4, 3.4)) as figure:
        draw_goodputs(figure.subplots(), result)
        return _svg(figure)


def curve(one: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(rates [R] of the whole candidate, attainment [seeds, R] between the rates at which each seed was run).

    Of a run that was ended early only a bound is known: it counts where nothing else was run beyond it.
    """
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for point in one.points:
        by_seed.setdefault(point.seed, []).append((point.rate, min(point.attainment, point.late_attainment)))
    if not by_seed:
        return np.zeros(0), np.zeros((0, 0))
    rates = np.linspace(min(p.rate for p in one.points), max(p.rate for p in one.points), GRID)
    rows = []
    for seed in sorted(by_seed):
        known = np.array(sorted(by_seed[seed]))
        values = np.interp(rates, known[:, 0], known[:, 1])
        values[(rates < known[0, 0] - 1e-12) | (rates > known[-1, 0] + 1e-12)] = np.nan
        rows.append(values)
    return rates, np.array(rows)


def draw_curves(axes: Any, result: PlanResult, target: float) -> None:
    """Attainment against offered rate per GPU."""
    shown = [one for one in alternatives(result) if one.points]
    for one in reversed(shown):
        best = one in (result.disaggregated, result.colocated)
        kind = one.candidate.kind
        color = (COLORS if best else _PALE)[kind]
        rates, values = curve(one)
        rates = rates / one.candidate.gpus
        with np.errstate(all="ignore"):
            known = ~np.isnan(values).all(axis=0)
            mean, low, high = (f(values[:, known], axis=0) * 100 for f in (np.nanmean, np.nanmin, np.nanmax))
        so_far = "" if one.decided else ", so far"
        label = f"{kind if best else f'next {kind}'}{so_far}: {one.candidate.label}; {number(one.goodput_per_gpu)}"
        style = {"linewidth": 2.0 if best else 1.2, "linestyle": "-" if one.decided else "--"}
        axes.plot(rates[known], mean, color=color, label=label, zorder=3 if best else 2, **style)
        axes.fill_between(rates[known], low, high, color=color, alpha=0.15 if best else 0.08, linewidth=0)
        if best and one.goodput.mean:
            per_gpu = one.goodput_per_gpu
            axes.plot([per_gpu], [target * 100], "o", color=color, markersize=7, zorder=4)
            axes.plot([per_gpu, per_gpu], [0, target * 100], color=color, linestyle=":", linewidth=1)
    axes.axhline(target * 100, color=_MUTED, linestyle="--", linewidth=1)
    axes.annotate(
        f"target {target * 100:g} %",
        (1.0, target * 100),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-4, 3),
        ha="right",
        fontsize=8,
        color=_MUTED,
    )
    axes.set_ylim(0, 104)
    axes.set_xlim(left=0)
    _label(axes, f"offered, {_PER_GPU}", "requests that keep their promises, %")
    axes.set_title(f"Attainment against rate (legend: goodput, {_PER_GPU})", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    if shown:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], fontsize=7.5, loc="lower left", framealpha=0.9)


def draw_pairs(axes: Any, result: PlanResult) -> None:
    """Split of prefill x split of decode."""
    _draw_map(axes, pair_map(result), _split_name)
    _label(axes, "split of decode workers", "split of prefill workers")
    axes.set_title(f"Best of each pair of splits: {_PER_GPU}, prefill:decode workers", fontsize=9, loc="left")


def draw_phase(axes: Any, result: PlanResult, role: Role) -> None:
    """One phase alone, TP x PP."""
    _draw_map(axes, phase_map(result, role), str)
    _label(axes, "pipeline stages (PP)", "devices that split each layer (TP)")
    axes.set_title(f"{role.value.capitalize()} alone: {_PER_GPU}", fontsize=9, loc="left")


def draw_counts(axes: Any, result: PlanResult) -> None:
    """Workers of prefill x workers of decode, for the splits of the best disaggregated plan."""
    _draw_map(axes, count_map(result), str)
    axes.set_title(f"Workers of each phase: {_PER_GPU}", fontsize=9, loc="left")
    if result.disaggregated is not None:
        prefill, decode = (_split_name(split_of(pool)) for pool in result.disaggregated.candidate.pools)
        _label(axes, f"decode workers ({decode})", f"prefill workers ({prefill})")


def draw_goodputs(axes: Any, result: PlanResult) -> None:
    """Goodput per GPU of the best plans and the runners-up, best first, with its interval where there is one."""
    axes.set_title(f"Goodput, {_PER_GPU} (line: 95 % interval)", fontsize=9, loc="left")
    best = [one for one in (result.disaggregated, result.colocated) if one is not None and one.goodput.mean > 0.0]
    shown = sorted([*best, *runners_up(result)], key=lambda one: -one.goodput_per_gpu)
    if not shown:
        _nothing(axes)
        return
    for place, one in enumerate(shown):
        kind = one.candidate.kind
        scale = 1.0 / one.candidate.gpus
        value, low, high = (edge * scale for edge in (one.goodput.mean, one.goodput.low, one.goodput.high))
        axes.barh(place, value, height=0.78, color=(COLORS if one in best else _PALE)[kind], alpha=0.55)
        if low < high:
            axes.plot([max(0.0, low), high], [place + 0.27, place + 0.27], color="#222222", linewidth=1.1)
        text = f"{number(value)}{'' if one.decided else ' so far'}   {one.candidate.label}"
        axes.annotate(text, (0.0, place - 0.05), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks([])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=0)
    _label(axes, _PER_GPU, "")


def _draw_map(axes: Any, found: Map[Key], name: Callable[[Key], str]) -> None:
    """Squares colored by value; `x`: refused, `-`: hopeless, `<`: only bounded, `~`: only estimated; best framed."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    rows, columns = found.rows, found.columns
    if not found.cells:
        _nothing(axes)
        return
    top = max((cell.value for cell in found.cells.values() if cell.fate in _SHADES), default=0.0)
    shade = colormaps["Blues"]
    small = len(columns) > 7 or len(rows) > 7
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            cell = found.cells.get((row, column), Cell())
            text, color = _cell_text(cell, small)
            face = shade(_SHADES[cell.fate] * cell.value / top) if cell.fate in _SHADES and top else "white"
            if cell.fate in (Fate.REFUSED, Fate.HOPELESS):
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#f0f0f0", edgecolor=_EDGE, hatch="///"))
            else:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="#e2e2e2", linewidth=0.8))
            if cell.fate in LOOKED and cell.value > 0.75 * top:
                color = "white"
            axes.text(x, y, text, ha="center", va="center", fontsize=6.5 if small else 8, color=color)
    if found.chosen in found.cells:
        y, x = rows.index(found.chosen[0]), columns.index(found.chosen[1])
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#c0392b", linewidth=2.2))
    axes.set_xticks(
        range(len(columns)), [name(column) for column in columns], fontsize=7.5, rotation=45 if len(columns) > 5 else 0
    )
    axes.set_yticks(range(len(rows)), [name(row) for row in rows], fontsize=7.5)
    axes.tick_params(length=0)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _cell_text(cell: Cell, small: bool) -> tuple[str, str]:
    if cell.fate is None:
        return "", _MUTED
    if cell.fate is Fate.REFUSED:
        return "x", "#c0392b"
    if cell.fate is Fate.HOPELESS:
        return "-", "#c0392b"
    sign = {Fate.BOUNDED: "<", Fate.ESTIMATED: "~"}.get(cell.fate, "" if cell.decided else "≥")
    value = f"{sign}{number(cell.value)}"
    return (value if small or not cell.note else f"{value}\n{cell.note}"), "black"


def _split_name(split: Split) -> str:
    return f"TP {split[0]}" + (f" PP {split[1]}" if split[1] > 1 else "")


def _nothing(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, fontsize=9, color=_MUTED)


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)
    axes.tick_params(labelsize=7.5)


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Any]:
    """A figure of its own, without pyplot's global state and without a display."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsMissing(
            f"report: matplotlib is missing ({error}); allowed where `pip install tandem-serve[plots]` put it"
        ) from None
    with rc_context({"svg.hashsalt": "tandem", "svg.fonttype": "path", "hatch.linewidth": 0.3}):
        yield Figure(figsize=size, layout="constrained")


def _saved(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    figure.savefig(buffer, format=kind, dpi=130, metadata=metadata, bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def _svg(figure: Any) -> str:
    """From the element on: what stands before it belongs to a file of its own."""
    text = _saved(figure, "svg").decode()
    return text[text.index("<svg") :]
