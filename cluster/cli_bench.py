"""`tandem bench serve`: runs a load with progress, prints the table, saves the result."""

from __future__ import annotations

from .bench.report import RequestRecord
from .bench.run import BenchOptions, run_bench
from .bench.show import table
from .cli_display import Display


def bench_serve(options: BenchOptions, save_result: str | None) -> int:
    """Returns the exit code: 1 where no request came to its end."""
    import uvloop

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
