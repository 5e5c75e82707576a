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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Role
from .result import Evaluation, Fate, PhaseResult, PlanResult
from .show import alternatives, runners_up
from .words import number

_SIGNS = "x: refused, it does not fit or cannot be split so. -: not even one request alone keeps the promises."
GRID = 160
"""Rates at which the curves of several seeds are averaged."""
COLORS = {"disaggregated": "#1f6fb4", "colocated": "#d9731a"}
_PALE = {"disaggregated": "#8fbbe0", "colocated": "#efb98a"}
_MUTED, _EDGE = "#666666", "#bbbbbb"
_LOOKED = (Fate.SIMULATED, Fate.SCREENED)
_SHADES = {Fate.SIMULATED: 0.8, Fate.SCREENED: 0.8, Fate.ESTIMATED: 0.35}
"""How dark the best cell is; what was only estimated is pale."""
_PER_GPU = "requests/s per GPU"


class PlotsMissing(ValueError):
    """matplotlib is not installed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One square of a map."""

    value: float = 0.0
    """Goodput per GPU; where not simulated, an estimate of it or the bound on it."""
    fate: Fate | None = None
    """None: never looked at."""
    note: str = ""
    decided: bool = True
    """False: what was seen before the search was ended; there may be more."""

    @property
    def rank(self) -> tuple[bool, float]:
        """What was simulated stands for a cell before what was only bounded or refused."""
        return self.fate in _LOOKED, self.value


def legend(result: PlanResult) -> str:
    """What the signs in the maps mean."""
    cut = "" if result.decided else " ≥: cut short, at least so much."
    return f"{_SIGNS} ~: estimated, <: at most; neither simulated.{cut} Framed: the best disaggregated plan."


def png(result: PlanResult, target: float, title: str, caption: str) -> bytes:
    """Everything as one picture: verdict above, curves and maps, inputs below."""
    counted = len(_counted(result)) > 1
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
    if len(_counted(result)) < 2:
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
        kind = "disaggregated" if one.candidate.disaggregated else "colocated"
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


def pair_cells(result: PlanResult) -> dict[tuple[tuple[int, int], tuple[int, int]], Cell]:
    """By split of prefill and of decode: the best that was looked at with them, how many workers of each."""
    cells: dict[tuple[tuple[int, int], tuple[int, int]], Cell] = {}
    for one in _chosen_last(result):
        prefill, decode = one.candidate.pool(Role.PREFILL), one.candidate.pool(Role.DECODE)
        if prefill is None or decode is None:
            continue
        key = _split(prefill), _split(decode)
        cell = _cell(one, f"{prefill.count}:{decode.count}")
        if key not in cells or cell.rank > cells[key].rank or one is result.disaggregated:
            cells[key] = cell
    return cells


def _chosen_last(result: PlanResult) -> list[Evaluation]:
    """Everything that was looked at; the best disaggregated plan at the end, whose cell is its own."""
    best = [] if result.disaggregated is None else [result.disaggregated]
    return [*result.explored, *best]


def draw_pairs(axes: Any, result: PlanResult) -> None:
    """Split of prefill x split of decode."""
    cells = pair_cells(result)
    rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
    best = None
    if result.disaggregated is not None:
        prefill, decode = (result.disaggregated.candidate.pool(role) for role in (Role.PREFILL, Role.DECODE))
        best = None if prefill is None or decode is None else (_split(prefill), _split(decode))
    names = [_split_name(row) for row in rows], [_split_name(column) for column in columns]
    _draw_map(axes, [[cells.get((r, c), Cell()) for c in columns] for r in rows], *names, _place(rows, columns, best))
    _label(axes, "split of decode workers", "split of prefill workers")
    axes.set_title(f"Best of each pair of splits: {_PER_GPU}, prefill:decode workers", fontsize=9, loc="left")


def draw_phase(axes: Any, result: PlanResult, role: Role) -> None:
    """One phase alone, TP x PP."""
    phases = [one for one in result.phases if one.role is role]
    cells = {(one.tensor_parallel, one.pipeline_stages): _phase_cell(one) for one in phases}
    rows, columns = sorted({tensor for tensor, _ in cells}), sorted({stages for _, stages in cells})
    best = None
    if result.disaggregated is not None and (pool := result.disaggregated.candidate.pool(role)) is not None:
        best = _split(pool)
    names = [str(tensor) for tensor in rows], [str(stages) for stages in columns]
    grid = [[cells.get((tensor, stages), Cell()) for stages in columns] for tensor in rows]
    _draw_map(axes, grid, *names, _place(rows, columns, best))
    _label(axes, "pipeline stages (PP)", "devices that split each layer (TP)")
    axes.set_title(f"{role.value.capitalize()} alone: {_PER_GPU}", fontsize=9, loc="left")


