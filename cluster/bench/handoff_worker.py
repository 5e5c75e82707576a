"""A worker process for `tandem bench handoff`: the real services, servers and transports, and a record of when what
happened. `python -m tandem.cluster.bench.handoff_worker` reads one JSON line, a `WorkerSpec`, from stdin, prints one
JSON line with its addresses when it serves, and answers every further line, a `Command`: with what it recorded since
the last one, or with what it has pulled. It ends with its stdin.

All times are the machine's monotonic clock, which the processes of one machine share.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from ...decode_worker.service import DecodeService
from ...kvtransfer.grpc_transport import GrpcKVServer, GrpcKVTransport
from ...kvtransfer.mapped.blocks import HostMapper
from ...kvtransfer.mapped.fd_passing import share
from ...kvtransfer.mapped.transport import MappedKVTransport
from ...kvtransfer.mover.worker import KVMover, spawn_mover
from ...kvtransfer.ticket import HandoffRefused, Hello, Peer, Ticket
from ...kvtransfer.transport import EndFrame, KVFrames, KVTransport, PullRequest, WrittenBlocks
from ...prefill_worker.service import PrefillService
from ..auth import OPEN
from ..clock import MonotonicClock
from ..config import EngineConfig, WorkerConfig
from ..engine.block_pool import BlockPool
from ..engine.devices.base import Device
from ..engine.devices.paced import PacedDevice
from ..engine.plan import StepOutput, StepPlan
from ..engine.policies import policy_for
from ..engine.prefix_cache import PrefixCache
from ..engine.scheduler import Scheduler
from ..engine.scheduler_events import SchedulerEvent, TokensEmitted
from ..proto.tandem_internal_v1_pb2_grpc import add_WorkerServicer_to_server
from ..rpc import make_server, new_epoch
from ..types import Role, StepTimeCoefficients
from ..worker.engine_thread import EngineThread
from ..worker.servicer import Servicer
from ..worker.shell import WorkerFacts, WorkerShell
from .handoff_traffic import Traffic, pull_over_and_over

MAX_MARKS = 1 << 16
MAX_MODEL_LEN = 1 << 20
VOCAB_SIZE = 32000
LEASE_S = 3600.0
"""KV that is pulled over and over stays until the process ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What the worker shall be."""

    worker_id: str
    role: str
    transport: str
    """`grpc`, `mapped` or `auto`."""
    checksum: bool
    token_bytes: int
    """KV of one token."""
    num_blocks: int
    block_size: int = 16
    step_s: float = 0.0
    """What every step takes at least."""
    spare_blocks: int = 0
    """Beyond those that the engine has: where KV that is pulled for its own sake goes."""
    kv_mover: str = "auto"
    """As `WorkerConfig.kv_mover`."""
    model: str | None = None
    """Computed by the `cpu` device; None: nothing is, the device is paced."""
    engine_cpu: int | None = None
    """Where the engine's thread is pinned; None: it is not."""
    other_cpus: tuple[int, ...] = ()
    """Where all other threads of the process are pinned; empty: they are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the worker is asked while it serves."""

    mute: bool = False
    """From now on tokens do not leave the engine, but the last ones of each sequence."""
    pull: dict[str, Any] | None = None
    """`Traffic`: pull over and over until the time is over; None: answer with the marks."""


@dataclass(frozen=True, slots=True)
class StepMark:
    """One sequence's row in one step."""

    seq_id: str
    launched_s: float
    done_s: float


@dataclass(frozen=True, slots=True)
class PlanMark:
    """One step."""

    launched_s: float
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PullMark:
    """One pull as the reader's transport saw it."""

    seq_id: str
    opened_s: float
    first_s: float
    """When the first block was there to be written."""
    last_s: float
    """When the last one was written."""
    bytes: int
    cpu_s: float
    """Processor time of the reader's event loop between the two; 0 where the transport writes by itself."""


@dataclass(frozen=True, slots=True)
class ConfirmMark:
    """One confirmation, from its sending to its answer."""

    seq_id: str
    sent_s: float
    answered_s: float


class Marks:
    """What happened since somebody asked; bounded, the oldest go first. Appended to by several threads."""

    def __init__(self) -> None:
        self.steps: deque[StepMark] = deque(maxlen=MAX_MARKS)
        self.plans: deque[PlanMark] = deque(maxlen=MAX_MARKS)
        self.pulls: deque[PullMark] = deque(maxlen=MAX_MARKS)
        self.confirms: deque[ConfirmMark] = deque(maxlen=MAX_MARKS)

    def take(self) -> dict[str, list[dict[str, Any]]]:
        """All of them, as JSON objects; they are forgotten."""
        taken = {}
        for name in ("steps", "plans", "pulls", "confirms"):
            marks = getattr(self, name)
            taken[name] = [asdict(marks.popleft()) for _ in range(len(marks))]
        return taken


