"""`tandem profile`: measures an engine of this machine and writes the latency model that others predict from."""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import BlockSize, Cpus, Dtype, Kernels, Model, Quantization, Threads, engine_of, numbers
from .cli_typed import as_typed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .cli_display import Display
    from .config import EngineConfig
    from .engine.devices.base import Device
    from .latency.measured import MeasuredProfile, MeasuredStep, MeasuredTransfer
    from .models.reference import ModelFiles
    from .profiler.points import Grid, Point
    from .profiler.repeat import RepeatOptions

_TRANSFERS_SHARE = 0.4
"""Of the budget, at most; steps have what is left of it."""
_TRANSFERS_AT_LEAST_S = 60.0
"""What processes take to start on a busy machine is no reason to have no links."""

_FIELDS = {
    "prompt_lens": "lengths",
    "cached": "starts",
    "chunk_sizes": "chunk_lengths",
    "batch_sizes": "batches",
    "context": "contexts",
    "mixed_batch_sizes": "mixed_batches",
    "mixed_context": "mixed_contexts",
    "mixed_chunk_sizes": "mixed_lengths",
    "kv_cache": "kv_cache_bytes",
    "paced_profile": "engine.paced_profile",
}
"""What options are called where they are checked."""
_SHOWN = 5
"""Points that an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is measured and where it goes."""

    config: EngineConfig
    grid: Grid
    repeat: RepeatOptions
    transfers: bool
    max_transfer_spread: float
    output: Path
    plot: Path | None


def profile(
    command: typer.Context,
    model: Model = "smollm2-135m",
    output: Annotated[str, typer.Option(metavar="FILE", help="Where the profile goes.")] = "profile.json",
    device: Annotated[str, typer.Option(help="cpu or paced.")] = "cpu",
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    kernels: Kernels = "auto",
    threads: Threads = 1,
    cpus: Cpus = "",
    block_size: BlockSize = 16,
    kv_cache: Annotated[str, typer.Option(help="KV memory at most; points that need more are left out.")] = "1GiB",
    paced_profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="--device paced: what its steps take.")
    ] = None,
    prompt_lens: Annotated[str, typer.Option(help="Prompts in one step.")] = "16,64,128,256,512",
    cached: Annotated[str, typer.Option(help="Cached tokens before a chunk.")] = "512,1536",
    chunk_sizes: Annotated[str, typer.Option(help="Chunks behind them.")] = "64,256,512",
    batch_sizes: Annotated[str, typer.Option(help="Sequences in a decode step.")] = "1,2,4,8,16,32",
    context: Annotated[str, typer.Option(help="Tokens of KV that each of them has.")] = "64,512,1024",
    mixed_batch_sizes: Annotated[str, typer.Option(help="Decode rows beside a chunk.")] = "4,16",
    mixed_context: Annotated[str, typer.Option(help="Tokens of KV that each of those has.")] = "256,1024",
    mixed_chunk_sizes: Annotated[str, typer.Option(help="Chunks beside them.")] = "64,256",
    transfers: Annotated[
        bool, typer.Option("--transfers/--no-transfers", help="Also KV between two workers of this machine.")
    ] = True,
    rounds: Annotated[int, typer.Option(help="How often every point is measured.")] = 7,
    budget_s: Annotated[float, typer.Option(help="Seconds that measuring may take.")] = 200.0,
    max_spread: Annotated[
        float, typer.Option(help="How far a step's times may lie apart; beyond, nothing is saved.")
    ] = (0.15),
    max_transfer_spread: Annotated[float, typer.Option(help="The same for a transfer's.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of token ids, KV and the order.")] = 0,
    save_plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw fit against measurement.")] = None,
) -> None:
    """Measure an engine: prompts, cached prefixes, decode batches, mixed steps, transfers; fit and save a profile."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it remarks on every process that is started beside its threads
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # and holds them up: those processes never use its state
    with as_typed(command, _FIELDS):
        raise typer.Exit(run_profile(_wanted(command.params)))


def _wanted(given: Mapping[str, Any]) -> Wanted:
    """The command's options, by name. ValueError naming a field."""
    from .profiler.points import Grid
    from .profiler.repeat import RepeatOptions

    lists = {field: numbers(name, given[name]) for name, field in _FIELDS.items() if field in Grid.__slots__}
    return Wanted(
        grid=Grid(**lists),
        repeat=RepeatOptions(**{name: given[name] for name in ("rounds", "budget_s", "max_spread", "seed")}),
        config=engine_of(given),
        transfers=given["transfers"],
        max_transfer_spread=given["max_transfer_spread"],
        output=Path(given["output"]),
        plot=None if given["save_plot"] is None else Path(given["save_plot"]),
    )


def run_profile(wanted: Wanted) -> int:
    """Measures, fits, prints and saves; the exit code: 1 where repeated times disagree, and nothing is saved."""
    from .bench.plots import check_plot
    from .cli_display import Display
    from .launch.checks import check_engine
    from .models.reference import resolve_model
    from .profiler.repeat import Disagreement
    from .profiler.show import summary

    if not wanted.output.absolute().parent.is_dir():
        raise ValueError(f"output: {str(wanted.output)!r} is not allowed; allowed: a file in a folder that exists")
    if wanted.plot is not None:
        check_plot(wanted.plot)
    files = resolve_model(wanted.config.model)
    check_engine(wanted.config, files.config)
    display = Display()
    try:
        measured = _measure(wanted, files, display)
    except Disagreement as error:
        display.line(str(error))
        return 1
    display.line(summary(measured))
    measured.save(wanted.output)
    display.line(f"saved       {wanted.output}")
    if wanted.plot is not None:
        from .profiler.plot import plot_profile

        plot_profile(measured, wanted.plot)
        display.line(f"drawn       {wanted.plot}")
    return 0


