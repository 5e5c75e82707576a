"""Prediction beside measurement, as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .validate import MAX_ERROR, MAX_POINTS, QUANTILES, Figures, Row, Validation
from .validate_predict import Overheads

_TITLES = {"ttft_p50": "TTFT p50", "ttft_p90": "p90", "tpot_p50": "TPOT p50", "tpot_p90": "p90"}
_LABEL, _CELL = 30, 24


def show_overheads(found: Overheads) -> str:
    """The machine's constants, on one line."""
    return (
        f"this machine adds {1e3 * found.first_token_s:.2f} ms to a first token, {1e3 * found.step_s:.2f} ms to a step "
        f"and {1e6 * found.row_s:.0f} us for each of its rows, {1e3 * found.handoff_s:.2f} ms to a handoff"
    )


def show(found: Validation) -> str:
    """A line for each cluster and rate, then what it comes to."""
    head = f"{'predicted / measured':<{_LABEL}}{'req/s':>7}{'attainment, %':>{_CELL}}{'points':>8}"
    head += "".join(f"{_TITLES[name] + ', ms':>{_CELL}}{'%':>7}" for name in QUANTILES)
    lines = [head, "-" * len(head), *(_row(row) for row in found.rows), "", *_verdict(found)]
    lines += [f"VOID  {row.label} at {row.rate:.3g}/s, {reason}" for row in found.rows for reason in row.void]
    return "\n".join(lines)


def _row(row: Row) -> str:
    told, seen = row.predicted, row.measured
    cells = f"{row.label[: _LABEL - 1]:<{_LABEL}}{row.rate:>7.3g}"
    cells += f"{_share(told) + ' / ' + _measured_share(row):>{_CELL}}{_signed(row.points, 1):>8}"
    for name in QUANTILES:
        cells += f"{_latency(told, name) + ' / ' + _latency(seen, name):>{_CELL}}{_signed(100 * row.error(name), 1):>7}"
    state = "" if row.below_saturation else "  saturated"
    return cells + (f"  OUT: {', '.join(row.misses)}" if row.misses else state)


def _verdict(found: Validation) -> list[str]:
    judged = found.judged
    if not judged:
        return ["nothing below saturation was measured"]
    points = max(abs(row.points) for row in judged)
    worst = [
        f"{_TITLES[name] if 'p50' in name else _TITLES[name.replace('p90', 'p50')][:4] + ' p90'} "
        f"{100 * max(errors):.1f} %"
        for name in QUANTILES
        if (errors := _errors(judged, name))
    ]
    within = sum(not row.misses for row in judged)
    return [
        f"below saturation: {within} of {len(judged)} rates within {MAX_POINTS:g} points of attainment and "
        f"{100 * MAX_ERROR:g} % of TTFT and TPOT; at most {points:.1f} points, {', '.join(worst)}"
    ]


def _errors(rows: Sequence[Row], name: str) -> list[float]:
    return [abs(error) for row in rows if not math.isnan(error := row.error(name))]


def _share(figures: Figures) -> str:
    return f"{100 * figures.attainment:.1f}"


def _measured_share(row: Row) -> str:
    figures = row.measured
    if figures is None:
        return "VOID" if row.void else "-"
    low, high = figures.interval
    return f"{100 * figures.attainment:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _latency(figures: Figures | None, name: str) -> str:
    if figures is None or name not in figures.quantiles_ms:
        return "-"
    return f"{figures.quantiles_ms[name][0]:.1f}"


def _signed(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:+.{digits}f}"
