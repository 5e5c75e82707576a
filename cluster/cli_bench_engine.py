"""`tandem bench engine`: step times of one engine, without network, beside what the machine could do."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import (
    BlockSize,
    Cpus,
    Dtype,
    Kernels,
    KVCacheDtype,
    KVScalesFile,
    Model,
    Quantization,
    Threads,
    engine_of,
    numbers,
)
from .cli_typed import as_typed

if TYPE_CHECKING:
    from .bench.engine import EngineBenchOptions
    from .config import EngineConfig


def engine(
    command: typer.Context,
    model: Model = "smollm2-135m",
    device: Annotated[str, typer.Option(help="cpu or cuda; the paced device computes nothing and is refused.")] = "cpu",
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    kv_scales: KVScalesFile = None,
    kernels: Kernels = "auto",
    threads: Threads = 1,
    cpus: Cpus = "",
    block_size: BlockSize = 16,
    batch_sizes: Annotated[str, typer.Option(help="Sequences in a decode step.")] = "1,8,32",
    context: Annotated[str, typer.Option(help="Tokens of KV that each of them has.")] = "64,1024",
    prompt_lens: Annotated[str, typer.Option(help="Prompts to prefill, one at a time.")] = "64,256,1024",
    chunk_sizes: Annotated[str, typer.Option(help="Tokens of a prefill step at most.")] = "512",
    mixed: Annotated[bool, typer.Option("--mixed", help="Also a chunk beside each decode batch.")] = False,
    warmups: Annotated[int, typer.Option(help="Measurements of a row that do not count.")] = 2,
    repeats: Annotated[int, typer.Option(help="Measurements that do.")] = 10,
    row_seconds: Annotated[float, typer.Option(help="A row stops after this, with three measurements.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of token ids and KV.")] = 0,
    save_result: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
    save_trace: Annotated[str | None, typer.Option(metavar="FILE", help="Write the steps as a Chrome trace.")] = None,
) -> None:
    """Measure one engine's steps, without network.

    Over grids, with the share of the machine's bounds that they reach.
    """
    from .bench.engine import EngineBenchOptions

    with as_typed(command, {"context": "contexts"}):
        options = EngineBenchOptions(
            batch_sizes=numbers("batch_sizes", batch_sizes),
            contexts=numbers("context", context),
            prompt_lens=numbers("prompt_lens", prompt_lens),
            chunk_sizes=numbers("chunk_sizes", chunk_sizes),
            mixed=mixed,
            warmups=warmups,
            repeats=repeats,
            row_seconds=row_seconds,
            seed=seed,
        )
        _run(engine_of(command.params), options, save_result, save_trace)


def _run(config: EngineConfig, options: EngineBenchOptions, save_result: str | None, save_trace: str | None) -> None:
    """Builds the engine with KV memory for the largest cell, measures it, prints and writes."""
    import json
    from dataclasses import asdict
    from pathlib import Path

    from .bench.engine import cells, check_device, run_engine_bench, with_room
    from .bench.engine_show import HEAD, bounds_line, header, machine_facts, row_line
    from .cli_display import Display
    from .engine.devices.kv_memory import kv_layout
    from .launch.compose import build_device
    from .models.reference import resolve_model
    from .workload.chrome_trace import save_trace as write_trace

    files = resolve_model(config.model)
    found = cells(options)
    check_device(config, files.config, found)
    block_bytes = kv_layout(files.config, config.kv_dtype, config.block_size).block_bytes
    config = with_room(config, found, block_bytes)
    display = Display()
    built = build_device(config, files, None)
    try:
        picked = built.picked
        machine = machine_facts(config.device)
        line = header(config, (picked.kernels, picked.reason), machine)
        display.line(line)
        display.line(HEAD)
        facts = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "header": line,
            **machine,
            "kernels": picked.kernels,
            "engine": asdict(config),
            "options": asdict(options),
        }
        result = run_engine_bench(config, files.config, options, built, lambda row: display.line(row_line(row)), facts)
    finally:
        built.close()
    display.line(bounds_line(result.bounds, config))
    if save_result is not None:
        Path(save_result).write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
        display.line(f"saved       {save_result}")
    if save_trace is not None:
        write_trace(save_trace, result.events)
        display.line(f"saved       {save_trace}")
