"""Comparisons of systems as text for people: attainment by rate, goodput by GPU, what was void and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..workload.sweep import SweepResult
from .claims_disaggregation import Goodput, SystemResult, goodput_of
from .claims_load import Staircase

_WIDTH = 50


def show(results: Sequence[SystemResult], load: Staircase) -> str:
    """A table for each promise, then what each run asked of the machine."""
    lines = []
    for place, promise in enumerate(load.promises):
        lines.append(f"{promise}: attainment, %, by requests/s offered to all GPUs; goodput at 90 % per GPU")
        lines.append(_head(load))
        best = _best([result.goodput(place) for result in results if result.system.mixed])
        for result in results:
            lines.append(_row(result.system.label, result, place, best))
        best = _best([_predicted(result, place) for result in results if result.system.mixed and result.predicted])
        for result in results:
            if result.predicted:
                lines.append(_predicted_row(result, place, best))
        lines.append("")
    lines += [line for result in results for line in _strains(result)]
    if load.time_scale != 1.0:
        lines.append(
            f"time ran {load.time_scale:g} times slower and is scaled back: exact for steps, arrivals and promises; "
            f"router, sockets and the workers' own work between steps weigh 1/{load.time_scale:g}"
        )
    return "\n".join(lines)


def show_predictions(rows: Sequence[tuple[str, int, Sequence[SweepResult]]], load: Staircase) -> str:
    """Goodput per GPU in virtual time, a line for each promise: the best split, the best colocated, all of them.

    `rows`: label, GPUs and sweeps by promise; a label with a `+` is a split.
    """
    lines = ["virtual time; goodput at 90 % per GPU, requests/s; ratio of the best split to the best colocated"]
    labels = [label for label, _, _ in rows]
    for place, promise in enumerate(load.promises):
        found = {label: goodput_of(sweeps[place], gpus) for label, gpus, sweeps in rows}
        split = _top({label: one for label, one in found.items() if "+" in label})
        mixed = _top({label: one for label, one in found.items() if "+" not in label})
        ratio = "-"
        if split and mixed and not found[mixed].bound.startswith("<"):
            ratio = f"{found[split].per_gpu / found[mixed].per_gpu:.2f}x" if found[split].bound != "<" else "0"
        lines.append(f"\n{promise}: {split} {found.get(split)}, {mixed} {found.get(mixed)}, ratio {ratio}")
        lines.append("  " + " · ".join(f"{label} {found[label]}" for label in labels))
    return "\n".join(lines)


def _head(load: Staircase) -> str:
    return f"{'':<{_WIDTH}}" + "".join(f"{rate:>8g}" for rate in load.rates) + f"{'goodput':>10}{'ratio':>7}"


def _row(label: str, result: SystemResult, place: int, best: float) -> str:
    points = {point.rate: point for point in result.sweep(place).points}
    cells = []
    for rate, stair in zip(result.load.rates, result.stairs, strict=True):
        if rate in points:
            cells.append(f"{100 * points[rate].attainment:>8.1f}")
        else:
            cells.append(f"{'VOID' if stair else '-':>8}")
    goodput = result.goodput(place)
    return f"{label:<{_WIDTH}}{''.join(cells)}{goodput!s:>10}{_ratio(goodput, best):>7}"


def _predicted_row(result: SystemResult, place: int, best: float) -> str:
    points = result.predicted[place].points
    cells = "".join(f"{100 * point.attainment:>8.1f}" for point in points)
    goodput = _predicted(result, place)
    name = f"  virtual: {result.system.label}"
    return f"{name:<{_WIDTH}}{cells}{goodput!s:>10}{_ratio(goodput, best):>7}"


def _predicted(result: SystemResult, place: int) -> Goodput:
    return goodput_of(result.predicted[place], result.system.gpus)


def _ratio(goodput: Goodput, best: float) -> str:
    return f"{goodput.per_gpu / best:.2f}x" if best and not goodput.bound and not math.isnan(goodput.per_gpu) else "-"


def _best(found: Sequence[Goodput]) -> float:
    """Of those that were reached."""
    return max((one.per_gpu for one in found if one.bound != "<" and not math.isnan(one.per_gpu)), default=0.0)


def _top(found: dict[str, Goodput]) -> str:
    return max(found, key=lambda label: (found[label].bound != "<", found[label].per_gpu), default="")


def _strains(result: SystemResult) -> list[str]:
    """What was void, and the worst of what was not."""
    lines = []
    whole = [one for stair in result.stairs for one in stair]
    steps, late = sum(one.steps for one in whole), sum(one.late_steps for one in whole)
    busy = max((one.strain.busy for one in whole), default=0.0)
    waited = max((share for one in whole for share in one.strain.waited.values()), default=0.0)
    router = max((one.strain.cpu.get("router", 0.0) for one in whole), default=0.0)
    lines.append(
        f"{result.system.label}: {len(whole)} stairs, {late} of {steps} steps late; at most: machine {busy:.0%} busy, "
        f"router {router:.0%} of a core, a process {waited:.0%} of its time without one"
    )
    lines += [f"  VOID at {one.rate:g}/s, seed {one.runs[0].seed}: {one.void}" for one in whole if one.void]
    return lines
