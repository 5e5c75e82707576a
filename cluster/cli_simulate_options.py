"""The options of `tandem simulate`, and the values of a scenario that they stand for. Those of a load are called as
`tandem bench serve` calls them, those of a cluster as `tandem serve` does, those of devices as `tandem plan` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .cli_promises import slo_classes
from .config_schema import ConfigError

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
    str | None,
    typer.Option("--profile", "--distserve", metavar="FILE", help="Of `tandem profile` or DistServe's simulator."),
]
Memory = Annotated[str | None, typer.Option(help="Of a device, e.g. 40GiB. Default: the hardware's.")]
Dtype = Annotated[str | None, typer.Option(help="Of weights and activations. Default: bfloat16.")]
Prefill = Annotated[int | None, typer.Option(help="Prefill workers. Default: 0.")]
PrefillTp = Annotated[int | None, typer.Option("--prefill-tp", help="Devices that split each layer of one.")]
PrefillPp = Annotated[int | None, typer.Option("--prefill-pp", help="Pipeline stages of one.")]
Decode = Annotated[int | None, typer.Option(help="Decode workers. Default: 0.")]
DecodeTp = Annotated[int | None, typer.Option("--decode-tp", help="Devices that split each layer of one.")]
DecodePp = Annotated[int | None, typer.Option("--decode-pp", help="Pipeline stages of one.")]
Mixed = Annotated[int | None, typer.Option(help="Workers that do both. Default: 0.")]
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
Goodput = Annotated[list[str] | None, typer.Option(metavar="METRIC:MS...", help="Promises: ttft:MS tpot:MS.")]
SloClass = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:SHARE:METRIC:MS...", help="A class of requests: chat:0.8:ttft:250:tpot:100. Repeatable."
    ),
]
Arrivals = Annotated[
    str | None, typer.Option(help="poisson, gamma, constant or trace. Default: gamma with --burstiness, else poisson.")
]
Burstiness = Annotated[float | None, typer.Option(help="Shape of the gamma arrivals; 1: Poisson.")]
RequestRate = Annotated[
    float | None, typer.Option(help="Requests per second. Default: --cluster's; with --arrivals trace the trace's own.")
]
RateScale = Annotated[float | None, typer.Option(help="Replay a trace this many times faster than recorded.")]
Seed = Annotated[int | None, typer.Option(help="Of arrivals and lengths. Default: 0.", min=0)]
Fail = Annotated[
    list[str] | None,
    typer.Option(metavar="WORKER@S[-S]", help="A worker fails, and perhaps comes back: decode-0@30-45. Repeatable."),
]
ResultFilename = Annotated[str | None, typer.Option(metavar="FILE", help="Default: by label and rate.")]
SaveRequests = Annotated[str | None, typer.Option(metavar="FILE", help="A line of CSV for every request.")]
SavePlot = Annotated[
    str | None, typer.Option(metavar="FILE", help="Latencies, queues and KV over time: .png, .svg or .pdf.")
]
SaveTrace = Annotated[
    str | None, typer.Option(metavar="FILE", help="Requests, steps and transfers on a time line, for ui.perfetto.dev.")
]

PATHS = {
    "model": "model",
    "hardware": "hardware",
    "profile": "profile",
    "gpus_per_node": "gpus_per_node",
    "intra_node": "intra_node",
    "inter_node": "inter_node",
    "memory": "memory_bytes",
    "dtype": "dtype",
    "prefill": "prefill.workers",
    "prefill_tp": "prefill.tensor_parallel",
    "prefill_pp": "prefill.pipeline_stages",
    "decode": "decode.workers",
    "decode_tp": "decode.tensor_parallel",
    "decode_pp": "decode.pipeline_stages",
    "mixed": "mixed.workers",
    "mixed_tp": "mixed.tensor_parallel",
    "mixed_pp": "mixed.pipeline_stages",
    "max_batched_tokens": "max_batched_tokens",
    "max_model_len": "max_model_len",
    "local_prefill_threshold": "router.local_prefill_threshold_tokens",
    "dataset_path": "workload.lengths",
    "num_prompts": "num_requests",
    "duration": "seconds",
    "random_input_len": "workload.input_tokens",
    "random_output_len": "workload.output_tokens",
    "random_range_ratio": "workload.range_ratio",
    "max_input_len": "workload.max_input_tokens",
    "max_output_len": "workload.max_output_tokens",
    "over_length": "workload.over_length",
    "arrivals": "workload.arrivals",
    "burstiness": "workload.burstiness",
    "request_rate": "rate",
    "rate_scale": "rate_scale",
    "seed": "seed",
    "config": "scenario",
    "cluster": "config",
    "no_refuse": "router.refuse",
    "fail": "failures",
    "goodput": "workload.slo_classes",
    "slo_class": "workload.slo_classes",
}
"""Where in a scenario each option stands."""
_ROLES = ("prefill", "decode", "mixed")
_RANDOM = ("random_input_len", "random_output_len", "random_range_ratio")
_MADE = ("config", "cluster", "no_refuse", "fail", "goodput", "slo_class")
"""Options whose values are made of what was given."""


def of_cluster(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of a cluster says. ValueError for workers that would stand beside its own unasked."""
    config, cluster = given["config"], given["cluster"]
    if cluster is None:
        return {}
    if config is not None:
        raise ValueError(f"cluster: {cluster!r} is not allowed beside --config; allowed: one of them, and flags")
    from .config_file import load_config
    from .sim.from_cluster import cluster_values

    values = cluster_values(load_config(cluster))
    theirs = [role for role in _ROLES if values[f"{role}.workers"]]
    for role in _ROLES:
        if given[role] and role not in theirs and any(given[one] is None for one in theirs):
            pools = " + ".join(f"{values[f'{one}.workers']} x {one}" for one in theirs)
            instead = " ".join(f"--{one} 0" for one in theirs)
            raise ConfigError(
                f"{role}.workers", given[role], f"0, or with {instead} or another number, as {cluster} has {pools}"
            )
    return values


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, by their place in a scenario."""
    found = {path: given[name] for name, path in PATHS.items() if given[name] is not None and name not in _MADE}
    if given["dataset_path"] is not None:  # in place of the file's random lengths
        found = {"workload.input_tokens": None, "workload.output_tokens": None, "workload.range_ratio": 0.0} | found
    elif any(given[name] is not None for name in _RANDOM):
        found = {"workload.lengths": None} | found
    if given["rate_scale"] is not None:
        found.setdefault("rate", None)
    if given["no_refuse"]:
        found["router.refuse"] = False
    if given["burstiness"] is not None and given["arrivals"] is None:
        found["workload.arrivals"] = "gamma"
    if given["fail"]:
        found["failures"] = [_failure(text) for text in given["fail"]]
    if classes := slo_classes(given):
        found["workload.slo_classes"] = classes
    if given["sweep"]:
        found.setdefault("rate", 1.0)  # where the sweep starts
    if given["arrivals"] == "trace":
        found.setdefault("rate", None)  # the trace's own, in place of a file's
    return found


def _failure(text: str) -> dict[str, Any]:
    """`decode-0@30-45` to a section of `failures`."""
    worker, _, times = text.rpartition("@")
    begin, _, end = times.partition("-")
    try:
        return {"worker": worker, "at_s": float(begin), "back_s": float(end) if end else None}
    except ValueError:
        raise ValueError(f"fail: {text!r} is not allowed; allowed: e.g. decode-0@30 or decode-0@30-45") from None
