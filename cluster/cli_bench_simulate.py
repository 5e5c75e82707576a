"""`tandem bench simulate`: how fast virtual time passes on this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def simulate(
    requests: Annotated[int, typer.Option(help="Of each scene.")] = 4000,
    rounds: Annotated[int, typer.Option(help="Of each scene; the median counts.")] = 3,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="DistServe's coefficients. Default: the packaged A100 roofline.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="FILE", help="A pool of lengths. Default: made-up ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    save_result: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Measure the speed of virtual time.

    Standard clusters near saturation: simulated tokens, requests and events per processor second.
    """
    import json
    from pathlib import Path

    from .bench.simulate import SimulateOptions, run_simulate, show
    from .cli_display import Display

    options = SimulateOptions(requests=requests, rounds=rounds, seed=seed, profile=profile, lengths=lengths)
    display = Display()
    result = run_simulate(options, lambda what: display.line(f"simulating  {what}"))
    display.line(show(result))
    if save_result is not None:
        Path(save_result).write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
        display.line(f"saved       {save_result}")
