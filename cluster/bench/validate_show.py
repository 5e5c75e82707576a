"""Prediction beside measurement, as text for people: tables as Markdown has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .validate import MAX_ERROR, MAX_POINTS, QUANTILES, Figures, Row, Validation
from .validate_predict import Overheads

_TITLES = {"ttft_p50": "TTFT p50, ms", "ttft_p90": "TTFT p90", "tpot_p50": "TPOT p50, ms", "tpot_p90": "TPOT p90"}
_OTHERS = 0.1
"""Of the machine, from which on others are mentioned."""
_HEAD = (
    "predicted / measured",
    "req/s",
    "requests",
    "attained, % (95 %)",
    "points",
    *_TITLES.values(),
    "CPU: ours, all",
    "steps",
    "",
)
_STEPS = _HEAD.index("steps")


def show_overheads(found: Overheads) -> str:
    """The machine's constants, on one line."""
    busy = f"; others used {100 * found.others_busy:.0f} % of it meanwhile" if found.others_busy >= _OTHERS else ""
    moved = f" and {1e9 * found.handoff_byte_s:.2f} ms to each MB of it" if found.handoff_byte_s else ""
    moved += f", {100 * found.beside_share:.0f} % to what is beside another engine" if found.beside_share else ""
    return (
        f"this machine adds {1e3 * found.first_token_s:.2f} ms to a first token and "
        f"{1e6 * found.prompt_token_s:.1f} us for each token of its prompt, {1e3 * found.step_s:.2f} ms to a step and "
        f"{1e6 * found.row_s:.0f} us for each of its rows, {1e3 * found.handoff_s:.2f} ms to a handoff{moved}{busy}"
    )


def show(found: Validation) -> str:
    """A line for each cluster and rate, then what it comes to."""
    lines = [show_rows(found.rows), "", show_overheads(found.overheads), *_verdict(found)]
    lines += [f"VOID  {row.label} at {row.rate:.3g}/s, {reason}" for row in found.rows for reason in row.void]
    return "\n".join(lines)


def show_rows(rows: Sequence[Row]) -> str:
    """The table. `steps`: what prefill and decode steps of an engine alone took around the run, of their profile's
    time; the prediction is for these.
    """
    cells = [_HEAD, *(_cells(row) for row in rows)]
    if all(row.pace is None for row in rows):
        cells = [(*line[:_STEPS], *line[_STEPS + 1 :]) for line in cells]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    told, seen = row.predicted, row.measured
    return (
        row.label,
        f"{row.rate:.3g}",
        str(told.requests if seen is None else seen.requests),
        f"{_share(told)} / {'-' if seen is None else _share_between(seen)}",
        _signed(row.points, "", 1),
        *(f"{_latency(told, name)} / {_latency(seen, name)}{_error(row, name)}" for name in QUANTILES),
        f"{_percent(row.own_cpu)}, {_percent(row.busy)}",
        "-" if row.pace is None else f"{_percent(row.pace.prefill)}, {_percent(row.pace.decode)}",
        _state(row),
    )


def _state(row: Row) -> str:
    if row.measured is None:
        return "not run"
    if not row.counts:
        return "VOID"
    if not row.below_saturation:
        return "saturated"
    return f"OUT: {', '.join(row.misses)}" if row.misses else "within"


def _verdict(found: Validation) -> list[str]:
    judged = found.judged
    if not judged:
        return ["nothing below saturation was measured"]
    points = max(abs(row.points) for row in judged)
    worst = [
        f"{_TITLES[name].removesuffix(', ms')} {100 * max(errors):.1f} %"
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


def _share_between(figures: Figures) -> str:
    low, high = figures.interval
    return f"{_share(figures)} ({100 * low:.0f}-{100 * high:.0f})"


def _latency(figures: Figures | None, name: str) -> str:
    if figures is None or name not in figures.quantiles_ms:
        return "-"
    return f"{figures.quantiles_ms[name][0]:.1f}"


def _error(row: Row, name: str) -> str:
    error = row.error(name)
    return "" if math.isnan(error) else f" ({_signed(100 * error, ' %', 1)})"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def _signed(value: float, unit: str, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:+.{digits}f}{unit}"
