"""`tandem bench serve`: runs a load with progress, prints the table, saves, draws and traces the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from .cli_bench_serve_options import (
    AttainmentTarget,
    Backend,
    BaseUrl,
    Burstiness,
    DatasetName,
    DatasetPath,
    Endpoint,
    ExtraBody,
    Goodput,
    Header,
    IgnoreEos,
    Label,
    MaxConcurrency,
    MaxInputLen,
    MaxOutputLen,
    Metadata,
    MetricPercentiles,
    Model,
    NumPrompts,
    NumWarmups,
    OutputLen,
    OverLength,
    PercentileMetrics,
    RampUpEndRps,
    RampUpStartRps,
    RampUpStrategy,
    RandomInputLen,
    RandomOutputLen,
    RandomRangeRatio,
    RateScale,
    RequestRate,
    ResultDir,
    ResultFilename,
    SaveDetailed,
    SavePlot,
    SaveResult,
    SaveTrace,
    Seed,
    ServerEvents,
    SloClass,
    Sweep,
    SweepDuration,
    SweepMaxPoints,
    SweepRates,
    SweepResolution,
    SweepSeeds,
    SweepTimeout,
    Temperature,
    VocabSize,
)
from .cli_options import Ca, Key
from .cli_typed import as_typed, check_sweep_options, given_options

if TYPE_CHECKING:
    from .bench.options import BenchOptions
    from .bench.sweep_load import SweepPlan


_OF_DATASETS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("random_input_len", "random_output_len", "random_range_ratio"), ("random",)),
    (("output_len",), ("prompts",)),
    (("max_input_len", "max_output_len", "over_length", "rate_scale"), ("trace",)),
    (("vocab_size",), ("random", "trace")),
)
"""Options that only some datasets heed."""


def join_goodput(argv: Sequence[str]) -> list[str]:
    """`--goodput ttft:200 tpot:50`, as vLLM has it, to one option for each pair."""
    joined: list[str] = []
    taking = False
    for word in argv:
        if taking and not word.startswith("-"):
            joined += [word] if joined[-1] == "--goodput" else ["--goodput", word]
            continue
        taking = word == "--goodput"
        joined.append(word)
    return joined


def serve(
    context: typer.Context,
    base_url: BaseUrl = None,
    backend: Backend = None,
    endpoint: Endpoint = None,
    model: Model = None,
    dataset_name: DatasetName = "prompts",
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = 100,
    output_len: OutputLen = 64,
    random_input_len: RandomInputLen = 1024,
    random_output_len: RandomOutputLen = 128,
    random_range_ratio: RandomRangeRatio = 0.0,
    max_input_len: MaxInputLen = None,
    max_output_len: MaxOutputLen = None,
    over_length: OverLength = "clip",
    rate_scale: RateScale = 1.0,
    request_rate: RequestRate = math.inf,
    burstiness: Burstiness = 1.0,
    ramp_up_strategy: RampUpStrategy = None,
    ramp_up_start_rps: RampUpStartRps = None,
    ramp_up_end_rps: RampUpEndRps = None,
    max_concurrency: MaxConcurrency = None,
    goodput: Goodput = None,
    percentile_metrics: PercentileMetrics = "ttft,tpot,itl,e2el",
    metric_percentiles: MetricPercentiles = "90,99",
    num_warmups: NumWarmups = 1,
    temperature: Temperature = None,
    ignore_eos: IgnoreEos = False,
    extra_body: ExtraBody = None,
    vocab_size: VocabSize = None,
    seed: Seed = 0,
    sweep: Sweep = False,
    attainment_target: AttainmentTarget = 0.9,
    sweep_seeds: SweepSeeds = 3,
    sweep_duration: SweepDuration = 60.0,
    sweep_rates: SweepRates = None,
    sweep_resolution: SweepResolution = 0.05,
    sweep_max_points: SweepMaxPoints = 12,
    sweep_timeout: SweepTimeout = 3600.0,
    label: Label = None,
    metadata: Metadata = None,
    save_result: SaveResult = False,
    save_detailed: SaveDetailed = False,
    result_dir: ResultDir = None,
    result_filename: ResultFilename = None,
    save_plot: SavePlot = None,
    save_trace: SaveTrace = None,
    server_events: ServerEvents = None,
    slo_class: SloClass = None,
    header: Header = None,
    api_key: Key = None,
    ca: Ca = None,
) -> None:
    """Send an open-loop load to a running server.

    An OpenAI-style one or Tandem's gRPC; reports TTFT, TPOT, attainment and goodput.
    """
    with as_typed(context):
        raise typer.Exit(_measured(context, context.params))


def _measured(context: typer.Context, given: dict[str, Any]) -> int:
    """Returns the exit code. `given`: the values of all options."""
    from .cli_bench_output import Output

    output = Output(
        save_result=given["save_result"],
        detailed=given["save_detailed"],
        result_dir=given["result_dir"],
        result_filename=given["result_filename"],
        plot=given["save_plot"],
        trace=given["save_trace"],
        server_events=given["server_events"],
        sweep=given["sweep"],
    )
    _allow_many_connections()
    plan = _plan(given) if given["sweep"] else None
    options = _options(given)
    _check_effects(context)
    return _run_sweep(options, plan, output) if plan is not None else _run(options, output)


def _check_effects(context: typer.Context) -> None:
    """ValueError for an option that was given and changes nothing."""
    given, dataset = given_options(context), context.params["dataset_name"]
    for names, datasets in _OF_DATASETS:
        for name in names:
            if name in given and dataset not in datasets:
                allowed = " or ".join(f"--dataset-name {one}" for one in datasets)
                raise ValueError(f"{name}: has no effect with --dataset-name {dataset}; allowed with {allowed}")
    check_sweep_options(context)


def _allow_many_connections() -> None:
    """An open loop has as many as the server lets pile up; shells commonly allow 1,024 files."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _options(given: Mapping[str, Any]) -> BenchOptions:
    """What was given becomes BenchOptions: fields of the same name, and those that are written otherwise."""
    from dataclasses import fields
    from pathlib import Path

    from .bench.options import BenchOptions, parse_headers, parse_pairs
    from .cli_status import first_key
    from .tls import ClientTLS
    from .workload.report import parse_goodput

    if given["ca"] is not None and not Path(given["ca"]).is_file():
        raise ValueError(f"ca: {given['ca']!r} is not allowed; allowed: a file of certificates")
    same = {field.name for field in fields(BenchOptions)} & given.keys()
    values = {name: given[name] for name in same} | {
        "goodput_ms": parse_goodput(given["goodput"] or ()),
        "percentiles": _numbers("metric_percentiles", given["metric_percentiles"], "50,99"),
        "percentile_metrics": tuple(name.strip() for name in given["percentile_metrics"].split(",")),
        "extra_body": _json_object("extra_body", given["extra_body"]),
        "metadata": parse_pairs("metadata", given["metadata"] or ()),
        "headers": parse_headers(given["header"] or (), given["slo_class"]),
        "api_key": first_key(given["api_key"]),
        "tls": ClientTLS.from_environment(given["ca"]),
    }
    if given["sweep"]:
        values["request_rate"] = math.inf  # where the sweep starts; the plan has it
    return BenchOptions(**values)


