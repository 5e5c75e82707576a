"""Builds a worker from its parts: device, scheduler, engine thread, both services, gRPC servers. One process may hold
both services whatever its role is now, so that roles can flip.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import socket
from collections.abc import Callable, Sequence

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from ...kvtransfer.cuda_ipc.blocks import DeviceMapper
from ...kvtransfer.grpc_transport import GrpcKVServer, GrpcKVTransport
from ...kvtransfer.mapped.blocks import HostMapper
from ...kvtransfer.mapped.fd_passing import SegmentServer, share
from ...kvtransfer.mapped.transport import MappedKVTransport
from ...kvtransfer.mover.worker import KVMover, attach_mover, spawn_mover
from ...kvtransfer.reblock import ReblockingTransport, largest_block_bytes
from ...kvtransfer.transport import KVTransport
from ...prefill_worker.service import PrefillService
from ..auth import MemberCredentials
from ..config import COLLECTIVE_TRANSPORTS, ConfigError, EngineConfig, WorkerConfig
from ..engine.devices.base import Device
from ..engine.parallel.rank_process import RankProcess, Recruit, children
from ..metrics_of_workers import worker_registry
from ..models.reference import ModelFiles, resolve_model
from ..proto.tandem_internal_v1_pb2_grpc import add_WorkerServicer_to_server
from ..rpc import make_server
from ..worker.servicer import Servicer
from ..worker.shell import WorkerShell
from .checks import check_engine, check_transport
from .compose_ranks import RankTransport, join_ranks
from .compose_shell import KVEnds, assemble, steps_known, worker_facts
from .worker_metrics import WorkerMetricsServer

logger = logging.getLogger(__name__)
Progress = Callable[[str, float | None], None]


def build_device(
    config: EngineConfig, files: ModelFiles, progress: Progress | None, recruit: Recruit | None = None
) -> Device:
    """The device that the config names; loads the weights, so it takes a while. Imports torch for `cuda`, and for `cpu`
    where weights must be packed first or torch computes.

    Raises ConfigError where torch is not installed, ValueError where there is no GPU that can compute the model or it
    does not fit (with the arithmetic), ModelError.
    """
    if config.device == "paced":
        from ..engine.devices.paced import PacedDevice

        return PacedDevice.for_model(config, files.config)
    if importlib.util.find_spec("torch") is None:
        allowed = f"paced, or {config.device} with torch installed (pip install 'tandem-serve[engine]')"
        raise ConfigError("engine.device", config.device, allowed)
    if config.device == "cuda":
        return _cuda_device(config, files, progress, recruit or children)
    from ..engine.devices.cpu import CpuDevice

    return CpuDevice(
        files,
        dtype=config.dtype,
        quantization=config.quantization,
        kernels=config.kernels,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_bytes,
        threads=config.threads,
        cpus=config.cpus,
        stage=progress,
        tensor_parallel=config.tensor_parallel,
        pipeline_stages=config.pipeline_stages,
        recruit=recruit or children,
    )


def _cuda_device(config: EngineConfig, files: ModelFiles, progress: Progress | None, recruit: Recruit) -> Device:
    from ...kernels.dispatch import gpu_facts, pick_gpu

    pick_gpu("auto", gpu_facts())  # before what would fail without saying why is imported
    from ..engine.devices.cuda import CudaDevice
    from ..engine.gpu.narrow import narrow_kv
    from ..engine.parallel.messages import GpuSetup

    gpu = GpuSetup(
        device=f"cuda:{config.gpus[0]}" if config.gpus and config.num_ranks == 1 else "cuda",
        quantization=config.quantization,
        kv_cache_bytes=config.kv_cache_bytes,
        max_batched_tokens=config.max_batched_tokens,
        max_running=config.max_running,
        max_model_len=config.max_model_len,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=config.enforce_eager,
        narrow_kv=narrow_kv(config, files),
    )
    if config.num_ranks == 1:
        return CudaDevice(
            files,
            dtype=config.dtype,
            block_size=config.block_size,
            kernels=config.kernels,
            stage=progress,
            **gpu.arguments(),
        )
    from ..engine.devices.cuda_ranks import RankedCudaDevice

    return RankedCudaDevice(
        files,
        gpu,
        dtype=config.dtype,
        block_size=config.block_size,
        kernels=config.kernels,
        tensor_parallel=config.tensor_parallel,
        pipeline_stages=config.pipeline_stages,
        gpus=config.gpus,
        stage=progress,
        recruit=recruit,
    )


def advertised_host(host: str, routers: tuple[str, ...]) -> str:
    """The address under which others reach a server that is bound to `host`.

    A wildcard is no address: the one that this machine uses towards its first router stands for it (a UDP socket that
    is connected and sends nothing tells which that is).
    """
    if host not in ("0.0.0.0", "::") or not routers:
        return host
    peer, _, port = routers[0].rpartition(":")
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer.strip("[]"), int(port)))
        return str(probe.getsockname()[0])


def _unheard(stage: str, share: float | None) -> None:
    """Nobody follows this start."""


class WorkerRuntime:
    """A worker on the running event loop: `start`, serve, `drain`, `stop`."""

    def __init__(
        self,
        config: WorkerConfig,
        on_failure: Callable[[BaseException], None],
        on_leave: Callable[[float], None] | None = None,
        recruit: Recruit | None = None,
    ) -> None:
        self._config = config
        self._recruit = recruit or children
        self._other_ranks: Sequence[RankProcess] = ()
        self._on_failure = on_failure
        self._on_leave = on_leave
        self._server: aio.Server | None = None
        self._kv_server: GrpcKVServer | None = None
        self._mover: KVMover | None = None
        self._segments: SegmentServer | None = None
        self._ranks: RankTransport | None = None
        self._device: Device | None = None
        self._metrics: WorkerMetricsServer | None = None
        self.shell: WorkerShell | None = None
        self.warning = ""
        """One line for the operator; empty where there is nothing to say."""

    def _recruited(self, num_ranks: int) -> Sequence[RankProcess]:
        self._other_ranks = self._recruit(num_ranks)
        return self._other_ranks

    async def start(self, progress: Progress | None = None) -> None:
        """Loads the model and serves. Raises ModelError, ConfigError, OSError (a port in use)."""
        config, say = self._config, progress or _unheard
        say("model files", None)
        credentials = await asyncio.to_thread(MemberCredentials.load, config.security)
        credentials.check_exposure(config.host, insecure=config.insecure)
        files = await asyncio.to_thread(resolve_model, config.engine.model, progress=progress)
        check_engine(config.engine, files.config)
        say("device", None)
        check_transport(config.engine, config.transport)
        in_host_memory = config.engine.device == "cpu" and config.engine.num_ranks == 1
        mover = "thread" if config.transport in COLLECTIVE_TRANSPORTS else config.kv_mover
        self._mover = await spawn_mover(mover, computes=in_host_memory)
        device = await asyncio.to_thread(build_device, config.engine, files, progress, self._recruited)
        say("services", None)
        self._device = device
        if self._mover is not None:
            failed = await attach_mover(
                self._mover, config.kv_mover, device.kv, transport=config.transport, credentials=credentials
            )
            if failed:
                self._mover = None
                self._warn(failed)
        ends = await self._kv_ends(device, credentials)
        facts = worker_facts(config, files, device, self._other_ranks)
        fit = await asyncio.to_thread(steps_known, config, facts, device)
        shell, prefill, decode = assemble(config, files, device, facts, credentials, ends, fit)
        device.watch(shell.failure_from_engine)
        shell.on_leave = self._on_leave
        asked, longest = config.engine.max_model_len, shell.facts.max_model_len
        if asked is not None and longest < asked:
            self._warn(f"its KV memory holds {longest} tokens, so that contexts end there, not at {asked}")
        kv_port = await self._serve_kv(shell, prefill, device, credentials)
        self._server = make_server(credentials)
        add_WorkerServicer_to_server(Servicer(shell, prefill, decode), self._server)
        health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            port = credentials.listen(self._server, f"{config.host}:{config.port}")
        except RuntimeError as error:
            where = f"{config.host}:{config.port}"
            raise OSError(f"port: cannot listen on {where}; it is taken or not of this machine") from error
        await self._server.start()
        host = advertised_host(config.host, config.routers)
        shell.address, shell.kv_address = f"{host}:{port}", f"{host}:{kv_port}"
        shell.start(self._on_failure)
        self.shell = shell
        if config.metrics_port is not None:
            self._metrics = WorkerMetricsServer(config, worker_registry(shell.status), credentials)
        logger.info("worker %s (%s) serves on %s, KV on %s", config.worker_id, config.role, shell.address, kv_port)

    async def _kv_ends(self, device: Device, credentials: MemberCredentials) -> KVEnds:
        """From rank to rank, or with blocks of its memory for others to map, where they can be."""
        config = self._config
        self._ranks = await join_ranks(config, advertised_host(config.host, config.routers), device, credentials)
        if self._ranks is not None:
            return KVEnds(transport=self._ranks.pulls, offer=None, ranks=self._ranks.offer)
        if config.transport != "grpc":
            memory = device.kv.device_memory
            self._segments = await share(device.kv.segment, None if memory is None else memory.fd)
        usual = self._mover.transport if self._mover is not None else _kv_transport(config, device, credentials)
        transport = _of_any_block_size(usual, config, device, credentials)
        return KVEnds(transport=transport, offer=None if self._segments is None else self._segments.offer, ranks=b"")

    def _warn(self, text: str) -> None:
        self.warning = f"{self.warning}; {text}" if self.warning else text
        logger.warning("worker %s: %s", self._config.worker_id, text)

    async def _serve_kv(
        self, shell: WorkerShell, prefill: PrefillService, device: Device, credentials: MemberCredentials
    ) -> int:
        """Opens the KV port, here or in the mover; returns it."""
        config = self._config
        if self._mover is not None:
            shell.kv_mover_pid = self._mover.pid
            self._mover.on_lost = shell.failure_from_engine
            return await self._mover.listen(prefill.source, f"{config.host}:{config.kv_port}")
        self._kv_server = GrpcKVServer(
            prefill.source,
            config.host,
            config.kv_port,
            block_bytes=device.kv.layout.block_bytes,
            credentials=credentials,
            sessions=None if self._ranks is None else self._ranks.sessions(prefill.source, shell.facts.epoch),
        )
        return await self._kv_server.start()

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new work and waits for what runs; False if some is left after `timeout_s`."""
        assert self.shell is not None
        self.shell.begin_drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self.shell.wait_idle()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends everything; idempotent."""
        if self.shell is not None:
            await self.shell.stop()
        if self._server is not None:
            await self._server.stop(grace=0.5)
        if self._kv_server is not None:
            await self._kv_server.stop()
        if self._ranks is not None:
            await self._ranks.close()
        if self._mover is not None:
            await self._mover.stop()
        if self._segments is not None:
            await self._segments.stop()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.stop)
        if self._device is not None:
            self._device.close()


def _kv_transport(config: WorkerConfig, device: Device, credentials: MemberCredentials) -> KVTransport:
    """How this worker pulls KV."""
    layout = device.kv.layout
    control = GrpcKVTransport(block_bytes=layout.block_bytes, credentials=credentials)
    if config.transport == "grpc":
        return control
    memory = device.kv.device_memory
    if config.transport == "cuda_ipc" and memory is None:
        raise ConfigError("transport", config.transport, "auto or grpc: this GPU's memory cannot be shared")
    mapper = HostMapper(layout, device.kv.host_blocks) if memory is None else DeviceMapper(layout, memory)
    return MappedKVTransport(control, layout, mapper=mapper, required=config.transport != "auto")


def _of_any_block_size(
    usual: KVTransport, config: WorkerConfig, device: Device, credentials: MemberCredentials
) -> KVTransport:
    """`usual`, and a way to peers whose blocks have another size, unless mapped memory is demanded."""
    layout, plain = device.kv.layout, None
    if config.transport in ("auto", "grpc"):
        plain = GrpcKVTransport(block_bytes=largest_block_bytes(layout), credentials=credentials)
    if isinstance(usual, MappedKVTransport):
        return ReblockingTransport(usual, layout, plain=plain, own=usual.reblocks)
    return ReblockingTransport(usual, layout, plain=plain)
