"""`tandem bench handoff`: what the passage of KV between two workers costs, stage by stage, on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .bench.handoff import HandoffOptions
    from .bench.handoff_pace import PaceOptions


def handoff(
    transports: Annotated[str, typer.Option(help="Comma-separated: grpc, grpc-nosum (no checksum), mapped.")] = (
        "grpc,grpc-nosum,mapped"
    ),
    sizes_mib: Annotated[str, typer.Option(help="KV of one handoff, comma-separated.")] = "1,16,256",
    repeats: Annotated[int, typer.Option(help="Handoffs of each kind; fewer where more than 16 MiB move.")] = 30,
    token_bytes: Annotated[int, typer.Option(help="KV of one token. Default: SmolLM2-135M in bfloat16.")] = 23040,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    engine_pace: Annotated[
        bool, typer.Option("--engine-pace", help="Instead: an engine's step times while its process moves KV.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="--engine-pace: computed on the CPU device. Default: a paced one.")
    ] = None,
    rows: Annotated[int, typer.Option(help="--engine-pace: sequences in its batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="--engine-pace: batches of each condition, in turns.")] = 4,
    kv_mover: Annotated[
        str, typer.Option(help="Who moves a worker's KV: process, thread, or auto, as for a device that computes.")
    ] = "auto",
    save_result: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Hand KV from one real worker process to another.

    Reports reserve, dispatch, transfer, confirm and GB/s.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it remarks on every process that is started beside its threads
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # and holds them up: those processes never use its state
    from .bench.handoff import HandoffOptions
    from .bench.handoff_pace import PaceOptions

    if kv_mover not in ("auto", "process", "thread"):
        raise ValueError(f"kv_mover: {kv_mover!r} is not allowed; allowed: auto, process, thread")
    if engine_pace:
        pace = PaceOptions(model=model, rows=rows, rounds=rounds, token_bytes=token_bytes, kv_mover=kv_mover)
        _run_pace(pace, save_result)
        return

    try:
        sizes = tuple(float(text) for text in sizes_mib.split(","))
    except ValueError:
        raise ValueError(f"sizes_mib: {sizes_mib!r} is not allowed; allowed: e.g. 1,16,256") from None
    options = HandoffOptions(
        transports=tuple(transports.split(",")),
        sizes_mib=sizes,
        repeats=repeats,
        token_bytes=token_bytes,
        seed=seed,
        kv_mover=kv_mover,
    )
    _run(options, save_result)


def _run(options: HandoffOptions, save_result: str | None) -> None:
    import uvloop

    from .bench.handoff import run_handoffs
    from .bench.handoff_report import Cell, table
    from .cli_display import Display

    display = Display()
    display.line("a paced device: nothing is computed; the processes, the KV and its passage are real")
    kinds = len(options.transports) * len(options.sizes_mib)
    with display.count("kinds of handoff", kinds) as advance:

        def on_cell(_: Cell) -> None:
            advance()

        cells = uvloop.run(run_handoffs(options, on_cell))
    display.line(table(cells))
    if save_result is not None:
        results: list[dict[str, Any]] = [
            cell.row() | {"each": [asdict(handoff) for handoff in cell.handoffs]} for cell in cells
        ]
        with open(save_result, "w") as file:
            json.dump({"options": asdict(options), "cells": results}, file)
        display.line(f"saved       {save_result}")


def _run_pace(options: PaceOptions, save_result: str | None) -> None:
    import uvloop

    from .bench.handoff_pace import CONDITIONS, pace_table, run_pace
    from .cli_display import Display

    display = Display()
    what = "a paced device: nothing is computed" if options.model is None else f"{options.model} on the CPU device"
    display.line(
        f"{what}; {options.rows} sequences a step, up to {options.rounds} x {options.steps} steps of each condition"
    )
    with display.count("batches", options.rounds * len(CONDITIONS)) as advance:
        paces = uvloop.run(run_pace(options, advance))
    display.line(pace_table(paces))
    if save_result is not None:
        with open(save_result, "w") as file:
            json.dump({"options": asdict(options), "conditions": [asdict(pace) for pace in paces]}, file)
        display.line(f"saved       {save_result}")
