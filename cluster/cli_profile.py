"""`tandem profile`: measures an engine of this machine and writes the latency model that others predict from."""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import BlockSize, Cpus, Dtype, Kernels, Model, Quantization, Threads, check_output, engine_of, numbers
from .cli_typed import as_typed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
_GPU_KV_BYTES = 16 * 2**30
"""KV memory that points may need on a GPU, where the configuration names none."""
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
    output: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Where the profile goes; one whose times disagree: beside, as FILE.unsteady."
        ),
    ] = "profile.json",
    device: Annotated[str, typer.Option(help="cpu, cuda or paced.")] = "cpu",
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
    max_spread: Annotated[float, typer.Option(help="How far a step's times may lie apart; beyond, see --output.")] = (
        0.15
    ),
    max_transfer_spread: Annotated[float, typer.Option(help="The same for a transfer's.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of token ids, KV and the order.")] = 0,
    save_plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw fit against measurement.")] = None,
) -> None:
    """Measure an engine's steps and transfers; save a profile.

    Prompts, cached prefixes, decode batches, mixed steps, and KV between two workers; fitted for `tandem plan`.
    """
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
    """Measures, fits, prints and saves; the exit code: 1 where repeated times disagree or the machine was too slow for
    the budget: what was measured is then saved beside, if a profile can be made of it.
    """
    from .bench.plots import check_plot
    from .cli_display import Display
    from .launch.checks import check_engine
    from .models.reference import resolve_model
    from .profiler.repeat import TooSlow
    from .profiler.show import summary

    check_output(wanted.output)
    if wanted.plot is not None:
        check_plot(wanted.plot)
    _check_processors(wanted.config)
    files = resolve_model(wanted.config.model)
    check_engine(wanted.config, files.config)
    display = Display()
    try:
        measured = _measure(wanted, files, display)
    except TooSlow as error:
        display.line(f"nothing saved: {error}")
        return 1
    display.line(summary(measured))
    doubts, output = measured.measured.doubts, wanted.output
    if doubts:
        output = output.with_name(f"{output.stem}.unsteady{output.suffix}")
    measured.save(output)
    display.line(
        f"saved       {output}"
        + (f", not as {wanted.output}: others warn of what they predict by it" if doubts else "")
    )
    if wanted.plot is not None:
        from .profiler.plot import plot_profile

        plot_profile(measured, wanted.plot)
        display.line(f"drawn       {wanted.plot}")
    return 1 if doubts else 0


def _check_processors(config: EngineConfig) -> None:
    """ValueError for processors that this machine has not, or more threads than it has of them."""
    from .config_schema import ConfigError

    if config.device != "cpu" or not hasattr(os, "sched_getaffinity"):
        return
    ours = sorted(os.sched_getaffinity(0))
    if not set(config.cpus) <= set(ours):
        raise ConfigError("cpus", list(config.cpus), f"processors of this machine: {','.join(map(str, ours))}")
    if config.threads > len(ours):
        raise ConfigError("threads", config.threads, f"1 to {len(ours)}, as many as there are processors")


def _check_lists(wanted: Wanted, left: tuple[Point, ...], max_model_len: int) -> None:
    """ValueError for a list without which there is nothing to fit, and that is empty or longer than the context."""
    from .config_schema import ConfigError

    grid = wanted.grid
    for name, values in (("lengths", grid.lengths), ("batches", grid.batches), ("contexts", grid.contexts)):
        if not values:
            raise ConfigError(name, list(values), "at least one number")
    alone = any(point.length and not point.start and not point.batch for point in left)
    decode = any(point.batch and not point.length for point in left)
    for name, values, there in (("lengths", grid.lengths, alone), ("contexts", grid.contexts, decode)):
        if not there and min(values) >= max_model_len:
            raise ConfigError(name, list(values), f"below {max_model_len} tokens, the model's context")


def _what_fits(wanted: Wanted, files: ModelFiles) -> tuple[EngineConfig, tuple[Point, ...], tuple[str, ...], str]:
    """(the engine with as much KV memory as they need, points, names of those that it has no room for, that in a line).
    ValueError where too few are left.
    """
    from dataclasses import replace

    from .engine.devices.kv_memory import kv_layout
    from .profiler.live import overhead_blocks
    from .profiler.points import Places, check_enough, fitting

    config = wanted.config
    block_bytes = kv_layout(files.config, config.kv_dtype, config.block_size).block_bytes
    kv_bytes = config.kv_cache_bytes or _GPU_KV_BYTES
    kv_tokens = kv_bytes // block_bytes * config.block_size
    points, too_large = fitting(
        wanted.grid.points(),
        max_model_len=files.config.max_model_len,
        kv_tokens=kv_tokens,
        block_size=config.block_size,
    )
    more = f" and {len(too_large) - _SHOWN} more" if len(too_large) > _SHOWN else ""
    held = ", ".join(too_large[:_SHOWN]) + more
    lost = f"the model's context or its KV memory ({kv_bytes / 2**20:.0f} MiB, --kv-cache) cannot hold {held}"
    _check_lists(wanted, points, files.config.max_model_len)
    check_enough(points, lost if too_large else "")
    num_blocks = max(Places(points, config.block_size).blocks, overhead_blocks(config.block_size))
    return replace(config, kv_cache_bytes=num_blocks * block_bytes), points, too_large, lost if too_large else ""


