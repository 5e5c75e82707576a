"""All configuration: frozen dataclasses validated in one place. YAML in, unknown keys refused with the nearest.

A config that exists is valid: construction checks every type and range (`cluster.config_schema`) and raises
`ConfigError`, a ValueError that names the dotted path, the value and what is allowed.
"""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from .config_schema import Bytes, ConfigError, OneOf, Text, Within, check, hints, parse, plain, unknown_key
from .types import SLO, Role

__all__ = [
    "ClusterConfig",
    "ConfigError",
    "EngineConfig",
    "RouterConfig",
    "WorkerConfig",
    "build_config",
    "from_dict",
    "is_loopback",
    "load_config",
    "to_dict",
]

T = TypeVar("T")

Port = Annotated[int, Within(0, 65535)]
Line = Annotated[str, Text()]
Seconds = Annotated[float, Within(0, 86400, above=True)]
StepSeconds = Annotated[float, Within(0, 60)]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One model replica: its model, device, KV memory and batch limits."""

    model: Line = "smollm2-135m"
    device: Annotated[str, OneOf(("cpu", "paced"))] = "cpu"
    """`cpu` or `paced`."""
    dtype: Annotated[str, OneOf(("bfloat16", "float32"))] = "bfloat16"
    """`bfloat16` or `float32`; of weights and KV."""
    block_size: Annotated[int, Within(1, 1024)] = 16
    kv_cache_bytes: Annotated[int, Bytes(), Within(1, 2**50)] = 512 * 2**20
    """Memory for KV; the number of blocks follows."""
    max_model_len: Annotated[int | None, Within(1, 2**31 - 1)] = None
    """None: the model's own."""
    max_batched_tokens: Annotated[int, Within(1, 2**20)] = 512
    """Token budget of a step."""
    max_running: Annotated[int, Within(1, 65536)] = 64
    """Sequences in the running batch."""
    max_waiting: Annotated[int, Within(1, 2**20)] = 256
    """Bounded queue: beyond it, work is refused with RESOURCE_EXHAUSTED."""
    prefix_cache: bool = True
    threads: Annotated[int, Within(1, 1024)] = 1
    """Compute threads of the device."""
    cpus: Annotated[tuple[int, ...], Within(0, 65535)] = ()
    """Processors that the engine's threads are pinned to; empty: not pinned."""
    paced_step_s: StepSeconds = 0.002
    """`paced` only: the latency model's coefficients, seconds."""
    paced_prefill_token_s: StepSeconds = 0.00005
    paced_decode_row_s: StepSeconds = 0.0002
    paced_context_token_s: StepSeconds = 0.0

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.cpus)) != len(self.cpus):
            raise ConfigError("cpus", list(self.cpus), "each processor once")


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
    metrics_port: Annotated[int | None, Within(0, 65535)] = None
    """Prometheus endpoint of the worker; None: metrics only by heartbeat through the router."""

    def __post_init__(self) -> None:
        check(self)


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
    local_prefill_threshold_tokens: Annotated[int, Within(0, 2**31 - 1)] = 0
    """Prompts with fewer uncached tokens are prefilled by the decode worker; 0 = off."""
    max_attempts: Annotated[int, Within(1, 100)] = 3
    """Tries at one choice before it fails with 503."""
    unready_wait_s: Seconds = 10.0
    """How long a request waits at the door while no worker could serve it."""
    events_path: Annotated[str | None, Text()] = None
    """JSON lines of waterfalls; None: none written."""
    slo: SLO = field(default_factory=SLO)
    api_key: Annotated[str | None, Text()] = field(default=None, repr=False)
    """What clients must present; None: nothing, which only a router on loopback may leave it at."""

    def __post_init__(self) -> None:
        check(self)
        try:
            check(self.slo, _SLO_MARKS)
        except ConfigError as error:
            raise error.under("slo") from None
        _distinct_ports(self, ("http_port", "grpc_port", "registry_port"))


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
    address: Annotated[str | None, Text()] = None
    """Ray cluster to join; None: start a local one."""
    worker_cpus: Annotated[float, Within(0, 1024, above=True)] = 0.9
    """Logical processors that Ray books for a worker, so that a router and two workers schedule on two cores."""
    router_cpus: Annotated[float, Within(0, 1024, above=True)] = 0.2
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
                raise ConfigError(f"{name}.model", engine.model, f"the router's model, {self.router.model}")

    def engine_of(self, role: Role) -> EngineConfig:
        """The engine settings of a role's workers."""
        own = {Role.PREFILL: self.prefill_engine, Role.DECODE: self.decode_engine, Role.MIXED: self.mixed_engine}[role]
        return self.engine if own is None else own

    def workers(self, registry_address: str) -> tuple[WorkerConfig, ...]:
        """One WorkerConfig for each worker, heartbeating to the router at `registry_address` (host:port)."""
        pools = ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode), (Role.MIXED, self.mixed))
        members = [(role, index) for role, count in pools for index in range(count)]
        first_port = self.worker.metrics_port or None
        return tuple(
            replace(
                self.worker,
                worker_id=f"{role.value}-{index}",
                role=role,
                engine=self.engine_of(role),
                routers=(registry_address,),
                metrics_port=self.worker.metrics_port if first_port is None else first_port + position,
            )
            for position, (role, index) in enumerate(members)
        )


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


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Reads cluster.yaml. `overrides` maps dotted paths to values that win over the file's.

    The file's keys are ClusterConfig's, with three conveniences: `model` at the top sets the engine's and the router's;
    `prefill`, `decode` and `mixed` are counts or sections `{workers: N, engine: {…}}` whose engine keys win over
    `engine`; sizes may carry units (`kv_cache_bytes: 512MiB`). Raises ConfigError, also for a file that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"a readable YAML file ({error})") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError("config", str(path), " ".join(f"valid YAML ({error})".split())) from None
    return _cluster_config({} if data is None else data, overrides or {})