def _measure(wanted: Wanted, files: ModelFiles, display: Display) -> MeasuredProfile:
    """Everything that takes time. Raises Disagreement, ConfigError, ValueError."""
    from dataclasses import replace

    from .bench.claims_machine import strain, take_sample
    from .engine.devices.kv_memory import kv_layout
    from .latency.measured import Measurement
    from .launch.compose import build_device
    from .profiler.fit import fitted_profile
    from .profiler.live import overhead_blocks
    from .profiler.points import Places, check_enough, fitting
    from .profiler.repeat import check_agreement
    from .profiler.show import headline, machine_facts, others

    config, begin_s = wanted.config, time.monotonic()
    block_bytes = kv_layout(files.config, config.dtype, config.block_size).block_bytes
    kv_tokens = config.kv_cache_bytes // block_bytes * config.block_size
    points, too_large = fitting(
        wanted.grid.points(),
        max_model_len=files.config.max_model_len,
        kv_tokens=kv_tokens,
        block_size=config.block_size,
    )
    more = f" and {len(too_large) - _SHOWN} more" if len(too_large) > _SHOWN else ""
    held = ", ".join(too_large[:_SHOWN]) + more
    lost = (
        f"the model's context or its KV memory ({config.kv_cache_bytes / 2**20:.0f} MiB, --kv-cache) cannot hold {held}"
    )
    check_enough(points, lost if too_large else "")
    num_blocks = max(Places(points, config.block_size).blocks, overhead_blocks(config.block_size))
    config = replace(config, kv_cache_bytes=num_blocks * block_bytes)
    kv_token_bytes = block_bytes // config.block_size
    machine = machine_facts(config.device)
    display.line(headline(config, machine, len(points), wanted.repeat.budget_s))
    moved = _measure_transfers(wanted, kv_token_bytes, display) if wanted.transfers else {}
    device = build_device(config, files, None)
    try:
        left_s = wanted.repeat.budget_s - (time.monotonic() - begin_s)
        repeat = replace(wanted.repeat, budget_s=max(left_s, wanted.repeat.budget_s * (1 - _TRANSFERS_SHARE)))
        before = take_sample(ours := {"this process": os.getpid()})
        steps, out_of_time, gap_s = _measure_steps(repeat, config, device, points, display)
        busy = strain(before, take_sample(ours)).others
    finally:
        device.close()
    if late := device.late_steps_total:
        display.line(f"{late} steps came late: the machine is busy, or too slow for what the paced device was told")
    check_agreement({name: step.times_s for name, step in steps.items()}, repeat.max_spread, why=others(busy))
    kernels = getattr(getattr(device, "picked", None), "kernels", "")
    about = Measurement(
        model=config.model,
        model_config=files.config,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        kernels=kernels,
        threads=config.threads,
        block_size=config.block_size,
        kv_token_bytes=kv_token_bytes,
        **machine,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        max_spread=wanted.repeat.max_spread,
        steps=steps,
        transfers=moved,
        engine_overhead_s=gap_s,
        others_busy=busy,
        left_out=(*too_large, *out_of_time),
    )
    return fitted_profile(about)


def _measure_transfers(wanted: Wanted, kv_token_bytes: int, display: Display) -> dict[str, MeasuredTransfer]:
    import asyncio

    from .profiler.transfers import agreeing_transfers

    timeout_s = max(wanted.repeat.budget_s * _TRANSFERS_SHARE, _TRANSFERS_AT_LEAST_S)
    with display.steps(remaining=True) as report:
        work = agreeing_transfers(
            kv_token_bytes,
            wanted.max_transfer_spread,
            block_size=wanted.config.block_size,
            timeout_s=timeout_s,
            on_progress=lambda what, share: report("transfers", what if display.live else "measured", share),
        )
        try:
            return asyncio.run(work)
        except TimeoutError:
            allowed = "more time, or --no-transfers"
            raise ValueError(f"budget_s: transfers were not done after {timeout_s:.0f} s; allowed: {allowed}") from None


def _measure_steps(
    repeat: RepeatOptions, config: EngineConfig, device: Device, points: tuple[Point, ...], display: Display
) -> tuple[dict[str, MeasuredStep], tuple[str, ...], float]:
    """(steps by name in the order of the points, those for which there was no time, seconds between two steps)."""
    from .profiler.live import engine_overhead_s, measure_steps, measured_steps
    from .profiler.points import check_enough

    with display.steps(remaining=True) as report:
        timings = measure_steps(
            device,
            points,
            repeat,
            block_size=config.block_size,
            on_progress=lambda what, share: report("steps", what if display.live else "measured", share),
        )
        check_enough(timings.times_s, f"budget_s: {repeat.budget_s:.0f} s were over before the others")
        report("steps", "between two steps" if display.live else "measured", 1.0)
        gap_s = engine_overhead_s(device, block_size=config.block_size, num_blocks=device.kv.num_blocks)
    found = measured_steps(timings)
    ordered = {point.name: found[point.name] for point in points if point.name in found}
    return ordered, timings.left_out, gap_s
