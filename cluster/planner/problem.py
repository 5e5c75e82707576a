"""What a plan is asked for: model, devices, their links, the workload with its promises, and how long to search.

A `Problem` is plain data, checked when it is made, and can be sent to other processes; what it names (a model, a
hardware file, a profile, a trace) is read when asked for. From a YAML file, flags, or both (`load_problem`):

    model: opt-13b
    hardware: a100-80g
    gpus_per_node: 4
    inter_node: 25Gbps
    workload: {input_tokens: 755, output_tokens: 200, slo_classes: {chat: {ttft_s: 0.25, tpot_s: 0.1}}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..config_schema import ConfigError, Within, check, parse
from ..sim.device_spec import MAX_GPUS, DeviceSpec, read_tree
from ..workload.spec import Workload, WorkloadSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """How thoroughly is searched."""

    seeds: Annotated[int, Within(2, 100)] = 5
    """Workloads drawn; the 95 % interval is over them."""
    seed: Annotated[int, Within(0, 2**31)] = 0
    """Of the first; the others count up."""
    processes: Annotated[int | None, Within(1, 256)] = None
    """That simulate; None: as many as there are processors."""
    time_limit_s: Annotated[float, Within(0.0, 86_400.0, above=True)] = 120.0
    """After which the best of what was seen is the answer."""
    max_tensor_parallel: Annotated[int | None, Within(1, MAX_GPUS)] = None
    """Of a worker; None: as many devices as a node has."""
    max_pipeline_stages: Annotated[int | None, Within(1, MAX_GPUS)] = None
    """Of a worker; None: as many as make sense. 1: what the paced device can serve."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def chosen_processes(self) -> int:
        """At least one."""
        return self.processes or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(DeviceSpec):
    """See the module. ConfigError (a ValueError) names a field out of range."""

    nodes: Annotated[int, Within(1, MAX_GPUS)] = 1
    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    attainment: Annotated[float, Within(0.0, 1.0, above=True)] = 0.9
    """Share of a class's requests that must keep both promises."""
    rate: Annotated[float | None, Within(0.0, 1e9, above=True)] = None
    """Requests/s that the whole cluster must serve; None: as many as the devices can."""
    price_per_gpu_hour: Annotated[float | None, Within(0.0, 1e6, above=True)] = None
    search: SearchLimits = field(default_factory=SearchLimits)

    def __post_init__(self) -> None:
        DeviceSpec.__post_init__(self)
        if not any(kind.ttft_s or kind.tpot_s for kind in self.workload.classes.values()):
            self.facts()  # a name that nobody knows is the first thing to mend
            self.device_hardware()
            allowed = "a class with a promise on TTFT, TPOT or both (ttft_s, tpot_s): without one any plan does"
            raise ConfigError("workload.slo_classes", ", ".join(self.workload.slo_classes) or None, allowed)
        if self.gpus_per_node is not None and self.gpus > MAX_GPUS:
            raise ConfigError("nodes", self.nodes, f"at most {MAX_GPUS} devices in all, these are {self.gpus}")

    @property
    def gpus(self) -> int:
        """Devices in all; reads the hardware's file where `gpus_per_node` is None."""
        return self.nodes * self.node_gpus

    def requests(self) -> Workload:
        """The workload with its file read, held to the longest context."""
        return self.fitted(self.workload, self.context_tokens(self.facts()))


def load_problem(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Problem:
    """From a YAML file of Problem's fields, and values by dotted path that win over it (`{"workload.lengths": …}`). A
    plan's file is one too: the problem that it answers is asked again.

    Links may be names, `25Gbps`, `300GB/s` or sections. Files that the YAML names are looked for beside it first.
    Raises ConfigError naming field, value and what is allowed.
    """
    return parse(Problem, read_tree(path, "problem", overrides, inside=_asked))


def _asked(data: object) -> object:
    """The problem in a file: all of it, or what a plan's file says that it answers."""
    if not isinstance(data, Mapping) or not {"plan", "router", "engine"} & data.keys():
        return data
    plan = data.get("plan")
    problem = plan.get("problem") if isinstance(plan, Mapping) else None
    if not problem:
        allowed = "a problem's file, or a plan's: this is a cluster's, which does not say what it was planned for"
        raise ConfigError("plan.problem", None, allowed)
    return problem