def build_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """The cluster's config from an optional file and overrides by dotted path, e.g. `{"engine.device": "paced"}`."""
    return _cluster_config({}, overrides or {}) if path is None else load_config(path, overrides)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one section, which YAML forbids and PyYAML lets pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                where = f"line {key_node.start_mark.line + 1}"
                raise ConfigError(key, f"given twice ({where})", "each key once in a section")
            seen.add(str(key))
        return super().construct_mapping(node, deep)


_FILLED_IN = ("worker_id", "role", "engine", "port", "kv_port", "routers")


def _cluster_config(data: Any, overrides: Mapping[str, Any]) -> ClusterConfig:
    if not isinstance(data, Mapping):
        raise ConfigError("configuration", data, "a section of keys and values")
    tree: dict[str, Any] = copy.deepcopy(dict(data))
    _check_keys(tree)
    for dotted, value in overrides.items():
        _assign(tree, dotted, value)
    engine = dict(_section(tree, "engine"))
    router = dict(_section(tree, "router"))
    model = tree.pop("model", None)
    if model is not None:
        engine["model"] = router["model"] = model
    elif "model" in engine:
        router.setdefault("model", engine["model"])
    elif "model" in router:
        engine["model"] = router["model"]
    tree["engine"], tree["router"] = engine, router
    for role in Role:
        _expand_pool(tree, role.value, engine)
    tree["worker"] = {**_section(tree, "worker"), "worker_id": "worker", "role": Role.MIXED}
    return parse(ClusterConfig, tree)


def _check_keys(tree: Mapping[str, Any]) -> None:
    """Refuses keys that a file may not hold: unknown ones at the top, and what the cluster fills in by itself."""
    known = [name for name in hints(ClusterConfig) if not name.endswith("_engine")] + ["model"]
    for key in tree:
        if key not in known:
            raise unknown_key(str(key), str(key), known)
    worker_keys = [name for name in hints(WorkerConfig) if name not in _FILLED_IN]
    for key in _section(tree, "worker"):
        if key not in worker_keys:
            raise unknown_key(f"worker.{key}", str(key), worker_keys)


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(name, section, "a section of keys and values")
    return section


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, name = dotted.split(".")
    for depth, parent in enumerate(parents):
        below = tree.get(parent)
        if below is not None and not isinstance(below, Mapping):
            raise ConfigError(".".join(parents[: depth + 1]), below, "a section of keys and values")
        tree[parent] = dict(below or {})
        tree = tree[parent]
    pool = tree.get(name)
    if name in set(Role) and not parents and isinstance(pool, Mapping):
        tree[name] = {**pool, "workers": value}
    else:
        tree[name] = value


def _expand_pool(tree: dict[str, Any], role: str, engine: Mapping[str, Any]) -> None:
    """`prefill: {workers: 2, engine: {…}}` to `prefill: 2` and `prefill_engine`, whose keys win over `engine`'s."""
    pool = tree.get(role)
    if not isinstance(pool, Mapping):
        return
    for key in pool:
        if key not in ("workers", "engine"):
            raise unknown_key(f"{role}.{key}", str(key), ["workers", "engine"])
    own = dict(_section(pool, "engine"))
    if own:
        try:
            tree[f"{role}_engine"] = parse(EngineConfig, {**engine, **own}, f"{role}.engine")
        except ConfigError as error:
            # A wrong key of the shared section is that section's fault, not this pool's.
            shared = error.field.removeprefix(f"{role}.")
            raise (
                error if shared.removeprefix("engine.") in own else ConfigError(shared, error.value, error.allowed)
            ) from None
    workers = pool.get("workers", 0 if role == Role.MIXED else 1)
    tree[role] = workers
