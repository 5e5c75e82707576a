"""Whether a system's constants foretell a run that they were not set on: what was calibrated is scaled to the other
runs of the system, and the run that was left out is replayed with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..sim.systems import ServingSystem
from ..types import Role
from .replay import MeasuredRun, Replayed, replay

_JUDGED = ("ttft_p50_s", "ttft_p90_s", "tpot_p50_s")
"""Not TPOT p90: once a run is saturated it is the tail of swapping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """One run, replayed with what the others say."""

    factor: float
    """Of the system's calibrated constants, best for the others."""
    replayed: Replayed


def scaled(system: ServingSystem, factor: float) -> ServingSystem:
    """The system with its calibrated constants so many times what they are: what a token costs beside the device where
    phases are split, all step times where they are not.
    """
    control = system.control
    if Role.DECODE in system.batching:
        return replace(system, control=replace(control, step_row_s=control.step_row_s * factor))
    return replace(
        system,
        control=replace(control, prompt_step_s=control.prompt_step_s * factor, step_row_s=control.step_row_s * factor),
        prefill_factor=system.prefill_factor * factor,
        decode_factor=system.decode_factor * factor,
    )


def factors(system: ServingSystem) -> tuple[float, ...]:
    """Those that are tried."""
    return (0.0, 0.5, 1.0, 1.5, 2.0) if Role.DECODE in system.batching else (0.88, 0.94, 1.0, 1.06, 1.12)


def leave_one_out(
    runs: Sequence[MeasuredRun],
    data: Path,
    systems: Mapping[str, ServingSystem],
    *,
    on_replay: Callable[[], None] = lambda: None,
) -> list[LeftOut]:
    """Every run of a system that has another one. `on_replay`: called after each replay. ValueError as `replay`."""
    found = []
    for name in dict.fromkeys(run.system for run in runs):
        own, errors = [run for run in runs if run.system == name], {}
        if len(own) < 2:
            continue
        for factor in factors(systems[name]):
            for run in own:
                row = replay(run, data, scaled(systems[name], factor), replays=1).errors()
                errors[factor, run.name] = sum(abs(math.log1p(row[field])) for field in _JUDGED)
                on_replay()
        for run in own:
            others = [other.name for other in own if other is not run]
            best = min(factors(systems[name]), key=lambda factor: sum(errors[factor, other] for other in others))
            found.append(LeftOut(factor=best, replayed=replay(run, data, scaled(systems[name], best))))
            on_replay()
    return found


def show_left_out(rows: Sequence[LeftOut]) -> str:
    """A table of Markdown."""
    lines = [
        "| left out | constants by | attained % (measured → simulated) | points | worst of TTFT p50, p90, TPOT p50 |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in rows:
        row, errors = one.replayed, one.replayed.errors()
        attained = f"{100 * row.measured.attainment:.1f} → {100 * row.simulated.attainment:.1f}"
        worst = max((errors[name] for name in _JUDGED), key=abs)
        lines.append(f"| {row.run.name} | {one.factor:g} | {attained} | {row.points:+.1f} | {100 * worst:+.0f} % |")
    return "\n".join(lines)
