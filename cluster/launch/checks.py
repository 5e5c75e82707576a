"""What is settled before and after the cluster runs, on the driver: ports, model files, readiness, leftovers."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...kernels.dispatch import has_gpu_driver
from ...kvtransfer.layout import DTYPE_BYTES
from ..config import ClusterConfig, ConfigError, EngineConfig, RouterConfig
from ..engine.kv_scales import KVScales
from ..engine.parallel.shard import check_split
from ..events import check_path
from ..host_memory import total_bytes
from ..latency.profile import read_profile
from ..models.config import ModelConfig
from ..models.fetch import WHEEL_MODELS
from ..models.reference import DUMMY_PREFIX, ModelError, ModelFiles, resolve_model
from ..ports import bind, pin_ports
from ..types import Role
from . import runtime_file
from .state import LaunchError

_PORTS = ("http_port", "grpc_port", "registry_port")


def check_ports(config: RouterConfig) -> None:
    """Raises LaunchError, naming all of them, where the router's fixed ports cannot be used on this machine."""
    registries = [("registry_port", port) for port in config.registry_ports]
    refused: dict[str, list[int]] = {}
    whys: list[OSError] = []
    for name, port in (("http_port", config.http_port), ("grpc_port", config.grpc_port), *registries):
        if port == 0:
            continue
        try:
            bind(config.host, port).close()
        except OSError as error:
            refused.setdefault(name, []).append(port)
            whys.append(error)
    if not refused:
        return
    told = [f"router.{name}: {config.host}:{port}" for name, ports in refused.items() for port in ports]
    why = f"{', '.join(told)} cannot be used ({whys[0].strerror or whys[0]})"
    raise LaunchError(why + (_other_ports(refused) if whys[0].errno == errno.EADDRINUSE else "")) from None


def _other_ports(taken: Mapping[str, Sequence[int]]) -> str:
    """Who has them, where that is known, and what to do; the continuation of a sentence."""
    ports = {port for several in taken.values() for port in several}
    holders = [
        f"; this user's running cluster has them (pid {one.pid})"
        for one in runtime_file.running()
        if ports & {int(address.rpartition(":")[2]) for address in (one.http, one.grpc, one.registry, *one.registries)}
    ]
    flags = " ".join(f"--{name.replace('_', '-')} 0" for name in taken)
    return f"{''.join(holders[:1])}; any free one: {flags}"


def check_shared_ports(config: RouterConfig) -> None:
    """ConfigError for several router processes where their ports cannot be shared, or are not named."""
    if config.processes == 1:
        return
    if sys.platform != "linux" or not hasattr(socket, "SO_REUSEPORT"):
        allowed = f"1 on {sys.platform}, whose kernel does not spread the connections of one port over processes"
        raise ConfigError("processes", config.processes, allowed)
    for name in _PORTS:
        if getattr(config, name) == 0:
            raise ConfigError(name, 0, f"a port that all {config.processes} router processes know")


def pin_config(config: ClusterConfig) -> ClusterConfig:
    """Fixes what must be the same after a restart and in every process: ports that are 0, and relative paths."""
    try:
        router = pin_ports(config.router)
    except OSError as error:
        raise LaunchError(f"router: no port for it on {config.router.host} ({error.strerror or error})") from None
    model = _absolute(router.model)
    events = router.events_path
    router = replace(
        router,
        model=model,
        served_model_name=router.served_model_name or router.model,
        events_path=None if events is None else str(Path(events).expanduser().absolute()),
    )

    def engine(own: EngineConfig | None) -> EngineConfig | None:
        if own is None:
            return None
        return replace(own, model=model, paced_profile=_file(own.paced_profile), kv_scales=_file(own.kv_scales))

    return replace(
        config,
        router=router,
        engine=engine(config.engine) or config.engine,
        prefill_engine=engine(config.prefill_engine),
        decode_engine=engine(config.decode_engine),
        mixed_engine=engine(config.mixed_engine),
    )


def fetch_model(reference: str, progress: Callable[[str, float | None], None]) -> ModelFiles:
    """Brings the model's files here, once, before several processes want them. Raises LaunchError."""
    try:
        return resolve_model(reference, progress=progress)
    except (ModelError, OSError) as error:
        raise LaunchError(" ".join(str(error).split())) from None


def check_events(config: RouterConfig) -> None:
    """Raises ConfigError where the waterfalls' folder does not exist."""
    if config.events_path is not None:
        try:
            check_path(config.events_path)
        except ConfigError as error:
            raise error.under("router") from None


def check_engines(config: ClusterConfig, model: ModelConfig) -> None:
    """`check_engine` for every pool that has workers, and that they can hand KV to each other."""
    engines = {role: config.engine_of(role) for role, count in config.pools if count}
    for role, engine in engines.items():
        under = _section(config, role, engine)
        check_engine(engine, model, under=under)
        try:
            check_transport(engine, config.worker.transport)
        except ConfigError as error:
            raise error.under("worker") from None
        first, others = next(iter(engines.items()))
        try:
            check_alike(engine, others, model, of=first.value)
        except ConfigError as error:
            raise error.under(under) from None


def check_memory(config: ClusterConfig) -> None:
    """ConfigError where the KV of all workers on processors is more than this machine's memory, which is taken while
    they start and as it is filled.
    """
    memory = total_bytes()
    pools = [(role, count, config.engine_of(role)) for role, count in config.pools if count]
    held = [(role, count, engine) for role, count, engine in pools if engine.device == "cpu"]
    wanted = sum(count * engine.kv_cache_bytes for _, count, engine in held)
    if not memory or wanted <= memory:
        return
    role, _, engine = max(held, key=lambda pool: pool[2].kv_cache_bytes)
    allowed = (
        f"less: the KV of {sum(count for _, count, _ in held)} workers would be {wanted / 2**30:.1f} GiB, and this "
        f"machine has {memory / 2**30:.1f} GiB"
    )
    raise ConfigError("kv_cache_bytes", engine.kv_cache_bytes, allowed).under(_section(config, role, engine))


