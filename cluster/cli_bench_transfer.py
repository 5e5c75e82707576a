"""`tandem bench transfer`: bytes a second of each KV transport, against a plain copy over the same medium."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import numbers
from .cli_typed import as_typed

if TYPE_CHECKING:
    from .bench.transfer import TransferOptions


def transfer(
    command: typer.Context,
    transports: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: grpc, grpc-nosum (no checksum), mapped, cuda_ipc, gloo, nccl. Default: the memory's."
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Where KV lies: host, staged (as a GPU's is moved, without one), cuda.")
    ] = "host",
    block_kib: Annotated[str, typer.Option(help="KiB of a block, comma-separated.")] = "64,512,2048",
    blocks: Annotated[str, typer.Option(help="Blocks of a pull, comma-separated.")] = "16,128,512",
    most_mib: Annotated[float, typer.Option(help="Of a pull; larger ones are left out.")] = 512,
    seconds: Annotated[float, typer.Option(help="Of each cell.")] = 1.0,
    save_result: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Pull KV from another process, over and over.

    Reports GB/s and processor time of each transport.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it remarks on every process that is started beside its threads
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    import uvloop

    from ..kvtransfer.freed_memory import keep_freed_memory
    from .bench.transfer import TransferCell, run_transfers, table
    from .cli_display import Display

    with as_typed(command):
        options = _options(command.params)
    keep_freed_memory()
    display = Display()
    display.line("no engine: source, transport, checks and memory are a worker's; one pull at a time")
    with display.count("cells", options.num_cells) as advance:

        def on_cell(_: TransferCell) -> None:
            advance()

        cells = uvloop.run(run_transfers(options, on_cell))
    display.line(table(cells))
    if save_result is not None:
        with open(save_result, "w") as file:
            json.dump({"options": asdict(options), "cells": [cell.row() for cell in cells]}, file)
        display.line(f"saved       {save_result}")


def _options(given: Mapping[str, Any]) -> TransferOptions:
    """The command's options, by name. ValueError naming one."""
    from ..kernels.dispatch import gpu_facts, gpu_problem
    from .bench.transfer import TransferOptions

    memory, names = given["memory"], given["transports"]
    usual = {"host": "grpc,grpc-nosum,mapped", "staged": "grpc,grpc-nosum", "cuda": "cuda_ipc,grpc,grpc-nosum"}
    try:
        block_kib = tuple(float(text) for text in given["block_kib"].split(","))
    except ValueError:
        raise ValueError(f"block_kib: {given['block_kib']!r} is not allowed; allowed: e.g. 64,512") from None
    options = TransferOptions(
        transports=tuple((usual.get(memory, "grpc") if names is None else names).split(",")),
        memory=memory,
        block_kib=block_kib,
        blocks=numbers("blocks", given["blocks"]),
        most_mib=given["most_mib"],
        seconds=given["seconds"],
    )
    problem = gpu_problem(gpu_facts()) if memory == "cuda" else None
    if problem is not None:
        raise ValueError(f"memory: 'cuda' is not allowed; allowed: host, staged: {problem}")
    return options
