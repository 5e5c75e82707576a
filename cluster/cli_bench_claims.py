"""`tandem bench disaggregation | batching | kv-waste`: claims of the papers, measured with this engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .bench.claims_disaggregation import Promise
    from .cli_display import Display

Profile = Annotated[
    str | None, typer.Option(metavar="FILE", help="DistServe's profiler-a100-80g.distserve.json, read in place.")
]
Dataset = Annotated[str, typer.Option(metavar="FILE", help="Trace whose lengths are used: CSV or Mooncake JSONL.")]
SaveResult = Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")]
Seed = Annotated[int, typer.Option(help="Of lengths and arrivals.")]


def disaggregation(
    dataset_path: Dataset,
    profile: Profile = None,
    device: Annotated[str, typer.Option(help="paced: A100s in make-believe; cpu: the real engine.")] = "paced",
    gpus: Annotated[int, typer.Option(help="Devices of each system; on cpu: workers.")] = 2,
    prefill_tp: Annotated[int, typer.Option(help="Tensor parallelism of the prefill workers: 1, 2 or 4.")] = 1,
    rates: Annotated[str, typer.Option(help="Requests/s to all of them, ascending. Default: by the device.")] = "",
    stair_s: Annotated[float, typer.Option(help="Seconds of arrivals at each rate; longer is surer.")] = 16.0,
    promise: Annotated[list[str] | None, typer.Option(help="TTFT:TPOT in ms; may be given again.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Of the mixed workers. Default: the best in virtual time.")] = None,
    only: Annotated[str | None, typer.Option(help="Systems whose label contains this.")] = None,
    time_scale: Annotated[float, typer.Option(help="Everything takes so many times as long.")] = 1.0,
    model: Annotated[str, typer.Option(help="cpu: which one.")] = "smollm2-135m",
    max_input_len: Annotated[int | None, typer.Option(help="Clips prompts; cpu: 512.")] = None,
    max_output_len: Annotated[int | None, typer.Option(help="Clips answers; cpu: 128.")] = None,
    seed: Seed = 0,
    save_plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the curves.")] = None,
    save_result: SaveResult = None,
) -> None:
    """Attainment against rate: prefill and decode pools, and the same devices colocated, under the same load."""
    import tempfile

    from .bench.claims_disaggregation import Staircase
    from .cli_display import Display

    paced = device == "paced"
    if device not in ("paced", "cpu"):
        raise ValueError(f"device: {device!r} is not allowed; allowed: paced, cpu")
    if paced and profile is None:
        raise ValueError("profile: is missing; allowed: DistServe's profiler-a100-80g.distserve.json")
    if paced and prefill_tp not in (1, 2, 4):
        raise ValueError(f"prefill_tp: {prefill_tp} is not allowed; allowed: 1, 2, 4")
    defaults = [1.0, 1.5, 2.0, 2.5, 3.0] if paced else [0.25, 0.5, 1.0, 2.0, 3.0]
    load = Staircase(
        dataset_path=dataset_path,
        rates=_numbers("rates", rates) if rates else tuple(rate * gpus for rate in defaults),
        stair_s=stair_s,
        promises=_promises(promise or (["250:100", "250:50"] if paced else ["1500:100"])),
        time_scale=time_scale if paced else 1.0,
        max_model_len=2048,
        max_input_tokens=max_input_len or (None if paced else 512),
        max_output_tokens=max_output_len or (None if paced else 128),
        seed=seed,
    )
    display = Display()
    facts = {"device": device, "gpus": gpus, "prefill_tp": prefill_tp, "profile": profile}
    with tempfile.TemporaryDirectory(prefix="tandem-claims-") as folder:
        if paced:
            assert profile is not None
            display.line("paced: nothing is computed, steps take the time that a profile of A100s says")
            systems = _paced_systems(display, load, folder, profile, gpus, prefill_tp, chunk)
        else:
            from .bench.claims_systems import cpu_systems

            systems = cpu_systems(model, gpus, kv_cache_bytes=512 * 2**20, budget=chunk or 512)
        chosen = [system for system in systems if only is None or only in system.label]
        if not chosen:
            raise ValueError(f"only: {only!r} is in no label; there are {', '.join(s.label for s in systems)}")
        _run(display, chosen, load, facts, save_plot, save_result)


def batching(
    dataset_path: Dataset,
    profile: Profile = None,
    num_prompts: Annotated[int, typer.Option(help="Requests of a run; a search takes about ten runs.")] = 300,
    batch_sizes: Annotated[str, typer.Option(help="Of request level; the best counts.")] = "8,16,32",
    time_limit_s: Annotated[float, typer.Option(help="No new batch size is searched after this.")] = 240.0,
    seed: Seed = 0,
    save_result: SaveResult = None,
) -> None:
    """Iteration-level against request-level batching at one latency, as Orca §6.2, in virtual time."""
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
    sizes = tuple(int(size) for size in _numbers("batch_sizes", batch_sizes))
    result = compare(
        lengths,
        distserve_profile(profile, DISTSERVE_MODEL),
        shape,
        seed=seed,
        batch_sizes=sizes,
        time_limit_s=time_limit_s,
        progress=display.line,
    )
    display.line(show(result))
    _save(display, save_result, asdict(result))


def kv_waste(
    dataset_path: Dataset,
    slots: Annotated[int, typer.Option(help="Tokens that the KV memory holds. Default: the paper's.")] = 15_700,
    block_sizes: Annotated[str, typer.Option(help="Of the paged systems.")] = "1,16,128",
    num_prompts: Annotated[int, typer.Option(help="Requests, all waiting from the start.")] = 1500,
    max_model_len: Annotated[int, typer.Option(help="Context; longer requests are dropped.")] = 2048,
    seed: Seed = 0,
    save_result: SaveResult = None,
) -> None:
    """Which share of the KV memory holds tokens: paged against contiguous, as PagedAttention's figure 2."""
    from dataclasses import asdict

    from .bench.claims_kv_waste import compare, show
    from .bench.claims_virtual import Job
    from .cli_display import Display

    display = Display()
    lengths = _lengths(display, dataset_path, num_prompts, max_model_len, seed)
    jobs = [Job(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output) for prompt, output in lengths]
    sizes = tuple(int(size) for size in _numbers("block_sizes", block_sizes))
    rows = compare(jobs, num_slots=slots, block_sizes=sizes, max_model_len=max_model_len)
    display.line(show(rows))
    _save(display, save_result, {"slots": slots, "rows": [asdict(row) for row in rows]})