def draw_counts(axes: Any, result: PlanResult) -> None:
    """Workers of prefill x workers of decode, for the splits of the best disaggregated plan."""
    axes.set_title(f"Workers of each phase: {_PER_GPU}", fontsize=9, loc="left")
    best, cells = result.disaggregated, _counted(result)
    if best is None:
        _nothing(axes)
        return
    rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
    chosen = best.candidate.pools[0].count, best.candidate.pools[1].count
    names = [str(row) for row in rows], [str(column) for column in columns]
    grid = [[cells.get((row, column), Cell()) for column in columns] for row in rows]
    _draw_map(axes, grid, *names, _place(rows, columns, chosen))
    prefill, decode = (_split_name(_split(pool)) for pool in best.candidate.pools)
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
        kind = "disaggregated" if one.candidate.disaggregated else "colocated"
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


def _counted(result: PlanResult) -> dict[tuple[int, int], Cell]:
    """By numbers of prefill and of decode workers: the best that was looked at with the best plan's splits."""
    best = result.disaggregated
    splits = [] if best is None else [_split(pool) for pool in best.candidate.pools]
    cells: dict[tuple[int, int], Cell] = {}
    for one in _chosen_last(result):
        if one.candidate.disaggregated and [_split(pool) for pool in one.candidate.pools] == splits:
            key = one.candidate.pools[0].count, one.candidate.pools[1].count
            cell = _cell(one)
            if key not in cells or cell.rank > cells[key].rank or one is best:
                cells[key] = cell
    return cells


def _cell(one: Evaluation, note: str = "") -> Cell:
    """What was cut short before anything was seen of it is worth its estimate."""
    if one.decided or one.goodput.mean > 0.0:
        return Cell(_worth(one), one.fate, note, decided=one.decided)
    return Cell(one.estimate / one.candidate.gpus, Fate.ESTIMATED, note)


def _phase_cell(one: PhaseResult) -> Cell:
    return Cell(one.goodput_per_gpu, one.fate)


def _draw_map(
    axes: Any,
    cells: Sequence[Sequence[Cell]],
    rows: Sequence[str],
    columns: Sequence[str],
    best: tuple[int, int] | None,
) -> None:
    """Squares colored by value; `x`: refused, `-`: hopeless, `<`: only bounded, `~`: only estimated; best framed."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    if not rows or not columns:
        _nothing(axes)
        return
    top = max((cell.value for row in cells for cell in row if cell.fate in _SHADES), default=0.0)
    shade = colormaps["Blues"]
    small = len(columns) > 7 or len(rows) > 7
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            text, color = _cell_text(cell, small)
            face = shade(_SHADES[cell.fate] * cell.value / top) if cell.fate in _SHADES and top else "white"
            if cell.fate in (Fate.REFUSED, Fate.HOPELESS):
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#f0f0f0", edgecolor=_EDGE, hatch="///"))
            else:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="#e2e2e2", linewidth=0.8))
            if cell.fate in _LOOKED and cell.value > 0.75 * top:
                color = "white"
            axes.text(x, y, text, ha="center", va="center", fontsize=6.5 if small else 8, color=color)
    if best is not None:
        y, x = best
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#c0392b", linewidth=2.2))
    axes.set_xticks(range(len(columns)), columns, fontsize=7.5, rotation=45 if len(columns) > 5 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=7.5)
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


def _worth(one: Evaluation) -> float:
    if one.fate in _LOOKED:
        return one.goodput_per_gpu
    return (one.estimate if one.fate is Fate.ESTIMATED else one.bound) / one.candidate.gpus


def _split(pool: Any) -> tuple[int, int]:
    return pool.tensor_parallel, pool.pipeline_stages


def _split_name(split: tuple[int, int]) -> str:
    return f"TP {split[0]}" + (f" PP {split[1]}" if split[1] > 1 else "")


def _place(rows: Sequence[Any], columns: Sequence[Any], key: tuple[Any, Any] | None) -> tuple[int, int] | None:
    if key is None or key[0] not in rows or key[1] not in columns:
        return None
    return rows.index(key[0]), columns.index(key[1])


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
