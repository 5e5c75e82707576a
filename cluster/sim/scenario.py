"""A simulation as it is written down: model, hardware or a measured profile, workers, links, router, workload, seed.

    scenario = read_scenario("split.yaml", {"rate": 4.0, "decode.workers": 2})

What is simulated then is in `compose`. The file's keys are Scenario's; `prefill`, `decode` and `mixed` are counts or
sections. ConfigError (a ValueError) names field, value and what is allowed. Pure but for reading the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..config_schema import Bytes, ConfigError, OneOf, Text, Within, check, parse
from ..types import Role
from ..workload.spec import Arrivals, WorkloadSpec
from .device_spec import DeviceSpec, read_tree

DEFAULT_REQUESTS = 1000
_POOLS = tuple(role.value for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
Count = Annotated[int, Within(1, 2**20)]
Seconds = Annotated[float, Within(0.0, 60.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSection:
    """Workers of one role, all alike; its names are those of `engine` in a cluster's configuration."""

    workers: Annotated[int, Within(0, 1024)] = 1
    tensor_parallel: Annotated[int, Within(1, 1024)] = 1
    pipeline_stages: Annotated[int, Within(1, 1024)] = 1
    node: Annotated[str | None, Text()] = None
    """Where all of them stand; None: nodes are filled one after another."""
    max_batched_tokens: Annotated[int | None, Within(1, 2**20)] = None
    """None: the scenario's."""
    max_running: Count = 256
    max_waiting: Count = 256
    batching: Annotated[str, OneOf(("iteration", "request", "prompts_alone"))] = "iteration"
    """`prompts_alone`: never a prompt and a decode row in one step."""
    kv_cache_bytes: Annotated[int | None, Bytes(), Within(1, 2**50)] = None
    """KV memory of a worker; None: what weights and activations leave of its devices."""
    profile: Annotated[str | None, Text()] = None
    """A step profile of this split; None: what the scenario's devices take for it."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection:
    """The router; what has a namesake in `RouterConfig` has its meaning. `overhead_s` and `rpc_s` come to about what
    the first token of a split request was measured to lose (BENCHMARKS.md).
    """

    max_waiting: Count = 256
    refuse: bool = True
    """Whether a request beyond `max_waiting`, or whose promise cannot be kept any more, is refused at the door."""
    overhead_s: Seconds = 0.001
    """Its work on a request before admission."""
    rpc_s: Seconds = 0.0002
    """A message's way to a worker or back."""
    local_prefill_threshold_tokens: Annotated[int, Within(0, 2**31 - 1)] = 0
    """Prompts with fewer uncached tokens are prefilled by the decode worker; 0: off."""
    heartbeat_s: Annotated[float, Within(0.001, 60.0)] = 0.25
    heartbeat_timeout_s: Annotated[float, Within(0.0, 86_400.0, above=True)] = 1.0
    worker_lost_after_s: Annotated[float, Within(0.0, 86_400.0, above=True)] = 10.0
    unready_wait_s: Annotated[float, Within(0.0, 86_400.0, above=True)] = 10.0
    max_attempts: Annotated[int, Within(1, 100)] = 3
    request_timeout_s: Annotated[float, Within(0.0, 86_400.0, above=True)] = 600.0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureSection:
    """A worker that fails: everything that it held and ran is lost."""

    worker: Annotated[str, Text()]
    """`decode-0`."""
    at_s: Annotated[float, Within(0.0)]
    back_s: Annotated[float | None, Within(0.0)] = None
    """When it is there again, empty; None: never."""
    silent: bool = False
    """Its machine is gone, and the router finds out by the heartbeats that do not come; else its streams break."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario(DeviceSpec):
    """Everything that a simulation depends on."""

    prefix_cache: bool = True
    max_batched_tokens: Count = 2048
    """Of a step of any worker: what prompts are cut into."""
    prefill: PoolSection = field(default_factory=lambda: PoolSection(workers=0))
    decode: PoolSection = field(default_factory=lambda: PoolSection(workers=0))
    mixed: PoolSection = field(default_factory=lambda: PoolSection(workers=0))
    router: RouterSection = field(default_factory=RouterSection)
    failures: tuple[FailureSection, ...] = ()
    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    rate: Annotated[float | None, Within(0.0, 1e6, above=True)] = None
    """Requests per second; None: as recorded."""
    rate_scale: Annotated[float, Within(0.0, 1e6, above=True)] = 1.0
    """How many times faster than recorded, where there is no `rate`."""
    seconds: Annotated[float | None, Within(0.0, 1e7, above=True)] = None
    """For how long requests come."""
    num_requests: Annotated[int | None, Within(1, 2**20)] = None
    """None: those of `seconds`, else all of a replay, else DEFAULT_REQUESTS."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        DeviceSpec.__post_init__(self)
        if self.rate_scale != 1.0 and (self.rate is not None or self.workload.arrivals is not Arrivals.TRACE):
            raise ConfigError(
                "rate_scale", self.rate_scale, "1, or any where arrivals are a trace's and rate is not given"
            )
        counts = {name: getattr(self, name).workers for name in _POOLS}
        for name in () if counts["mixed"] else ("prefill", "decode"):
            if not counts[name]:
                raise ConfigError(f"{name}.workers", 0, "at least 1, or mixed workers")

    @property
    def pools(self) -> tuple[tuple[Role, PoolSection], ...]:
        """Those that have workers."""
        return tuple((Role(name), pool) for name in _POOLS if (pool := getattr(self, name)).workers)


def read_scenario(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario in a YAML file (None: an empty one), with values by dotted path that win over it: see
    `device_spec.read_tree`.
    """
    tree = read_tree(path, "scenario", overrides, _POOLS)
    failures = tree.get("failures")
    if isinstance(failures, list):
        tree["failures"] = [parse(FailureSection, one, f"failures[{place}]") for place, one in enumerate(failures)]
    return parse(Scenario, tree)
