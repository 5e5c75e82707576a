"""`tandem bench serve`: runs a load with progress, prints the table, saves, draws and traces the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Ca, Key

if TYPE_CHECKING:
    from .bench.options import BenchOptions
    from .bench.sweep_load import SweepPlan


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
    base_url: Annotated[
        str | None, typer.Option("--base-url", "--url", help="Default: http://127.0.0.1:8000; gRPC 127.0.0.1:8001.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="openai (completions), openai-chat or tandem-grpc. Default: chat for prompts, else openai."),
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Path. Default: the backend's.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the first that is served.")] = None,
    dataset_name: Annotated[str, typer.Option(help="prompts, random or trace.")] = "prompts",
    dataset_path: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="prompts: .jsonl[.gz]; trace: Mooncake .jsonl or CSV[.gz]. Default: ours."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests to send.")] = 100,
    output_len: Annotated[int, typer.Option(help="max_tokens of real prompts.")] = 64,
    random_input_len: Annotated[int, typer.Option(help="Tokens of a random prompt.")] = 1024,
    random_output_len: Annotated[int, typer.Option(help="Tokens of its answer.")] = 128,
    random_range_ratio: Annotated[float, typer.Option(help="Lengths vary by this share, 0 to below 1.")] = 0.0,
    max_input_len: Annotated[int | None, typer.Option(help="Cap on a trace's prompts, tokens.")] = None,
    max_output_len: Annotated[int | None, typer.Option(help="Cap on a trace's answers, tokens.")] = None,
    over_length: Annotated[str, typer.Option(help="What the caps do: clip or drop.")] = "clip",
    rate_scale: Annotated[float, typer.Option(help="Replay a trace this many times faster than recorded.")] = 1.0,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second; inf: all at once, or as the trace has it.")
    ] = math.inf,
    burstiness: Annotated[float, typer.Option(help="Shape of the gamma arrivals; 1: Poisson; inf: a clock.")] = 1.0,
    ramp_up_strategy: Annotated[str | None, typer.Option(help="linear or exponential, in place of a rate.")] = None,
    ramp_up_start_rps: Annotated[float | None, typer.Option(help="Rate of the first request.")] = None,
    ramp_up_end_rps: Annotated[float | None, typer.Option(help="Rate of the last request.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests under way at most; closes the loop.")] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="METRIC:MS...", help="Promises: ttft:MS tpot:MS e2el:MS.")
    ] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Metrics to report.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Comma-separated.")] = "90,99",
    num_warmups: Annotated[int, typer.Option(help="Requests beforehand, not counted.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Real prompts too are answered to the end.")] = False,
    extra_body: Annotated[str | None, typer.Option(metavar="JSON", help="More fields of each request's body.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Random token ids are below it. Default: the server's /tokenize is asked.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.", min=0)] = 0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the highest rate at the target, from --request-rate (or 1) on.")
    ] = False,
    attainment_target: Annotated[float, typer.Option(help="Share that must keep every promise.")] = 0.9,
    sweep_seeds: Annotated[int, typer.Option(help="Runs at each rate.")] = 3,
    sweep_duration: Annotated[float, typer.Option(help="Seconds that each run sends.")] = 60.0,
    sweep_rates: Annotated[
        str | None, typer.Option(help="Measure these, comma-separated, in place of a search.")
    ] = None,
    sweep_resolution: Annotated[float, typer.Option(help="Gap between kept and failed at which it ends.")] = 0.05,
    sweep_max_points: Annotated[int, typer.Option(help="Rates to try at most.")] = 12,
    sweep_timeout: Annotated[float, typer.Option(help="Seconds after which no further run starts.")] = 3600.0,
    label: Annotated[str | None, typer.Option(help="Name of the result, in files and pictures.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Added to the saved result.")] = None,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the result as JSON.")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With every request's times.")] = False,
    result_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where. Default: here.")] = None,
    result_filename: Annotated[str | None, typer.Option(metavar="FILE", help="Default: by label, rate, time.")] = None,
    save_plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.")] = None,
    save_trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Every request on a time line, for ui.perfetto.dev.")
    ] = None,
    server_events: Annotated[
        str | None, typer.Option(metavar="FILE", help="The router's `--events` file: its waterfalls join the trace.")
    ] = None,
    slo_class: Annotated[str | None, typer.Option(help="SLO class of the requests. Default: interactive.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Sent with every request, e.g. x-slo-ttft-ms=500.")
    ] = None,
    api_key: Key = None,
    ca: Ca = None,
) -> None:
    """Send an open-loop load to an OpenAI-style server or Tandem's gRPC; report TTFT, TPOT, attainment and goodput."""
    from .cli_bench_output import Output

    output = Output(
        save_result=save_result,
        detailed=save_detailed,
        result_dir=result_dir,
        result_filename=result_filename,
        plot=save_plot,
        trace=save_trace,
        server_events=server_events,
        sweep=sweep,
    )
    _allow_many_connections()
    given = context.params
    plan = _plan(given) if sweep else None
    options = _options(given)
    raise typer.Exit(_run_sweep(options, plan, output) if plan is not None else _run(options, output))


def _allow_many_connections() -> None:
    """An open loop has as many as the server lets pile up; shells commonly allow 1,024 files."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _options(given: Mapping[str, Any]) -> BenchOptions:
    """What was given becomes BenchOptions: fields of the same name, and those that are written otherwise."""
    from dataclasses import fields

    from .bench.options import BenchOptions, parse_headers, parse_pairs
    from .bench.report import parse_goodput
    from .cli_status import first_key
    from .tls import ClientTLS

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

    from .bench.report import RequestRecord
    from .bench.run import run_bench
    from .bench.show import table
    from .cli_display import Display

    output.check()
    display = Display()
    display.line(f"{options.num_prompts} requests {_pace(options)}, to {options.url}")
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
