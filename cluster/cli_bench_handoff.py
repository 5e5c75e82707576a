"""`tandem bench handoff`: what the passage of KV between two workers costs, stage by stage, on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .bench.handoff import HandoffOptions


def handoff(
    transports: Annotated[str, typer.Option(help="Comma-separated: grpc, grpc-nosum (no checksum), mapped.")] = (
        "grpc,grpc-nosum,mapped"
    ),
    sizes_mib: Annotated[str, typer.Option(help="KV of one handoff, comma-separated.")] = "1,16,256",
    repeats: Annotated[int, typer.Option(help="Handoffs of each kind; fewer where more than 16 MiB move.")] = 30,
    token_bytes: Annotated[int, typer.Option(help="KV of one token. Default: SmolLM2-135M in bfloat16.")] = 23040,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    save_result: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Hand KV from one real worker process to another and report reserve, dispatch, transfer, confirm and GB/s."""
    from .bench.handoff import HandoffOptions

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
        rows: list[dict[str, Any]] = [
            cell.row() | {"each": [asdict(handoff) for handoff in cell.handoffs]} for cell in cells
        ]
        with open(save_result, "w") as file:
            json.dump({"options": asdict(options), "cells": rows}, file)
        display.line(f"saved       {save_result}")