def _plan(given: Mapping[str, Any]) -> SweepPlan:
    from .bench.sweep_load import SweepPlan

    rate = given["request_rate"]
    rates = given["sweep_rates"]
    return SweepPlan(
        target=given["attainment_target"],
        seeds=given["sweep_seeds"],
        duration_s=given["sweep_duration"],
        start_rate=1.0 if math.isinf(rate) else rate,
        rates=() if rates is None else _numbers("sweep_rates", rates, "1,2,4"),
        resolution=given["sweep_resolution"],
        max_points=given["sweep_max_points"],
        timeout_s=given["sweep_timeout"],
    )


def _numbers(name: str, text: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not allowed; allowed: e.g. {example}") from None


def _json_object(name: str, text: str | None) -> dict[str, Any]:
    import orjson

    try:
        found = {} if text is None else orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: {text!r} is not allowed; allowed: a JSON object")
    return found


def _run(options: BenchOptions, output: Any) -> int:
    """Returns the exit code: 1 where no request came to its end, 130 where Ctrl-C ended the run."""
    import uvloop

    from .bench.run import run_bench
    from .bench.show import counted, table
    from .cli_display import Display
    from .workload.report import RequestRecord

    output.check()
    display = Display()
    display.line(f"{counted(options.num_prompts, 'request')} {_pace(options)}, to {options.url}")
    with display.count("load", options.num_prompts) as advance:

        def on_done(_: RequestRecord) -> None:
            advance()

        result = uvloop.run(run_bench(options, on_done))
    for note in result.notes:
        display.line(f"note: {note}")
    if result.interrupted and not result.records:
        return result.exit_code
    closed = options.max_concurrency is not None
    display.line(table(result.summary, options.percentiles, options.percentile_metrics, closed_loop=closed))
    errors = sorted({record.error for record in result.records if record.error})
    for error in errors[:5]:
        display.line(f"failed      {error}")
    for line in output.write_run(result, options):
        display.line(line)
    return result.exit_code or (0 if result.summary.completed else 1)


def _pace(options: BenchOptions) -> str:
    if options.ramp_up_strategy is not None:
        return f"at {options.ramp_up_start_rps:g} to {options.ramp_up_end_rps:g}/s"
    if not math.isinf(options.request_rate):
        return f"at {options.request_rate:g}/s"
    faster = "" if options.rate_scale == 1.0 else f", {options.rate_scale:g} times faster"
    return f"as recorded{faster}" if options.dataset_name == "trace" else "all at once"


def _run_sweep(options: BenchOptions, plan: SweepPlan, output: Any) -> int:
    """Returns the exit code: 1 where no request came to its end, 130 where Ctrl-C ended the sweep."""
    import uvloop

    from .bench.show import SWEEP_HEAD, promised, sweep_row, sweep_verdict
    from .bench.sweep_load import check_sweep, run_sweep
    from .cli_display import Display

    output.check()
    check_sweep(options)
    display = Display()
    display.line(
        f"{plan.target:.0%} of requests to keep {promised(options.goodput_ms)}; "
        f"{plan.seeds} runs of {plan.duration_s:g} s at each rate, to {options.url}"
    )
    display.line(SWEEP_HEAD)
    result = uvloop.run(run_sweep(options, plan, lambda point: display.line(sweep_row(point, plan.target))))
    if result.exit_code:
        display.line("PARTIAL: interrupted; the point that was being measured is left out")
        if not result.points:
            return result.exit_code
    display.line(f"\n{sweep_verdict(result)}")
    for line in output.write_sweep(result):
        display.line(line)
    runs = [run for point in result.points for run in point.runs]
    return result.exit_code or (0 if any(run.failed < run.requests for run in runs) else 1)
