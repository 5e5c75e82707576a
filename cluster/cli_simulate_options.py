"""The options of `tandem simulate`: those of a load are called as `tandem bench serve` calls them, those of a cluster
as `tandem serve` does.
"""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str | None, typer.Option("--config", metavar="FILE", help="scenario.yaml; flags win over it.")]
Cluster = Annotated[
    str | None, typer.Option("--cluster", metavar="FILE", help="cluster.yaml or plan.yaml: its workers and router.")
]
Model = Annotated[str | None, typer.Option(help="Name, e.g. opt-13b, or a config.json. Default: the profile's.")]
Hardware = Annotated[str | None, typer.Option(help="Name, e.g. a100-80g, or a .yaml file. Default: the profile's.")]
GpusPerNode = Annotated[int | None, typer.Option(help="Default: the hardware's.")]
IntraNode = Annotated[
    str | None, typer.Option(help="Link inside a node, e.g. nvlink or 300GB/s. Default: the hardware's.")
]
InterNode = Annotated[str | None, typer.Option(help="Link between nodes, e.g. 25Gbps. Default: the hardware's.")]
Profile = Annotated[
    str | None, typer.Option(metavar="FILE", help="Of `tandem profile` or DistServe's simulator: what steps take.")
]
Dtype = Annotated[str | None, typer.Option(help="Of weights and activations. Default: bfloat16.")]
Prefill = Annotated[int | None, typer.Option(help="Prefill workers. Default: 0.")]
PrefillTp = Annotated[int | None, typer.Option("--prefill-tp", help="Devices that split each layer of one.")]
PrefillPp = Annotated[int | None, typer.Option("--prefill-pp", help="Pipeline stages of one.")]
Decode = Annotated[int | None, typer.Option(help="Decode workers. Default: 0.")]
DecodeTp = Annotated[int | None, typer.Option("--decode-tp", help="Devices that split each layer of one.")]
DecodePp = Annotated[int | None, typer.Option("--decode-pp", help="Pipeline stages of one.")]
Mixed = Annotated[int | None, typer.Option(help="Workers that do both, alone.")]
MixedTp = Annotated[int | None, typer.Option("--mixed-tp", help="Devices that split each layer of one.")]
MixedPp = Annotated[int | None, typer.Option("--mixed-pp", help="Pipeline stages of one.")]
MaxBatchedTokens = Annotated[int | None, typer.Option(help="Of a step of a worker. Default: 2048.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest context, tokens. Default: the model's.")]
LocalPrefillThreshold = Annotated[
    int | None, typer.Option(help="Prompts with fewer uncached tokens skip the prefill pool. Default: 0, off.")
]
NoRefuse = Annotated[bool, typer.Option("--no-refuse", help="Requests whose promise is lost wait all the same.")]
DatasetPath = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Lengths, and perhaps arrivals: Mooncake .jsonl or CSV[.gz]. Default: random."),
]
NumPrompts = Annotated[int | None, typer.Option(help="Requests that come. Default: 1000, or all of a replay.")]
Duration = Annotated[float | None, typer.Option(help="Virtual seconds for which they come.")]
RandomInputLen = Annotated[int | None, typer.Option(help="Tokens of a random prompt. Default: 512.")]
RandomOutputLen = Annotated[int | None, typer.Option(help="Tokens of its answer. Default: 128.")]
RandomRangeRatio = Annotated[float | None, typer.Option(help="Lengths vary by this share, 0 to below 1.")]
OverLength = Annotated[str | None, typer.Option(help="What the caps do: clip or drop. Default: clip.")]
Arrivals = Annotated[
    str | None, typer.Option(help="poisson, gamma, constant or trace. Default: gamma with --burstiness, else poisson.")
]
Burstiness = Annotated[float | None, typer.Option(help="Shape of the gamma arrivals; 1: Poisson.")]
RequestRate = Annotated[float | None, typer.Option(help="Requests per second. Default: as the trace has it.")]
RateScale = Annotated[float | None, typer.Option(help="Replay a trace this many times faster than recorded.")]
Seed = Annotated[int | None, typer.Option(help="Of arrivals and lengths. Default: 0.", min=0)]
Fail = Annotated[
    list[str] | None,
    typer.Option(metavar="WORKER@S[-S]", help="A worker fails, and perhaps comes back: decode-0@30-45. Repeatable."),
]
SaveRequests = Annotated[str | None, typer.Option(metavar="FILE", help="A line of CSV for every request.")]
SavePlot = Annotated[
    str | None, typer.Option(metavar="FILE", help="Latencies, queues and KV over time: .png, .svg or .pdf.")
]
SaveTrace = Annotated[
    str | None, typer.Option(metavar="FILE", help="Requests, steps and transfers on a time line, for ui.perfetto.dev.")
]
