"""All configuration, as frozen dataclasses validated in one place. YAML in, unknown keys refused with the nearest known one."""

from __future__ import annotations

from dataclasses import dataclass, field

from .types import SLO, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One model replica: its model, device, KV memory and batch limits."""

    model: str = "smollm2-135m"
    device: str = "cpu"
    """`cpu` or `paced`."""
    dtype: str = "bfloat16"
    """`bfloat16` or `float32`; of weights and KV."""
    block_size: int = 16
    kv_cache_bytes: int = 512 * 2**20
    """Memory for KV; the number of blocks follows."""
    max_model_len: int | None = None
    """None: the model's own."""
    max_batched_tokens: int = 512
    """Token budget of a step."""
    max_running: int = 64
    """Sequences in the running batch."""
    max_waiting: int = 256
    """Bounded queue: beyond it, work is refused with RESOURCE_EXHAUSTED."""
    prefix_cache: bool = True
    threads: int = 1
    """Compute threads of the device."""
    cpus: tuple[int, ...] = ()
    """Processors that the engine's threads are pinned to; empty: not pinned."""
    paced_step_s: float = 0.002
    """`paced` only: the latency model's coefficients, seconds."""
    paced_prefill_token_s: float = 0.00005
    paced_decode_row_s: float = 0.0002
    paced_context_token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker process."""

    worker_id: str
    role: Role
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    kv_port: int = 0
    routers: tuple[str, ...] = ()
    """Registry addresses (host:port) of the routers to heartbeat to."""
    heartbeat_interval_s: float = 0.25
    lease_s: float = 30.0
    """How long a prefilled request's blocks are kept for a decode worker, from the end of prefill; renewed by pulls."""
    pull_wait_s: float = 30.0
    """How long a pull may wait for its prefill to begin."""
    credit_ttl_s: float = 10.0
    """How long an unredeemed credit is kept."""
    credit_factor: float = 1.0
    """Credits outstanding, in blocks, may reach this multiple of the KV capacity."""
    checksum: bool = True
    """Checksum gRPC KV payloads."""
    metrics_port: int | None = None
    """Prometheus endpoint of the worker; None: metrics only by heartbeat through the router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The router process."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    registry_port: int = 8002
    model: str = "smollm2-135m"
    served_model_name: str | None = None
    """None: the model reference."""
    max_waiting: int = 256
    max_body_bytes: int = 4 * 2**20
    max_choices: int = 16
    max_stop: int = 16
    default_max_tokens: int | None = None
    """None: what the context still holds, at most 1024."""
    request_timeout_s: float = 600.0
    heartbeat_timeout_s: float = 1.0
    local_prefill_threshold_tokens: int = 0
    """Prompts with fewer uncached tokens are prefilled by the decode worker; 0 = off."""
    max_attempts: int = 3
    events_path: str | None = None
    """JSON lines of waterfalls; None: none written."""
    slo: SLO = field(default_factory=SLO)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What `tandem serve` starts."""

    router: RouterConfig = field(default_factory=RouterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    address: str | None = None
    """Ray cluster to join; None: start a local one."""
    drain_timeout_s: float = 30.0
    start_timeout_s: float = 120.0
