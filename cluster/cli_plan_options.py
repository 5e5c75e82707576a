"""The options of `tandem plan`: those of a load are called as `tandem bench serve` calls them."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str | None, typer.Option("--config", metavar="FILE", help="problem.yaml; flags win over it.")]
Model = Annotated[str | None, typer.Option(help="Name, e.g. opt-13b, or a config.json. Default: the profile's.")]
Dtype = Annotated[str | None, typer.Option(help="Of weights and activations. Default: bfloat16.")]
Hardware = Annotated[str | None, typer.Option(help="Name, e.g. a100-80g, or a .yaml file. Default: the profile's.")]
Profile = Annotated[
    str | None,
    typer.Option("--profile", "--distserve", metavar="FILE", help="Of `tandem profile`, or of DistServe's simulator."),
]
Nodes = Annotated[int | None, typer.Option(help="Default: 1.")]
Gpus = Annotated[
    int | None, typer.Option("--gpus-per-node", help="Devices of a node (on CPU: workers). Default: the hardware's.")
]
IntraNode = Annotated[str | None, typer.Option(help="Link inside a node: a name, 300GB/s. Default: the hardware's.")]
InterNode = Annotated[str | None, typer.Option(help="Link between nodes: a name, 25Gbps. Default: the hardware's.")]
Memory = Annotated[str | None, typer.Option(help="Of a device, e.g. 40GiB. Default: the hardware's.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest context, tokens. Default: the model's.")]
Workload = Annotated[
    str | None,
    typer.Option(
        "--workload",
        "--dataset-path",
        metavar="FILE",
        help="Lengths, and perhaps arrivals: Mooncake .jsonl or CSV[.gz]; or a .yaml with the section `workload`.",
    ),
]
InputLen = Annotated[int | None, typer.Option("--random-input-len", help="Tokens of a prompt. Default: 512.")]
OutputLen = Annotated[int | None, typer.Option("--random-output-len", help="Tokens of its answer. Default: 128.")]
RangeRatio = Annotated[float | None, typer.Option("--random-range-ratio", help="Lengths vary by this share.")]
MaxInputLen = Annotated[int | None, typer.Option(help="Clips the prompts of a file.")]
MaxOutputLen = Annotated[int | None, typer.Option(help="Clips its answers.")]
Arrivals = Annotated[
    str | None, typer.Option(help="poisson, gamma, constant or trace. Default: gamma with --burstiness, else poisson.")
]
Burstiness = Annotated[float | None, typer.Option(help="Shape of the gamma arrivals; 1: Poisson.")]
Goodput = Annotated[list[str] | None, typer.Option(metavar="METRIC:MS...", help="Promises: ttft:MS tpot:MS.")]
SloClass = Annotated[
    list[str] | None,
    typer.Option(
        "--slo-class", metavar="NAME:SHARE:METRIC:MS...", help="One of several, e.g. chat:0.8:ttft:250:tpot:100."
    ),
]
Attainment = Annotated[
    float | None, typer.Option("--attainment-target", help="Share of a class that keeps both promises. Default: 0.9.")
]
RequestRate = Annotated[float | None, typer.Option(help="Requests/s to serve with as few GPUs as can be.")]
Price = Annotated[float | None, typer.Option(help="Of a GPU and hour, for the cost of a million tokens.")]
Seeds = Annotated[int | None, typer.Option(help="Workloads drawn; more narrow the interval. Default: 5.")]
Seed = Annotated[int | None, typer.Option(help="Of the first of them. Default: 0.")]
Processes = Annotated[int | None, typer.Option(help="That simulate. Default: one a processor.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds, then the best so far is the answer. Default: 120.")]
MaxTp = Annotated[int | None, typer.Option("--max-tp", help="Widest split of a layer. Default: a whole node.")]
MaxPp = Annotated[int | None, typer.Option("--max-pp", help="Most pipeline stages; 1: what can be served paced.")]
OutputFile = Annotated[str | None, typer.Option("--output", metavar="FILE", help="plan.yaml for `tandem serve`.")]
Choose = Annotated[str, typer.Option(help="Which plan is written: best, disaggregated or colocated.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="What the written plan's workers run on: cpu, cuda, or paced (computes nothing, rehearses GPUs). "
        "Default: by hardware."
    ),
]
Report = Annotated[str | None, typer.Option(metavar="FILE", help="Curves, the map of the search: .html or .png.")]
Validate = Annotated[
    bool,
    typer.Option(
        "--validate", help="Then start both best plans as processes here, and hold them against it (minutes)."
    ),
]
SaveResult = Annotated[str | None, typer.Option(metavar="FILE", help="Everything that was found, as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also what was refused, with the arithmetic.")]
