"""`tandem bench router`: one router process against workers that answer at once."""

from __future__ import annotations

from typing import Annotated

import typer


def router(
    model: Annotated[str, typer.Option(help="Whose tokenizer the router uses.")] = "dummy:tiny-llama",
    seconds: Annotated[float, typer.Option(help="Of every row.")] = 4.0,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 64,
    output_tokens: Annotated[str, typer.Option(help="Lengths of answers, separated by commas.")] = "2,16,256",
    doors: Annotated[str, typer.Option(help="http, grpc or both.")] = "http,grpc",
    step_ms: Annotated[float, typer.Option(help="Between two tokens of a sequence.")] = 1.0,
    processes: Annotated[int, typer.Option(help="Router processes behind one port (Linux).")] = 1,
    save_result: Annotated[str | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
) -> None:
    """Measure a router against workers that answer at once.

    Added TTFT, requests/s, tokens/s, processor time.
    """
    import uvloop

    from .bench.router import RouterBenchOptions, run_router_bench, show
    from .cli_display import Display

    try:
        lengths = tuple(int(text) for text in output_tokens.split(","))
    except ValueError:
        raise ValueError(f"output_tokens: {output_tokens!r} is not allowed; allowed: e.g. 2,16,256") from None
    options = RouterBenchOptions(
        model=model,
        seconds=seconds,
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        output_tokens=lengths,
        doors=tuple(doors.split(",")),
        step_ms=step_ms,
        processes=processes,
    )
    display = Display()
    result = uvloop.run(run_router_bench(options, lambda what: display.line(f"measuring   {what}")))
    display.line(show(result))
    if save_result is not None:
        result.save(save_result)
        display.line(f"saved       {save_result}")
    raise typer.Exit(1 if any(row.failed for row in result.rows) else 0)