def _measure(wanted: Wanted, files: ModelFiles, display: Display) -> MeasuredProfile:
    """Everything that takes time; steps and transfers are judged apart, and what was found of both is in the profile.
    Raises TooSlow, ConfigError, ValueError.
    """
    from dataclasses import replace

    from .bench.claims_machine import strain, take_sample
    from .engine.devices.kv_memory import kv_layout
    from .latency.measured import Measurement
    from .launch.compose import build_device
    from .profiler.fit import fitted_profile
    from .profiler.repeat import Disagreement, check_agreement
    from .profiler.show import headline, machine_facts, others

    begin_s = time.monotonic()
    config, points, too_large, lost = _what_fits(wanted, files)
    kv_token_bytes = kv_layout(files.config, config.kv_dtype, config.block_size).block_bytes // config.block_size
    machine = machine_facts(config.device)
    display.line(headline(config, machine, len(points), wanted.repeat.budget_s))
    if too_large:
        display.line(f"left out    {lost}")
    doubts: list[str] = []
    moved = _measure_transfers(wanted, kv_token_bytes, display, doubts) if wanted.transfers else {}
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
    try:
        check_agreement({name: step.times_s for name, step in steps.items()}, repeat.max_spread, why=others(busy))
    except Disagreement as error:
        _doubt(doubts, f"steps: {error}", display)
    about = Measurement(
        model=config.model,
        model_config=files.config,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        kernels=device.picked.kernels,
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
        doubts=tuple(doubts),
    )
    return fitted_profile(about)


def _doubt(doubts: list[str], why: str, display: Display) -> None:
    """Said at once: whoever watches may end it."""
    doubts.append(why)
    display.line(why)


def _measure_transfers(
    wanted: Wanted, kv_token_bytes: int, display: Display, doubts: list[str]
) -> dict[str, MeasuredTransfer]:
    """Those that there was time for; adds to `doubts` where they disagree or are none."""
    import asyncio

    from .profiler.transfers import TransfersDisagree, agreeing_transfers

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
        except TransfersDisagree as error:
            _doubt(doubts, f"transfers: {error}", display)
            return error.found
        except TimeoutError:
            _doubt(
                doubts,
                f"transfers: they were not done after {timeout_s:.0f} s of --budget-s {wanted.repeat.budget_s:g}; "
                "allow more, or --no-transfers",
                display,
            )
            return {}


def _measure_steps(
    repeat: RepeatOptions, config: EngineConfig, device: Device, points: tuple[Point, ...], display: Display
) -> tuple[dict[str, MeasuredStep], tuple[str, ...], float]:
    """(steps by name in the order of the points, those for which there was no time, seconds between two steps). TooSlow
    as soon as it is clear that they would be too few.
    """
    from .profiler.live import engine_overhead_s, measure_steps, measured_steps
    from .profiler.repeat import unsteady

    told = False

    def on_round(times_s: Mapping[Point, Sequence[float]]) -> None:
        nonlocal told
        if not any(times_s.values()):
            _check_time(times_s, points, repeat.budget_s)
        elif not told and (text := unsteady(times_s, repeat.max_spread)):
            told = True
            display.line(text)

    with display.steps(remaining=True) as report:
        timings = measure_steps(
            device,
            points,
            repeat,
            block_size=config.block_size,
            on_progress=lambda what, share: report("steps", what if display.live else "measured", share),
            on_round=on_round,
        )
        _check_time(timings.times_s, points, repeat.budget_s)
        report("steps", "between two steps" if display.live else "measured", 1.0)
        gap_s = engine_overhead_s(device, block_size=config.block_size, num_blocks=device.kv.num_blocks)
    found = measured_steps(timings)
    ordered = {point.name: found[point.name] for point in points if point.name in found}
    return ordered, timings.left_out, gap_s


def _check_time(measured: Iterable[Point], points: tuple[Point, ...], budget_s: float) -> None:
    """TooSlow where a fit of what there is time for would have too little to go by."""
    from .profiler.points import check_enough
    from .profiler.repeat import TooSlow

    kept = list(measured)
    try:
        check_enough(kept)
    except ValueError as error:
        raise TooSlow(
            f"this machine is too slow or too busy: the {budget_s:.0f} s of --budget-s that steps had are enough for "
            f"{len(kept)} of {len(points)} points ({error}); allow a larger --budget-s, or shorter --prompt-lens, "
            "--cached and --chunk-sizes"
        ) from None
