"""What every worker process is, whatever its role: identity, engine thread, streams to routers, live sequences,
heartbeats.

Life of a worker: built (`launch.compose`) → `start`: engine thread and gRPC server run, heartbeats begin → serves →
`drain`: takes no new work, running work goes on → `stop`: streams, server, engine, device, in that order.

Everything here but the engine thread lives on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from grpc import aio

from ... import __version__
from ...kernels.picked import Picked
from ...kvtransfer.freed_memory import keep_freed_memory
from ..auth import OPEN, MemberCredentials
from ..clock import Clock
from ..config import WorkerConfig
from ..engine.scheduler import QueueFull
from ..engine.scheduler_events import SchedulerEvent
from ..messages import step_time_to_proto
from ..proto import tandem_internal_v1_pb2 as pb
from ..proto.tandem_internal_v1_pb2_grpc import RegistryStub
from ..rpc import HEARTBEAT_TIMEOUT_S, PROTOCOL_VERSION, Refusal, open_channel
from ..types import Role, SequenceSpec
from .engine_thread import EngineStopped, EngineThread
from .outbox import Outbox
from .services import LiveSequence, RoleService

logger = logging.getLogger(__name__)
TICK_S = 0.1
SWITCH_INTERVAL_S = 0.0005
"""How long the loop may keep the interpreter's lock while the engine's thread wants it, between two steps: the 5 ms
that Python gives it are as long as a step.
"""
ADMIT_WAIT_S = 0.5
"""How long a submission waits for the engine's answer, which comes between two steps. Well below `CONTROL_TIMEOUT_S`,
or nobody would get into an engine whose steps take longer than that.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """What does not change during a worker's life."""

    worker_id: str
    epoch: int
    model: str
    fingerprint: str
    kv_layout: bytes
    block_size: int
    max_model_len: int
    vocab_size: int
    device: str
    picked: Picked | None = None
    """Who computes, and why; None: nobody."""
    other_ranks: tuple[pb.RankProcess, ...] = ()
    """Of a worker of several processes: its ranks from 1 on."""