def _section(config: ClusterConfig, role: Role, engine: EngineConfig) -> str:
    """Where a pool's engine is configured."""
    return "engine" if engine is config.engine else f"{role.value}.engine"


def check_alike(engine: EngineConfig, other: EngineConfig, model: ModelConfig, *, of: str) -> None:
    """ConfigError where KV of one engine is not what another, of a pool `of`, would have computed and held."""
    names = (
        ["kv_cache_dtype"] if "paced" in (engine.device, other.device) else ["dtype", "quantization", "kv_cache_dtype"]
    )
    for name in names:
        value, wanted = getattr(engine, name), getattr(other, name)
        if value != wanted:
            allowed = f"{wanted or 'none'}, as of {of} workers: KV is handed over as it is held"
            raise ConfigError(name, value, allowed)
    if engine.kv_scales != other.kv_scales and _scales(engine, model) != _scales(other, model):
        allowed = f"the scales of {of} workers, {other.kv_scales or 'none'}: stored numbers mean nothing by others"
        raise ConfigError("kv_scales", engine.kv_scales, allowed)


def _scales(engine: EngineConfig, model: ModelConfig) -> str | None:
    return None if engine.kv_scales is None else _read_scales(engine.kv_scales, model).digest()


def _read_scales(path: str, model: ModelConfig) -> KVScales:
    """ConfigError where they cannot be read."""
    try:
        return KVScales.load(Path(path).expanduser(), model)
    except ValueError as error:
        raise ConfigError("kv_scales", path, f"a file of `tandem calibrate` for this model; {error}") from None


def check_transport(engine: EngineConfig, transport: str) -> None:
    """ConfigError for a transport that KV in this engine's memory cannot take."""
    memories = {"host memory": ("mapped", "gloo"), "GPU memory": ("cuda_ipc", "nccl")}
    own = "GPU memory" if engine.device == "cuda" else "host memory"
    if transport not in ("auto", "grpc", *memories[own]):
        allowed = f"auto, grpc, {' or '.join(memories[own])}: the KV of device {engine.device} is in {own}"
        raise ConfigError("transport", transport, allowed)
    if transport == "cuda_ipc" and engine.num_ranks > 1:
        allowed = f"auto, grpc or nccl for a worker of {engine.num_ranks} GPUs, whose blocks lie on all of them"
        raise ConfigError("transport", transport, allowed)
    if transport == "mapped" and engine.num_ranks > 1:
        allowed = f"auto, grpc or gloo for a worker of {engine.num_ranks} ranks, whose blocks lie with all of them"
        raise ConfigError("transport", transport, allowed)


def check_engine(engine: EngineConfig, model: ModelConfig, *, under: str = "engine") -> None:
    """Raises ConfigError for a context that the model does not have, for KV memory that holds no block, for a GPU that
    is not there, for ranks that the device cannot serve or the model cannot be split over, and for a step profile or
    KV scales that cannot be read.
    """
    try:
        engine.check_served()
    except ConfigError as error:
        raise error.under(under) from None
    if engine.max_model_len is not None and engine.max_model_len > model.max_model_len:
        allowed = f"at most the model's own, {model.max_model_len}"
        raise ConfigError("max_model_len", engine.max_model_len, allowed).under(under)
    token_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * DTYPE_BYTES[engine.kv_dtype]
    block_bytes = token_bytes * engine.block_size
    if 0 < engine.kv_cache_bytes < block_bytes:
        allowed = f"at least one block of this model, {block_bytes} bytes"
        raise ConfigError("kv_cache_bytes", engine.kv_cache_bytes, allowed).under(under)
    if engine.device == "cuda" and not has_gpu_driver():
        allowed = "cpu, paced: the system has no device of NVIDIA's driver"
        raise ConfigError("device", engine.device, allowed).under(under)
    if engine.device != "paced":
        try:
            check_split(model, engine.tensor_parallel, engine.pipeline_stages)
        except ConfigError as error:
            raise error.under(under) from None
    if engine.paced_profile is not None:
        try:
            read_profile(Path(engine.paced_profile).expanduser())
        except ValueError as error:
            allowed = f"the file of a step profile; {error}"
            raise ConfigError("paced_profile", engine.paced_profile, allowed).under(under) from None
    if engine.kv_scales is not None:
        try:
            _read_scales(engine.kv_scales, model)
        except ConfigError as error:
            raise error.under(under) from None


def wait_gone(pids: Iterable[int], timeout_s: float = 5.0) -> None:
    """Waits for actor processes of this machine to end; kills those that have not after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    left = {pid for pid in pids if _is_actor(pid)}
    while left and time.monotonic() < deadline_s:
        time.sleep(0.05)
        left = {pid for pid in left if _is_actor(pid)}
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_actor(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def _file(path: str | None) -> str | None:
    return path and str(Path(path).expanduser().absolute())


def _absolute(model: str) -> str:
    if model in WHEEL_MODELS:
        return model
    prefix = DUMMY_PREFIX if model.startswith(DUMMY_PREFIX) else ""
    path = Path(model.removeprefix(prefix)).expanduser()
    return f"{prefix}{path.absolute()}" if path.exists() else model
