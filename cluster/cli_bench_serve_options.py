"""The options of `tandem bench serve`, named as `vllm bench serve` names them."""

from __future__ import annotations

from typing import Annotated

import typer

BaseUrl = Annotated[
    str | None, typer.Option("--base-url", "--url", help="Default: http://127.0.0.1:8000; gRPC 127.0.0.1:8001.")
]
Backend = Annotated[
    str | None,
    typer.Option(help="openai (completions), openai-chat or tandem-grpc. Default: chat for prompts, else openai."),
]
Endpoint = Annotated[str | None, typer.Option(help="Path. Default: the backend's.")]
Model = Annotated[str | None, typer.Option(help="Default: the first that is served.")]
DatasetName = Annotated[str, typer.Option(help="prompts, random or trace.")]
DatasetPath = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="prompts: .jsonl[.gz]; trace: Mooncake .jsonl or CSV[.gz]. Default: ours."),
]
NumPrompts = Annotated[int, typer.Option(help="Requests to send.")]
OutputLen = Annotated[int, typer.Option(help="max_tokens of real prompts.")]
RandomInputLen = Annotated[int, typer.Option(help="Tokens of a random prompt.")]
RandomOutputLen = Annotated[int, typer.Option(help="Tokens of its answer.")]
RandomRangeRatio = Annotated[float, typer.Option(help="Lengths vary by this share, 0 to below 1.")]
MaxInputLen = Annotated[int | None, typer.Option(help="Cap on a trace's prompts, tokens.")]
MaxOutputLen = Annotated[int | None, typer.Option(help="Cap on a trace's answers, tokens.")]
OverLength = Annotated[str, typer.Option(help="What the caps do: clip or drop.")]
RateScale = Annotated[float, typer.Option(help="Replay a trace this many times faster than recorded.")]
RequestRate = Annotated[float, typer.Option(help="Requests per second; inf: all at once, or as the trace has it.")]
Burstiness = Annotated[float, typer.Option(help="Shape of the gamma arrivals; 1: Poisson; inf: a clock.")]
RampUpStrategy = Annotated[str | None, typer.Option(help="linear or exponential, in place of a rate.")]
RampUpStartRps = Annotated[float | None, typer.Option(help="Rate of the first request.")]
RampUpEndRps = Annotated[float | None, typer.Option(help="Rate of the last request.")]
MaxConcurrency = Annotated[int | None, typer.Option(help="Requests under way at most; closes the loop.")]
Goodput = Annotated[list[str] | None, typer.Option(metavar="METRIC:MS...", help="Promises: ttft:MS tpot:MS e2el:MS.")]
PercentileMetrics = Annotated[str, typer.Option(help="Metrics to report.")]
MetricPercentiles = Annotated[str, typer.Option(help="Comma-separated.")]
NumWarmups = Annotated[int, typer.Option(help="Requests beforehand, not counted.")]
Temperature = Annotated[float | None, typer.Option(help="Default: the server's.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Real prompts too are answered to the end.")]
ExtraBody = Annotated[str | None, typer.Option(metavar="JSON", help="More fields of each request's body.")]
VocabSize = Annotated[
    int | None, typer.Option(help="Random token ids are below it. Default: the server's /tokenize is asked.")
]
Seed = Annotated[int, typer.Option(help="Of arrivals and prompts.", min=0)]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Find the highest rate at the target, from --request-rate (or 1) on.")
]
AttainmentTarget = Annotated[float, typer.Option(help="Share that must keep every promise.")]
SweepSeeds = Annotated[int, typer.Option(help="Runs at each rate.")]
SweepDuration = Annotated[float, typer.Option(help="Seconds that each run sends.")]
SweepRates = Annotated[str | None, typer.Option(help="Measure these, comma-separated, in place of a search.")]
SweepResolution = Annotated[float, typer.Option(help="Gap between kept and failed at which it ends.")]
SweepMaxPoints = Annotated[int, typer.Option(help="Rates to try at most.")]
SweepTimeout = Annotated[float, typer.Option(help="Seconds after which no further run starts.")]
Label = Annotated[str | None, typer.Option(help="Name of the result, in files and pictures.")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Added to the saved result.")]
SaveResult = Annotated[bool, typer.Option("--save-result", help="Write the result as JSON.")]
SaveDetailed = Annotated[bool, typer.Option("--save-detailed", help="With every request's times.")]
ResultDir = Annotated[str | None, typer.Option(metavar="DIR", help="Where. Default: here.")]
ResultFilename = Annotated[str | None, typer.Option(metavar="FILE", help="Default: by label, rate, time.")]
SavePlot = Annotated[str | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.")]
SaveTrace = Annotated[
    str | None, typer.Option(metavar="FILE", help="Every request on a time line, for ui.perfetto.dev.")
]
ServerEvents = Annotated[
    str | None, typer.Option(metavar="FILE", help="The router's `--events` file: its waterfalls join the trace.")
]
SloClass = Annotated[str | None, typer.Option(help="SLO class of the requests. Default: interactive.")]
Header = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Sent with every request, e.g. x-slo-ttft-ms=500.")
]
