"""`tandem bench replay`: what others measured of their systems, beside virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="DistServe's coefficients and runs: measured/distserve of the shared data."),
]
Requests = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Runs in a CSV of the same columns. Default: those of the folder.")
]
Only = Annotated[str, typer.Option(help="Runs whose name contains this.")]
Costs = Annotated[bool, typer.Option("--costs", help="Also the roofline of an A100 beside DistServe's step times.")]
LeaveOut = Annotated[
    bool, typer.Option("--leave-out", help="Also each run with constants that only the system's other runs set.")
]
Goodput = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also what phases apart and together keep, on lengths like ShareGPT's."),
]
Ablate = Annotated[bool, typer.Option("--ablate", help="Also each system less one of its parts.")]


def replay(
    data: Data,
    requests: Requests = None,
    only: Only = "",
    costs: Costs = False,
    ablate: Ablate = False,
    leave_out: LeaveOut = False,
    goodput: Goodput = None,
) -> None:
    """Replay measured runs; print them beside simulated ones.

    Request by request, with the same arrivals and lengths; each system with one set of constants for all its runs
    (cluster/sim/systems.py). Ends with status 1 where a run is more than 5 points off.
    """
    from .bench import replay as bench
    from .sim.systems import SYSTEMS

    path = requests or data / bench.REQUESTS
    runs = bench.read_runs(path)
    rows = [bench.replay(run, data) for run in runs if only in run.name]
    if not rows:
        known = ", ".join(run.name for run in runs)
        raise ValueError(f"--only: {only!r} is in no run's name; allowed: a part of {known}")
    typer.echo(bench.show(rows))
    if ablate:
        for system in dict.fromkeys(row.run.system for row in rows):
            own = [row.run for row in rows if row.run.system == system]
            less = bench.ablations(SYSTEMS[system])
            found = {name: [bench.replay(run, data, part) for run in own] for name, part in less.items()}
            typer.echo(f"\n{bench.show_ablations(found)}")
    if leave_out:
        from .bench.replay_left_out import leave_one_out, show_left_out

        others = leave_one_out([row.run for row in rows], data, SYSTEMS)
        typer.echo(f"\n{show_left_out(others)}" if others else "\n--leave-out: no system has two runs here")
    if goodput is not None:
        from .bench import replay_colocated as colocated

        kept = [(one, colocated.goodput(one, data, goodput)) for one in colocated.contenders()]
        typer.echo(f"\n{colocated.show_goodput(kept)}")
    if costs:
        from .bench.replay_costs import compare_costs, show_costs

        typer.echo(f"\n{show_costs(compare_costs(data))}")
    far = [row.run.name for row in rows if round(abs(row.points), 3) > bench.MAX_POINTS]
    if far:
        typer.echo(f"more than {bench.MAX_POINTS:g} points off: {', '.join(far)}")
        raise typer.Exit(1)