class MarkedDevice(Device):
    """Another device, whose steps are recorded."""

    def __init__(self, device: Device, marks: Marks, engine_cpu: int | None) -> None:
        self._device = device
        self._marks = marks
        self._engine_cpu = engine_cpu
        self._launched: deque[tuple[StepPlan, float]] = deque()
        self.name, self.kv = device.name, device.kv
        self.vocab_size, self.fingerprint = device.vocab_size, device.fingerprint

    def launch(self, plan: StepPlan) -> None:
        if self._engine_cpu is not None:
            os.sched_setaffinity(0, {self._engine_cpu})  # of this thread, the engine's
            self._engine_cpu = None
        launched_s = time.monotonic()
        self._launched.append((plan, launched_s))
        self._marks.plans.append(PlanMark(launched_s, len(plan.rows), plan.num_tokens))
        self._device.launch(plan)

    def collect(self) -> StepOutput:
        output = self._device.collect()
        plan, launched_s = self._launched.popleft()
        done_s = time.monotonic()
        for row in plan.rows:
            self._marks.steps.append(StepMark(row.seq_id, launched_s, done_s))
        return output

    def close(self) -> None:
        self._device.close()


class MarkedTransport(KVTransport):
    """Another transport, whose pulls and confirmations are recorded."""

    def __init__(self, transport: KVTransport, marks: Marks, block_bytes: int) -> None:
        self._transport = transport
        self._marks = marks
        self._block_bytes = block_bytes

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        return await self._transport.hello(peer, mine, timeout_s=timeout_s)

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        opened_s, first_s, last_s, total_bytes = time.monotonic(), 0.0, 0.0, 0
        first_cpu_s = last_cpu_s = 0.0
        async with aclosing(self._transport.pull(peer, request, timeout_s=timeout_s)) as frames:
            async for came in frames:
                if isinstance(came, EndFrame):
                    key = request.ticket.decode_key
                    self._marks.pulls.append(
                        PullMark(key, opened_s, first_s, last_s, total_bytes, last_cpu_s - first_cpu_s)
                    )
                    yield came
                    return
                if isinstance(came, WrittenBlocks):
                    first_s = first_s or time.monotonic() - came.arrived_age_s
                    last_s = time.monotonic() - came.written_age_s
                    total_bytes += len(came.block_ids) * self._block_bytes
                    yield came
                    continue
                if not first_s:
                    first_s, first_cpu_s = time.monotonic(), time.thread_time()
                yield came
                last_s, last_cpu_s = time.monotonic(), time.thread_time()
                total_bytes += len(came) * self._block_bytes

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        sent_s = time.monotonic()
        await self._transport.confirm(peer, ticket, timeout_s=timeout_s)
        self._marks.confirms.append(ConfirmMark(ticket.decode_key, sent_s, time.monotonic()))

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._transport.abort(peer, ticket, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._transport.close()


class Muted:
    """What an engine tells, without its tokens where they are not to be sent."""

    def __init__(self, shell: WorkerShell) -> None:
        self._shell = shell
        self.muted = False

    def events(self, events: Sequence[SchedulerEvent]) -> None:
        """Engine thread."""
        if self.muted:
            events = [e for e in events if not isinstance(e, TokensEmitted) or e.finish_reason is not None]
        if events:
            self._shell.events_from_engine(events)


def _device(spec: WorkerSpec) -> Device:
    if spec.model is not None:
        from ..engine.devices.cpu import CpuDevice
        from ..models.reference import resolve_model

        kv_cache_bytes = (spec.num_blocks + spec.spare_blocks) * spec.block_size * spec.token_bytes
        files = resolve_model(spec.model)
        return CpuDevice(files, dtype="bfloat16", block_size=spec.block_size, kv_cache_bytes=kv_cache_bytes)
    return PacedDevice(
        VOCAB_SIZE,
        block_size=spec.block_size,
        num_blocks=spec.num_blocks + spec.spare_blocks,
        coefficients=StepTimeCoefficients(
            step_s=spec.step_s, prefill_token_s=0.0, decode_row_s=0.0, context_token_s=0.0
        ),
        pad_bytes_per_token=spec.token_bytes - 16,
    )


def _transport(spec: WorkerSpec, device: Device, mover: KVMover | None) -> KVTransport:
    layout = device.kv.layout
    if mover is not None:
        return mover.transport
    control = GrpcKVTransport(block_bytes=layout.block_bytes)
    if spec.transport == "grpc":
        return control
    mapper = HostMapper(layout, device.kv.host_blocks)
    return MappedKVTransport(control, layout, mapper=mapper, required=spec.transport == "mapped")


def _config(spec: WorkerSpec) -> WorkerConfig:
    engine = EngineConfig(
        device="paced", block_size=spec.block_size, max_batched_tokens=MAX_MODEL_LEN, prefix_cache=False
    )
    return WorkerConfig(
        worker_id=spec.worker_id,
        role=Role(spec.role),
        engine=engine,
        transport=spec.transport,
        checksum=spec.checksum,
        lease_s=LEASE_S,
    )


def _scheduler(config: WorkerConfig, pool: BlockPool, clock: MonotonicClock) -> Scheduler:
    engine = config.engine
    return Scheduler(
        block_pool=pool,
        prefix_cache=PrefixCache(pool, enabled=False),
        policy=policy_for(config.role),
        clock=clock,
        max_batched_tokens=engine.max_batched_tokens,
        max_running=engine.max_running,
        max_waiting=engine.max_waiting,
        max_model_len=min(MAX_MODEL_LEN, pool.num_blocks * pool.block_size),
        eos_token_ids=(),
    )


def _facts(spec: WorkerSpec, device: Device) -> WorkerFacts:
    return WorkerFacts(
        worker_id=spec.worker_id,
        epoch=new_epoch(),
        model="paced",
        fingerprint=device.fingerprint,
        kv_layout=device.kv.layout.to_bytes(),
        block_size=spec.block_size,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=device.vocab_size,
        device=device.name,
    )


async def serve(spec: WorkerSpec) -> None:
    """Serves until stdin ends."""
    marks = Marks()
    if spec.other_cpus:
        os.sched_setaffinity(0, spec.other_cpus)
    mover = await spawn_mover(spec.kv_mover, computes=True)
    device = MarkedDevice(_device(spec), marks, spec.engine_cpu)
    segment = device.kv.segment
    assert segment is not None
    if mover is not None:
        await mover.attach(device.kv, transport=spec.transport, credentials=OPEN)
    num_blocks = device.kv.num_blocks - spec.spare_blocks
    pool = BlockPool(num_blocks, spec.block_size, segment.generations[:num_blocks])
    config, facts, clock = _config(spec), _facts(spec, device), MonotonicClock()
    scheduler = _scheduler(config, pool, clock)
    segment.publish(facts.epoch)
    segments = await share(segment)
    shell = WorkerShell(config, facts, clock)
    muted = Muted(shell)
    engine = EngineThread(scheduler, device, on_events=muted.events, on_failure=shell.failure_from_engine)
    transport = _transport(spec, device, mover)
    prefill = PrefillService(shell, engine, device.kv, pool.generation, None if segments is None else segments.offer)
    block_bytes = device.kv.layout.block_bytes
    decode = DecodeService(shell, engine, device.kv, MarkedTransport(transport, marks, block_bytes))
    shell.assemble(engine, (prefill, decode))
    kv_server = None if mover is not None else GrpcKVServer(prefill.source, block_bytes=block_bytes)
    if mover is not None:
        mover.on_lost = shell.failure_from_engine
        kv_port = await mover.listen(prefill.source, "127.0.0.1:0")
    elif kv_server is not None:
        kv_port = await kv_server.start()
    server = make_server()
    add_WorkerServicer_to_server(Servicer(shell, prefill, decode), server)
    port = shell.credentials.listen(server, "127.0.0.1:0")
    await server.start()
    shell.address, shell.kv_address = f"127.0.0.1:{port}", f"127.0.0.1:{kv_port}"
    shell.start(_die)
    gc.freeze()
    about = {"epoch": facts.epoch, "fingerprint": facts.fingerprint}
    _say({"address": shell.address, "kv_address": shell.kv_address, **about})
    await _obey(marks, muted, transport, device, spare_blocks=tuple(range(num_blocks, device.kv.num_blocks)))
    await shell.stop()
    await server.stop(0.2)
    if kv_server is not None:
        await kv_server.stop()
    if mover is not None:
        await mover.stop()
    if segments is not None:
        await segments.stop()
    device.close()


async def _obey(
    marks: Marks, muted: Muted, transport: KVTransport, device: Device, *, spare_blocks: tuple[int, ...]
) -> None:
    """Answers commands until stdin ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = Command(**json.loads(line))
        muted.muted = command.mute
        if command.pull is None:
            _say(marks.take())
            continue
        try:
            _say(await pull_over_and_over(Traffic(**command.pull), transport, device.kv, spare_blocks))
        except HandoffRefused as refused:
            _say({"error": str(refused)})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _die(error: BaseException) -> None:
    print(f"the engine failed: {error}", file=sys.stderr, flush=True)
    sys.stdin.close()


if __name__ == "__main__":
    asyncio.run(serve(WorkerSpec(**json.loads(sys.stdin.readline()))))
