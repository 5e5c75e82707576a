"""`tandem bench serve`: runs a load with progress, prints the table, saves the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import Ca, Key

if TYPE_CHECKING:
    from .bench.run import BenchOptions


def join_goodput(argv: Sequence[str]) -> list[str]:
    """`--goodput ttft:200 tpot:50`, as vLLM has it, to one option for each pair."""
    joined: list[str] = []
    taking = False
    for word in argv:
        if word == "--goodput":
            taking = True
            continue
        if taking and not word.startswith("-"):
            joined += ["--goodput", word]
            continue
        taking = False
        joined.append(word)
    return joined


def serve(
    base_url: Annotated[str, typer.Option("--base-url", "--url", help="The server.")] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        str, typer.Option(help="/v1/chat/completions or /v1/completions; random tokens go to the latter.")
    ] = "/v1/chat/completions",
    model: Annotated[str | None, typer.Option(help="Default: the first that is served.")] = None,
    dataset_name: Annotated[str, typer.Option(help="prompts, random or trace.")] = "prompts",
    dataset_path: Annotated[
        str | None, typer.Option(help=".jsonl or .jsonl.gz of prompts. Default: a dozen that ship with tandem.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests to send.")] = 100,
    output_len: Annotated[int, typer.Option(help="max_tokens of real prompts.")] = 64,
    random_input_len: Annotated[int, typer.Option(help="Tokens of a random prompt.")] = 1024,
    random_output_len: Annotated[int, typer.Option(help="Tokens of its answer.")] = 128,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf: all at once.")] = float("inf"),
    burstiness: Annotated[float, typer.Option(help="Shape of the gamma arrivals; 1: Poisson.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests under way at most; closes the loop.")] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="METRIC:MS...", help="Promises: ttft:MS tpot:MS e2el:MS.")
    ] = None,
    metric_percentiles: Annotated[str, typer.Option(help="Comma-separated.")] = "99",
    num_warmups: Annotated[int, typer.Option(help="Requests beforehand, not counted.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    save_result: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
    slo_class: Annotated[str | None, typer.Option(help="SLO class of the requests. Default: interactive.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Sent with every request, e.g. x-slo-ttft-ms=500.")
    ] = None,
    api_key: Key = None,
    ca: Ca = None,
) -> None:
    """Send an open-loop load and report TTFT, TPOT, attainment and goodput."""
    from .bench.report import parse_goodput
    from .bench.run import BenchOptions, parse_headers
    from .cli_status import first_key
    from .tls import ClientTLS

    try:
        percentiles = tuple(float(text) for text in metric_percentiles.split(","))
    except ValueError:
        raise ValueError(f"metric_percentiles: {metric_percentiles!r} is not allowed; allowed: e.g. 50,99") from None
    options = BenchOptions(
        base_url=base_url,
        model=model,
        endpoint=endpoint,
        dataset_name=dataset_name,
        dataset_path=dataset_path,
        num_prompts=num_prompts,
        output_len=output_len,
        random_input_len=random_input_len,
        random_output_len=random_output_len,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        goodput_ms=parse_goodput(goodput or ()),
        percentiles=percentiles,
        num_warmups=num_warmups,
        temperature=temperature,
        seed=seed,
        api_key=first_key(api_key),
        tls=ClientTLS.from_environment(ca),
        headers=parse_headers(header or (), slo_class),
    )
    raise typer.Exit(_run(options, save_result))


def _run(options: BenchOptions, save_result: str | None) -> int:
    """Returns the exit code: 1 where no request came to its end."""
    import uvloop

    from .bench.report import RequestRecord
    from .bench.run import run_bench
    from .bench.show import table
    from .cli_display import Display

    display = Display()
    display.line(f"{options.num_prompts} requests at {options.request_rate:g}/s to {options.base_url}")
    with display.count("load", options.num_prompts) as advance:

        def on_done(_: RequestRecord) -> None:
            advance()

        result = uvloop.run(run_bench(options, on_done))
    if result.facts["num_prompts"] < options.num_prompts:
        display.line(
            f"{result.facts['num_prompts']} were sent: the trace has no more that fit into the model's context"
        )
    display.line(table(result.summary, options.percentiles[-1]))
    errors = sorted({record.error for record in result.records if record.error})
    for error in errors[:5]:
        display.line(f"failed      {error}")
    if save_result is not None:
        result.save(save_result)
        display.line(f"saved       {save_result}")
    return 0 if result.summary.completed else 1