class WorkerShell:
    """Shared state of one worker process; the services and the servicer work on it."""

    def __init__(
        self, config: WorkerConfig, facts: WorkerFacts, clock: Clock, credentials: MemberCredentials = OPEN
    ) -> None:
        self.config = config
        self.credentials = credentials
        self.facts = facts
        self.clock = clock
        self.role: Role = config.role
        self.role_version = 1
        self.draining = False
        self.address = ""
        self.kv_address = ""
        self.kv_mover_pid = 0
        """Of the process that moves this worker's KV; 0: its own loop does."""
        self.outbox = Outbox(facts.epoch)
        self.failure: BaseException | None = None
        self.on_leave: Callable[[float], None] | None = None
        """Drains this worker within that many seconds and ends its process; set by whoever owns the process. Returns at
        once, and may be called again.
        """
        self._engine: EngineThread | None = None
        self._services: tuple[RoleService, ...] = ()
        self._live: dict[str, LiveSequence] = {}
        self._by_router: dict[str, set[str]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ticked = asyncio.Event()
        self._news = asyncio.Event()
        """Set, and replaced, when routers should hear of this worker before its next heartbeat is due."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_failure: Callable[[BaseException], None] = lambda error: None

    # --- assembly ---------------------------------------------------------------------------------------------------

    def assemble(self, engine: EngineThread, services: Sequence[RoleService]) -> None:
        """Joins the parts that need the shell to exist first. Once, before `start`."""
        self._engine = engine
        self._services = tuple(services)

    @property
    def engine(self) -> EngineThread:
        """The engine thread; set by `assemble`."""
        assert self._engine is not None, "the shell is not assembled"
        return self._engine

    def start(self, on_failure: Callable[[BaseException], None]) -> None:
        """Starts the engine thread, the ticks and the heartbeats on the running loop. `address` must be set."""
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        keep_freed_memory()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.engine.start()
        self._tasks.append(asyncio.create_task(self._tick_forever()))
        for registry in self.config.routers:
            self._tasks.append(asyncio.create_task(self._heartbeat_forever(registry)))
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        if self.failure is not None:  # of something that was started before
            self._fail()

    def begin_drain(self) -> None:
        """From now on new work is refused, and routers hear of it at once."""
        self.draining = True
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def stop(self) -> None:
        """Ends tasks, streams and the engine; idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self.draining and self.failure is None and self.idle:
            self.outbox.leave()
        self.outbox.close()
        for service in self._services:
            await service.close()
        await asyncio.to_thread(self.engine.stop, 30.0)

    # --- work -------------------------------------------------------------------------------------------------------

    def check_takes_work(self, service: RoleService, router_id: str, epoch: int) -> None:
        """Raises the refusal with which a worker turns away what is not for it; `epoch` is the life that is meant."""
        if epoch != self.facts.epoch:
            message = f"epoch: {epoch} is another life of worker {self.facts.worker_id}, now {self.facts.epoch}"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message)
        if self.failure is not None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"worker {self.facts.worker_id} has failed: {self.failure}")
        if self.draining:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"worker {self.facts.worker_id} is draining")
        if self.role not in service.roles:
            message = f"worker {self.facts.worker_id} has role {self.role} now and does not {service.side}"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message)
        if not self.outbox.attached(router_id):
            message = f"router {router_id!r} is not attached to worker {self.facts.worker_id}: results would be lost"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message)

    def admit(self, sequence: LiveSequence, timeout_s: float) -> None:
        """Registers a sequence: from now on it is ended when its deadline passes or its router goes."""
        assert sequence.seq_id not in self._live, f"{sequence.seq_id} is admitted twice"
        assert self._loop is not None
        sequence.timer = self._loop.call_later(timeout_s, self._deadline, sequence.seq_id)
        self._live[sequence.seq_id] = sequence
        self._by_router.setdefault(sequence.router_id, set()).add(sequence.seq_id)

    async def add_to_engine(self, spec: SequenceSpec) -> None:
        """Queues an admitted sequence. `Refusal` when the queue is full or the engine is gone, ValueError when it never
        fits. Whatever is raised, a cancellation of the caller included, the engine does not keep the sequence.

        An engine in the middle of a long step cannot say yet: the caller is not kept, and a no that comes later ends
        the sequence as a failure.
        """
        added = asyncio.wrap_future(self.engine.submit(lambda scheduler: scheduler.add(spec)))
        try:
            done, _ = await asyncio.wait({added}, timeout=ADMIT_WAIT_S)
        except asyncio.CancelledError:
            self.engine.submit(lambda scheduler: scheduler.abort(spec.seq_id))
            added.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else will look at it
            raise
        if not done:
            added.add_done_callback(lambda done: self._answered_late(spec.seq_id, done))
            return
        try:
            added.result()
        except QueueFull as full:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"worker {self.facts.worker_id}: {full}") from full
        except EngineStopped as stopped:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"worker {self.facts.worker_id}: {stopped}") from stopped

    def _answered_late(self, seq_id: str, added: asyncio.Future[None]) -> None:
        """The engine took a sequence, or not, whose caller had its answer already."""
        error = None if added.cancelled() else added.exception()
        sequence = self._live.get(seq_id)
        if error is not None and sequence is not None:
            reason, retryable = ("invalid", False) if isinstance(error, ValueError) else ("queue_full", True)
            self.post_failure(sequence, reason, str(error), retryable=retryable)
            sequence.owner.end(sequence, reason)

    def forget(self, seq_id: str) -> LiveSequence | None:
        """Unregisters a sequence that has ended; idempotent."""
        sequence = self._live.pop(seq_id, None)
        if sequence is None:
            return None
        if sequence.timer is not None:
            sequence.timer.cancel()
        siblings = self._by_router[sequence.router_id]
        siblings.discard(seq_id)
        if not siblings:
            del self._by_router[sequence.router_id]
        return sequence

    def sequences_of(self, router_id: str) -> tuple[LiveSequence, ...]:
        """What this worker runs for a router."""
        return tuple(self._live[seq_id] for seq_id in self._by_router.get(router_id, ()))

    def post(self, sequence: LiveSequence, event: pb.Event) -> None:
        """Tells the sequence's router; leaves with the next flush."""
        event.request_id = sequence.request_id
        event.choice = sequence.choice
        event.attempt = sequence.attempt
        event.side = pb.SIDE_PREFILL if sequence.side == "prefill" else pb.SIDE_DECODE
        self.outbox.post(sequence.router_id, event)

    def post_failure(self, sequence: LiveSequence, reason: str, message: str, *, retryable: bool) -> None:
        """Tells the router that this attempt has failed, at once."""
        failed = pb.FailedEvent(reason=reason, message=message, retryable=retryable)
        self.post(sequence, pb.Event(failed=failed))
        self.outbox.flush()

    def router_gone(self, router_id: str) -> None:
        """Its stream broke: nobody hears the results of its sequences any more, so they end."""
        for sequence in self.sequences_of(router_id):
            sequence.owner.end(sequence, "router_gone")

    def _deadline(self, seq_id: str) -> None:
        sequence = self._live.get(seq_id)
        if sequence is not None:
            self.post_failure(sequence, "deadline", "the request's time ran out on the worker", retryable=False)
            sequence.owner.end(sequence, "deadline")

    # --- engine side ------------------------------------------------------------------------------------------------

    def events_from_engine(self, events: Sequence[SchedulerEvent]) -> None:
        """Engine thread: hands a step's events to the loop in one wake-up."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._handle_events, events)
        except RuntimeError:
            logger.debug("events after the loop has closed are dropped")

    def failure_from_engine(self, error: BaseException) -> None:
        """Any thread: the engine, or what else the worker cannot be without, is dead; the process must follow."""
        self.failure = error
        if self._loop is None:
            return  # `start` will see it
        try:
            self._loop.call_soon_threadsafe(self._fail)
        except RuntimeError:
            logger.debug("a failure after the loop has closed needs no report")

    def _fail(self) -> None:
        """Ends every stream, so that routers go on elsewhere even where the process cannot end by itself."""
        assert self.failure is not None
        self.begin_drain()
        self.outbox.close()
        self._on_failure(self.failure)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """Ticks and heartbeats end with the worker; one that breaks would leave leases and promises for ever."""
        error = None if task.cancelled() else task.exception()
        if error is not None and self.failure is None:
            logger.error("worker %s cannot go on", self.facts.worker_id, exc_info=error)
            self.failure = error
            self._fail()

    def _handle_events(self, events: Sequence[SchedulerEvent]) -> None:
        try:
            for event in events:
                sequence = self._live.get(event.seq_id)
                if sequence is None:
                    continue
                try:
                    sequence.owner.on_event(sequence, event)
                except Exception as error:  # one sequence ends; the rest of the step's events must not be lost
                    logger.exception("%s of %s", type(event).__name__, event.seq_id)
                    self.post_failure(sequence, "internal", f"{type(error).__name__}: {error}", retryable=True)
                    sequence.owner.end(sequence, "internal")
        finally:
            self.outbox.flush()

    # --- status -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No live sequence and nothing promised: a drain is complete."""
        return not self._live and all(service.idle() for service in self._services)

    async def wait_idle(self) -> None:
        """Returns when a drain is complete; looked at with every tick."""
        while not self.idle:
            self._ticked.clear()
            await self._ticked.wait()

    def status(self) -> pb.WorkerStatus:
        """What heartbeats and the Status call say."""
        engine, facts, engine_config = self.engine.status, self.facts, self.config.engine
        load = engine.load
        status = pb.WorkerStatus(
            worker_id=facts.worker_id,
            epoch=facts.epoch,
            role=self.role,
            role_version=self.role_version,
            address=self.address,
            kv_address=self.kv_address,
            protocol_version=PROTOCOL_VERSION,
            model=facts.model,
            fingerprint=facts.fingerprint,
            kv_layout=facts.kv_layout,
            max_model_len=facts.max_model_len,
            draining=self.draining,
            device=facts.device,
            pid=os.getpid(),
            block_size=facts.block_size,
            num_blocks=load.num_blocks,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            waiting=load.waiting,
            running=load.running,
            held=load.held,
            queued_prefill_tokens=load.queued_prefill_tokens,
            patient_prefill_tokens=load.patient_prefill_tokens,
            context_tokens=load.context_tokens,
            max_waiting=engine_config.max_waiting,
            max_running=engine_config.max_running,
            max_batched_tokens=engine_config.max_batched_tokens,
            step_time=step_time_to_proto(engine.step_time),
            learned_steps=engine.learned_steps,
            streams=len(self._live),
            integrity_ok=self.failure is None,
            preemptions_total=load.preemptions_total,
            prefix_queries_tokens_total=load.prefix_queries_tokens_total,
            prefix_hits_tokens_total=load.prefix_hits_tokens_total,
            steps_total=engine.steps_total,
            computed_tokens_total=engine.computed_tokens_total,
            late_steps_total=engine.late_steps_total,
            threads=engine_config.threads,
            cpus=engine_config.cpus,
            version=__version__,
            integrity_age_s=engine.integrity_age_s,
            kv_mover_pid=self.kv_mover_pid,
            kernels="" if facts.picked is None else facts.picked.kernels,
            kernels_reason="" if facts.picked is None else facts.picked.reason,
            tensor_parallel=engine_config.tensor_parallel,
            pipeline_stages=engine_config.pipeline_stages,
            other_ranks=facts.other_ranks,
            kv_dtype=engine_config.kv_dtype,
        )
        for service in self._services:
            service.fill_status(status)
        return status

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self.clock.now_s()
            for service in self._services:
                service.tick(now_s)
            self._ticked.set()

    async def _heartbeat_forever(self, registry: str) -> None:
        refused = False
        async with open_channel(registry, self.credentials) as channel:
            stub = RegistryStub(channel)
            while True:
                news = self._news
                try:
                    await stub.Heartbeat(self.status(), timeout=HEARTBEAT_TIMEOUT_S)
                except aio.AioRpcError as error:
                    stranger = error.code() is grpc.StatusCode.UNAUTHENTICATED
                    level = logging.WARNING if stranger and not refused else logging.DEBUG
                    logger.log(level, "heartbeat to %s: %s", registry, error.details())
                    refused = stranger
                with contextlib.suppress(
                    TimeoutError
                ):  # not `wait_for`: until 3.12 it forgets a cancel that comes with news
                    async with asyncio.timeout(self.config.heartbeat_interval_s):
                        await news.wait()
