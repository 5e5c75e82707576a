"""`tandem bench batching | kv-waste`: claims of the papers, measured with this engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .bench.claims_batching import BatchingResult
    from .bench.claims_batching_served import ServedRow
    from .bench.claims_virtual import EngineShape
    from .cli_display import Display
    from .latency.profile import StepProfile

Profile = Annotated[
    str | None, typer.Option(metavar="FILE", help="DistServe's profiler-a100-80g.distserve.json, read in place.")
]
Dataset = Annotated[str, typer.Option(metavar="FILE", help="Trace whose lengths are used: CSV or Mooncake JSONL.")]
SaveResult = Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")]
Seed = Annotated[int, typer.Option(help="Of lengths and arrivals.")]


def batching(
    dataset_path: Dataset,
    profile: Profile = None,
    num_prompts: Annotated[int, typer.Option(help="Requests of a run; a search takes about ten runs.")] = 300,
    batch_sizes: Annotated[str, typer.Option(help="Of request level; the best counts.")] = "8,16,32",
    time_limit_s: Annotated[float, typer.Option(help="No new batch size is searched after this.")] = 240.0,
    served_s: Annotated[
        float,
        typer.Option(help="Then look at the rates found with a real router and worker, for so many seconds each."),
    ] = 0.0,
    seed: Seed = 0,
    save_result: SaveResult = None,
) -> None:
    """Iteration-level against request-level batching (Orca).

    At one latency, as Orca §6.2, in virtual time.
    """
    from dataclasses import asdict

    from .bench.claims_batching import compare, show
    from .bench.claims_systems import BLOCK_SIZE, DISTSERVE_MODEL, KV_TOKENS
    from .bench.claims_virtual import EngineShape
    from .cli_display import Display
    from .latency.profile import distserve_profile

    if profile is None:
        raise ValueError("profile: is missing; allowed: DistServe's profiler-a100-80g.distserve.json")
    display = Display()
    shape = EngineShape(num_blocks=KV_TOKENS[1] // BLOCK_SIZE, block_size=BLOCK_SIZE)
    lengths = _lengths(display, dataset_path, num_prompts, shape.max_model_len, seed)
    steps = distserve_profile(profile, DISTSERVE_MODEL)
    sizes = tuple(int(size) for size in numbers("batch_sizes", batch_sizes))
    result = compare(
        lengths,
        steps,
        shape,
        seed=seed,
        batch_sizes=sizes,
        time_limit_s=time_limit_s,
        progress=display.line,
    )
    display.line(show(result))
    served = _served(display, result, lengths, steps, shape, served_s, seed) if served_s > 0 else []
    save(display, save_result, asdict(result) | {"served": [asdict(row) for row in served]})


def _served(
    display: Display,
    result: BatchingResult,
    lengths: Sequence[tuple[int, int]],
    profile: StepProfile,
    shape: EngineShape,
    seconds: float,
    seed: int,
) -> list[ServedRow]:
    """Iteration level, and request level that streams: the two that a client can see, at the rates found."""
    import signal
    import sys
    import tempfile
    from pathlib import Path

    import uvloop

    from .bench.claims_batching_served import serve_row, show_served

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    rows = []
    with tempfile.TemporaryDirectory(prefix="tandem-claims-") as folder:
        for row in (result.rows[0], result.rows[2]):
            if row.rate == 0:
                display.line(f"{row.system}: no rate keeps the bound; nothing to look at")
                continue
            running = serve_row(
                row, lengths, profile, shape, Path(folder), seconds=seconds, seed=seed, say=display.line
            )
            rows.append(uvloop.run(running))
    display.line(show_served(rows))
    return rows


def kv_waste(
    dataset_path: Dataset,
    slots: Annotated[int, typer.Option(help="Tokens that the KV memory holds. Default: the paper's.")] = 15_700,
    block_sizes: Annotated[str, typer.Option(help="Of the paged systems.")] = "1,16,128",
    num_prompts: Annotated[int, typer.Option(help="Requests, all waiting from the start.")] = 1500,
    max_model_len: Annotated[int, typer.Option(help="Context; longer requests are dropped.")] = 2048,
    seed: Seed = 0,
    save_result: SaveResult = None,
) -> None:
    """Which share of the KV memory holds tokens.

    Paged against contiguous, as PagedAttention's figure 2.
    """
    from dataclasses import asdict

    from .bench.claims_kv_waste import compare, show
    from .bench.claims_virtual import Job
    from .cli_display import Display

    display = Display()
    lengths = _lengths(display, dataset_path, num_prompts, max_model_len, seed)
    jobs = [Job(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output) for prompt, output in lengths]
    sizes = tuple(int(size) for size in numbers("block_sizes", block_sizes))
    rows = compare(jobs, num_slots=slots, block_sizes=sizes, max_model_len=max_model_len)
    display.line(show(rows))
    save(display, save_result, {"slots": slots, "rows": [asdict(row) for row in rows]})


def _lengths(display: Display, path: str, count: int, max_model_len: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of `count` requests of the trace that fit into the context."""
    from .workload.traces import draw_rows, fit_trace, read_trace

    fitted = fit_trace(read_trace(path), max_model_len=max_model_len)
    if fitted.dropped:
        whole = len(fitted.rows) + fitted.dropped
        display.line(f"{fitted.dropped} of {whole} requests are longer than {max_model_len} tokens and are dropped")
    return [(row.input_tokens, row.output_tokens) for row in draw_rows(fitted.rows, count, seed)]


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Comma-separated. ValueError naming the option."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not allowed; allowed: numbers separated by commas") from None


def save(display: Display, path: str | None, values: dict[str, Any]) -> None:
    """Writes JSON where a file was named. OSError."""
    import json
    from pathlib import Path

    if path is not None:
        Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        display.line(f"saved       {path}")
