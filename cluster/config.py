"""All configuration: frozen dataclasses validated in one place; read from YAML by `cluster.config_file`.

A config that exists is valid: construction checks every type and range (`cluster.config_schema`) and raises
`ConfigError`, a ValueError that names the dotted path, the value and what is allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

from .config_engine import EngineConfig
from .config_schema import HIDDEN, Bytes, ConfigError, Hidden, OneOf, Text, Within, check, parse, plain
from .config_sections import (
    Line,
    Percentiles,
    PlanConfig,
    Seconds,
    SecurityConfig,
    SLOClass,
    check_class_names,
    check_tls_files,
)
from .types import SLO, Role

__all__ = [
    "ClusterConfig",
    "ConfigError",
    "EngineConfig",
    "Percentiles",
    "PlanConfig",
    "RouterConfig",
    "SLOClass",
    "SecurityConfig",
    "WorkerConfig",
    "check_served",
    "from_dict",
    "is_loopback",
    "to_dict",
]

T = TypeVar("T")

Port = Annotated[int, Within(0, 65535)]

_SLO_MARKS = {
    "ttft_s": (Within(0, 86400, above=True),),
    "tpot_s": (Within(0, 86400, above=True),),
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a port bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


COLLECTIVE_TRANSPORTS = ("gloo", "nccl")
"""KV goes straight between the ranks of two workers (`kvtransfer.collective`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker process."""

    worker_id: Line
    role: Role
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: Line = "127.0.0.1"
    port: Port = 0
    """0: any free one."""
    kv_port: Port = 0
    routers: Annotated[tuple[str, ...], Text()] = ()
    """Registry addresses (host:port) of the routers to heartbeat to."""
    heartbeat_interval_s: Seconds = 0.25
    lease_s: Seconds = 30.0
    """How long a prefilled request's blocks are kept for a decode worker, from the end of prefill; renewed by pulls."""
    pull_wait_s: Seconds = 30.0
    """How long a pull may wait for its prefill to begin."""
    credit_ttl_s: Seconds = 10.0
    """How long an unredeemed credit is kept."""
    credit_factor: Annotated[float, Within(0, 1000, above=True)] = 1.0
    """Credits outstanding, in blocks, may reach this multiple of the KV capacity."""
    checksum: bool = True
    """Checksum gRPC KV payloads."""
    transport: Annotated[str, OneOf(("auto", "grpc", "mapped", "cuda_ipc", *COLLECTIVE_TRANSPORTS))] = "auto"
    """How KV is pulled; `auto`: `mapped` memory where the other worker shares this host's memory, or its GPU's
    (`cuda_ipc`: workers of device `cuda`), else gRPC. `nccl` (workers of device `cuda`) and `gloo` (of others): from
    rank to rank over process groups, and no other way; all workers are set to it."""
    kv_mover: Annotated[str, OneOf(("auto", "process", "thread"))] = "auto"
    """Who moves KV: a process beside the worker's own (`process`), so that it never holds up the engine, or the
    worker's event loop (`thread`), which saves about 20 MiB and a millisecond of each handoff; `auto`: a process, where
    memory can be shared with it, there is more than one processor and the device computes."""
    security: SecurityConfig = field(default_factory=SecurityConfig)
    insecure: bool = False
    """Listen beyond loopback though members share no secret."""
    metrics_port: Annotated[int | None, Within(0, 65535)] = None
    """Prometheus endpoint of the worker; None: metrics only by heartbeat through the router."""

    def __post_init__(self) -> None:
        check(self)
        if self.transport in COLLECTIVE_TRANSPORTS and self.kv_mover == "process":
            allowed = f"auto or thread with transport {self.transport}, where the ranks move their KV themselves"
            raise ConfigError("kv_mover", self.kv_mover, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The router process."""

    host: Line = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 8001
    registry_port: Port = 8002
    model: Line = "smollm2-135m"
    served_model_name: Annotated[str | None, Text()] = None
    """None: the model reference."""
    max_waiting: Annotated[int, Within(1, 2**20)] = 256
    max_body_bytes: Annotated[int, Bytes(), Within(1024, 2**30)] = 4 * 2**20
    max_choices: Annotated[int, Within(1, 1024)] = 16
    max_stop: Annotated[int, Within(1, 1024)] = 16
    default_max_tokens: Annotated[int | None, Within(1, 2**31 - 1)] = None
    """None: what the context still holds, at most 1024."""
    request_timeout_s: Seconds = 600.0
    heartbeat_timeout_s: Seconds = 1.0
    """A worker that was not heard for so long gets no new work."""
    worker_lost_after_s: Seconds = 10.0
    """The requests of a worker that was not heard for so long go on elsewhere, though its connections stand; not below
    `heartbeat_timeout_s`."""
    local_prefill_threshold_tokens: Annotated[int, Within(0, 2**31 - 1)] = 0
    """Prompts with fewer uncached tokens are prefilled by the decode worker; 0 = off."""
    max_attempts: Annotated[int, Within(1, 100)] = 3
    """Tries at one choice before it fails with 503."""
    processes: Annotated[int, Within(1, 64)] = 1
    """Router processes behind the one HTTP and the one gRPC port; the kernel spreads connections over them. Every bound
    of this section is each process's own, and so is the registry port: they count up from `registry_port`."""
    process: Annotated[int, Within(0, 63)] = 0
    """Which of them this is; filled in for each."""
    unready_wait_s: Seconds = 10.0
    """How long a request waits at the door while no worker could serve it."""
    events_path: Annotated[str | None, Text()] = None
    """JSON lines of waterfalls; None: none written."""
    slo: SLO = field(default_factory=SLO)
    """The promise of the class `interactive`, which requests that name no class belong to."""
    slo_classes: dict[str, SLOClass] = field(default_factory=dict)
    """More classes, or other settings of `interactive` and `batch` (`router.slo_classes`)."""
    plan: PlanConfig | None = None
    """What was predicted of this cluster: the section `plan` at the top of the file."""
    api_key: Annotated[str | None, Text(), Hidden()] = field(default=None, repr=False)
    """What clients must present, several separated by commas; None: the keys of `api_keys_file`. Without any, everybody
    is let in, which only a router on loopback may do."""
    api_keys_file: Annotated[str | None, Text()] = None
    """One key a line; read again when it changes, so that a key can be given and taken without a restart."""
    tls_cert: Annotated[str | None, Text()] = None
    """PEM files for HTTP and gRPC to clients; None: plain."""
    tls_key: Annotated[str | None, Text()] = None
    tls_client_ca: Annotated[str | None, Text()] = None
    """Who must have signed a client's certificate; None: clients show none."""
    security: SecurityConfig = field(default_factory=SecurityConfig)
    insecure: bool = False
    """Listen beyond loopback though clients present no key."""

    def __post_init__(self) -> None:
        check(self)
        try:
            check(self.slo, _SLO_MARKS)
        except ConfigError as error:
            raise error.under("slo") from None
        check_class_names(self.slo_classes)
        _distinct_ports(self, ("http_port", "grpc_port", "registry_port"))
        self._check_processes()
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("api_key", HIDDEN, "printable ASCII without spaces, several separated by commas")
        check_tls_files(self, ("tls_cert", "tls_key"), wanted_by="tls_client_ca")

    def _check_processes(self) -> None:
        if self.process >= self.processes:
            raise ConfigError("process", self.process, f"0 to {self.processes - 1}, as processes is {self.processes}")
        if self.registry_port + self.processes - 1 > 65535:
            allowed = f"at most {65536 - self.processes}: each of {self.processes} processes has one"
            raise ConfigError("registry_port", self.registry_port, allowed)
        for name in ("http_port", "grpc_port"):
            port = getattr(self, name)
            if port and port in self.registry_ports:
                allowed = (
                    f"a port that is not a router process's registry port, {', '.join(map(str, self.registry_ports))}"
                )
                raise ConfigError(name, port, allowed)

    @property
    def registry_ports(self) -> tuple[int, ...]:
        """Where each of the processes hears its workers; 0: any free one."""
        first = self.registry_port
        return tuple(first + index if first else 0 for index in range(self.processes))

    def each_process(self) -> tuple[RouterConfig, ...]:
        """The configuration of each of the processes."""
        return tuple(replace(self, process=index) for index in range(self.processes))

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys of `api_key`, one by one."""
        return () if self.api_key is None else tuple(key.strip() for key in self.api_key.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What `tandem serve` starts."""

    router: RouterConfig = field(default_factory=RouterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    prefill: Annotated[int, Within(0, 1024)] = 1
    decode: Annotated[int, Within(0, 1024)] = 1
    mixed: Annotated[int, Within(0, 1024)] = 0
    prefill_engine: EngineConfig | None = None
    """The prefill workers' own engine; None: `engine`. The same for the other roles."""
    decode_engine: EngineConfig | None = None
    mixed_engine: EngineConfig | None = None
    worker: WorkerConfig = field(default_factory=lambda: WorkerConfig(worker_id="worker", role=Role.MIXED))
    """What all workers share; id, role, engine, ports and routers are filled in for each. `metrics_port` is the first
    worker's, the others count up from it."""
    security: SecurityConfig = field(default_factory=SecurityConfig)
    """Of all members; a cluster that is given no secret draws one."""
    insecure: bool = False
    address: Annotated[str | None, Text()] = None
    """Ray cluster to join; None: start a local one."""
    worker_cpus: Annotated[float, Within(0, 1024, above=True)] = 0.9
    """Logical processors that Ray books for each process of a worker (its ranks), so that a router and two workers
    schedule on two cores."""
    nodes: dict[str, Annotated[tuple[str, ...], Text()]] = field(default_factory=dict)
    """Addresses of Ray's nodes by worker (`decode-0`): one for all its pipeline stages, or one for each; and of
    `router`, one. Who is not named stands where there is room, each stage's ranks together."""
    router_cpus: Annotated[float, Within(0, 1024, above=True)] = 0.2
    """The same for each router process."""
    object_store_bytes: Annotated[int, Bytes(), Within(80 * 2**20, 2**50)] = 80 * 2**20
    """Ray's shared memory where a local Ray is started. Tandem puts nothing there; Ray's minimum is about 75 MiB."""
    drain_timeout_s: Annotated[float, Within(0, 86400)] = 30.0
    start_timeout_s: Seconds = 120.0

    def __post_init__(self) -> None:
        check(self)
        if self.prefill + self.decode + self.mixed == 0:
            raise ConfigError("prefill", 0, "at least one worker: prefill and decode, or mixed")
        if (self.prefill == 0) != (self.decode == 0):
            lone, other = ("decode", "prefill") if self.prefill == 0 else ("prefill", "decode")
            raise ConfigError(
                other, 0, f"at least 1 where {lone} is {getattr(self, lone)}; the two pools work together"
            )
        for name in ("engine", "prefill_engine", "decode_engine", "mixed_engine"):
            engine = getattr(self, name)
            if engine is not None and engine.model != self.router.model:
                field = f"{name.replace('_', '.')}.model"  # as a file has it
                raise ConfigError(field, engine.model, f"the router's model, {self.router.model}")
        self._check_nodes()

    def _check_nodes(self) -> None:
        if not self.nodes:
            return
        stages = {"router": 1} | {worker.worker_id: worker.engine.pipeline_stages for worker in self.workers()}
        for name, nodes in self.nodes.items():
            if name not in stages:
                raise ConfigError("nodes", name, f"this cluster's members, {', '.join(stages)}")
            if len(nodes) not in (1, stages[name]):
                counts = "1" if stages[name] == 1 else f"1, or {stages[name]} for its pipeline stages"
                raise ConfigError(f"nodes.{name}", list(nodes), f"addresses of nodes, {counts}")

    @property
    def pools(self) -> tuple[tuple[Role, int], ...]:
        """How many workers of each role there are; a pool may be empty."""
        return (Role.PREFILL, self.prefill), (Role.DECODE, self.decode), (Role.MIXED, self.mixed)

    def engine_of(self, role: Role) -> EngineConfig:
        """The engine settings of a role's workers."""
        own = {Role.PREFILL: self.prefill_engine, Role.DECODE: self.decode_engine, Role.MIXED: self.mixed_engine}[role]
        return self.engine if own is None else own

    def workers(self, *registry_addresses: str) -> tuple[WorkerConfig, ...]:
        """One WorkerConfig for each worker, heartbeating to the routers at `registry_addresses` (host:port)."""
        members = [(role, index) for role, count in self.pools for index in range(count)]
        first_port = self.worker.metrics_port or None
        return tuple(
            replace(
                self.worker,
                worker_id=f"{role.value}-{index}",
                role=role,
                engine=self.engine_of(role).of_worker(index),
                routers=registry_addresses,
                metrics_port=self.worker.metrics_port if first_port is None else first_port + position,
            )
            for position, (role, index) in enumerate(members)
        )


def check_served(config: ClusterConfig) -> None:
    """`EngineConfig.check_served` for every pool that has workers."""
    for role, count in config.pools:
        if count:
            engine = config.engine_of(role)
            try:
                engine.check_served()
            except ConfigError as error:
                raise error.under("engine" if engine is config.engine else f"{role.value}.engine") from None


def _distinct_ports(config: RouterConfig, names: tuple[str, ...]) -> None:
    seen: dict[int, str] = {}
    for name in names:
        port = getattr(config, name)
        if port and port in seen:
            raise ConfigError(name, port, f"a port that is not {seen[port]}'s")
        seen[port] = name


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values for JSON; `from_dict` gives it back."""
    result: dict[str, Any] = plain(config)
    return result


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """The config that `to_dict` made, or that someone wrote by hand. Raises ConfigError."""
    return parse(cls, data)
