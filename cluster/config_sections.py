"""Sections that the configurations of `cluster.config` share or hold: what members show each other, classes of
requests, what a plan predicted. Frozen and checked as those are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from .config_schema import ConfigError, Hidden, Text, Within, check

Line = Annotated[str, Text()]
Seconds = Annotated[float, Within(0, 86400, above=True)]
Share = Annotated[float | None, Within(0, 1)]
Milliseconds = Annotated[float | None, Within(0, 86_400_000)]

MAX_SLO_CLASSES = 32
_CLASS_NAME = re.compile(r"[a-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """What the members of one cluster show each other (`cluster.auth`): on the workers' ports, the registry and KV."""

    secret: Annotated[str | None, Text(), Hidden()] = field(default=None, repr=False)
    """Shared by all members. None: `secret_file`, else the environment's TANDEM_CLUSTER_SECRET, else none."""
    secret_file: Annotated[str | None, Text()] = None
    tls_cert: Annotated[str | None, Text()] = None
    """PEM files of a member; with them every connection between members is mutual TLS."""
    tls_key: Annotated[str | None, Text()] = None
    tls_ca: Annotated[str | None, Text()] = None
    """Who must have signed the other member's certificate."""
    tls_server_name: Annotated[str | None, Text()] = None
    """A name that every member's certificate holds; None: each holds the host or address under which it is called."""

    def __post_init__(self) -> None:
        check(self)
        check_tls_files(self, ("tls_cert", "tls_key", "tls_ca"), wanted_by="tls_server_name")


@dataclass(frozen=True, slots=True, kw_only=True)
class SLOClass:
    """A class of requests under one promise."""

    ttft_s: Annotated[float | None, Within(0, 86400, above=True)] = None
    """None: no promise; the class takes what is left of the service, by its share."""
    tpot_s: Annotated[float | None, Within(0, 86400, above=True)] = None
    share: Annotated[float, Within(0.001, 1000)] = 1.0
    """Weight of the class while requests of other classes wait as well (`cluster.fair_queue`)."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """What was predicted of a latency, milliseconds; None: nothing."""

    p50: Milliseconds = None
    p90: Milliseconds = None
    p99: Milliseconds = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What a plan predicted of the cluster that it describes: kept beside what the cluster then sees
    (`router.attainment`). Decides nothing.
    """

    predicted_attainment: Share = None
    """Of all requests under a promise, at `rate`."""
    predicted_by_class: dict[str, Annotated[float, Within(0, 1)]] = field(default_factory=dict)
    """The same by SLO class."""
    rate: Annotated[float | None, Within(0, 1e9, above=True)] = None
    """Requests/s to the whole cluster, for which the rest was predicted."""
    ttft_ms: Percentiles = field(default_factory=Percentiles)
    tpot_ms: Percentiles = field(default_factory=Percentiles)
    goodput_per_gpu: Annotated[float | None, Within(0, 1e9)] = None
    """Requests/s."""
    placement: Annotated[str | None, Text()] = None
    """What was predicted, in words: workers, roles, splits."""
    model: Annotated[str | None, Text()] = None
    workload: Annotated[str | None, Text()] = None
    """What was expected to come, in words."""
    made_with: Annotated[str | None, Text()] = None
    """Where the prediction came from: a version, a profile, seeds."""
    problem: dict[str, object] = field(default_factory=dict)
    """What it answers, with the keys of a problem's file (`planner.problem`): devices, links, load. `tandem simulate
    --cluster` takes from it what a cluster's configuration does not say."""

    def __post_init__(self) -> None:
        check(self)
        check_class_names(self.predicted_by_class, "predicted_by_class")


def check_class_names(classes: Mapping[str, object], field_name: str = "slo_classes") -> None:
    """ConfigError, naming `field_name`, for too many classes and for a name that is none."""
    if len(classes) > MAX_SLO_CLASSES:
        raise ConfigError(field_name, f"{len(classes)} classes", f"at most {MAX_SLO_CLASSES}")
    for name in classes:
        if not _CLASS_NAME.fullmatch(name):
            raise ConfigError(field_name, name, "names of 1 to 64 characters of a-z, 0-9, '-' and '_'")


def check_tls_files(config: object, files: tuple[str, ...], *, wanted_by: str) -> None:
    """ConfigError for a field of `files` that is not given where another of them is, or the field `wanted_by`."""
    given = [name for name in (*files, wanted_by) if getattr(config, name) is not None]
    for name in files:
        if given and getattr(config, name) is None:
            raise ConfigError(name, None, f"a PEM file, as {given[0]} is given")