def _paced_systems(
    display: Display, load: Any, folder: str, profile: str, gpus: int, prefill_tp: int, chunk: int | None
) -> tuple[Any, ...]:
    """Writes the workers' profiles into `folder`, and tunes the chunk of the colocated system where none is given."""
    from pathlib import Path

    from .bench.claims_systems import DISTSERVE_MODEL, KV_TOKENS, paced_systems, token_bytes, tuned_budget
    from .latency.profile import distserve_profile

    paths = []
    for parallel in (1, prefill_tp):
        path = Path(folder) / f"tp{parallel}.json"
        distserve_profile(profile, DISTSERVE_MODEL, tensor_parallel=parallel).scaled(load.time_scale).save(path)
        paths.append(path)
    memory = f"{KV_TOKENS[1]} tokens x {token_bytes()} bytes = {KV_TOKENS[1] * token_bytes() / 1e9:.1f} GB"
    display.line(f"KV memory of a GPU: {memory}")
    if chunk is None:
        first = load.promises[0]
        lengths = _lengths(display, load.dataset_path, 200, load.max_model_len, load.seed)
        rate = load.rates[len(load.rates) // 2] / gpus
        one = distserve_profile(profile, DISTSERVE_MODEL)
        chunk, attained = tuned_budget(lengths, one, rate=rate, ttft_s=first.ttft_s, tpot_s=first.tpot_s)
        tried = ", ".join(f"{budget}: {100 * share:.0f} %" for budget, share in attained.items())
        display.line(f"chunks of the mixed workers, tried in virtual time at {rate:g}/s a GPU: {tried}")
    return paced_systems(gpus, paths[0], budget=chunk, prefill_profile=paths[1], prefill_tp=prefill_tp)


def _run(
    display: Display, systems: Any, load: Any, facts: dict[str, Any], save_plot: str | None, save_result: str | None
) -> None:
    from pathlib import Path

    import uvloop

    from .bench.claims_disaggregation import as_json, run_system, show
    from .bench.plots import check_plot, plot_sweeps

    if save_plot is not None:
        check_plot(save_plot)
    results = [uvloop.run(run_system(system, load, display.line)) for system in systems]
    display.line(show(results, load))
    _save(display, save_result, as_json(results, load, facts))
    for place, promise in enumerate(load.promises if save_plot is not None else ()):
        assert save_plot is not None
        file = Path(save_plot)
        name = file if place == 0 else file.with_stem(f"{file.stem}-{place + 1}")
        plot_sweeps([result.sweeps[place] for result in results], name, title=f"{promise}")
        display.line(f"drawn       {name}")
    if any(result.void for result in results):
        raise typer.Exit(1)


def _lengths(display: Display, path: str, count: int, max_model_len: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of `count` requests of the trace that fit into the context."""
    from .bench.traces import draw_rows, fit_trace, read_trace

    fitted = fit_trace(read_trace(path), max_model_len=max_model_len)
    if fitted.dropped:
        whole = len(fitted.rows) + fitted.dropped
        display.line(f"{fitted.dropped} of {whole} requests are longer than {max_model_len} tokens and are dropped")
    return [(row.input_tokens, row.output_tokens) for row in draw_rows(fitted.rows, count, seed)]


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not allowed; allowed: numbers separated by commas") from None


def _promises(texts: list[str]) -> tuple[Promise, ...]:
    from .bench.claims_disaggregation import Promise

    found = []
    for text in texts:
        try:
            ttft_ms, tpot_ms = (float(part) for part in text.split(":"))
        except ValueError:
            ttft_ms = tpot_ms = 0.0
        if not (0 < ttft_ms < 1e7 and 0 < tpot_ms < 1e7):
            raise ValueError(f"promise: {text!r} is not allowed; allowed: TTFT:TPOT in milliseconds, above 0")
        found.append(Promise(ttft_s=ttft_ms / 1e3, tpot_s=tpot_ms / 1e3))
    return tuple(found)


def _save(display: Display, path: str | None, values: dict[str, Any]) -> None:
    import json
    from pathlib import Path

    if path is not None:
        Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        display.line(f"saved       {path}")
