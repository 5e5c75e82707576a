"""A worker in virtual time: one engine, and the same holder and puller that its services drive in the runtime.

What `prefill_worker.service`, `decode_worker.service`, `kvtransfer.source` and `kvtransfer.sink` do with tasks, streams
and memory is done here with events and counts:

1. `reserve` promises KV, `prefill` and `decode` queue a sequence, as a router's commands do.
2. The engine's events go to the holder (blocks, watermark, end of prefill) and to the puller (blocks, first step).
3. A pull reads what is below the watermark, run after run, over the links between the two workers (`links`).
4. What a router would hear goes to `on_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ...kvtransfer.protocol.actions import (
    AbortPrefill,
    CancelPull,
    Confirm,
    Credit,
    Failed,
    HolderAction,
    KvReady,
    PullerAction,
    Refuse,
    ReleaseBlocks,
    Revoke,
    Serve,
    StartPull,
    Wake,
    WriterDone,
)
from ...kvtransfer.protocol.credits import CreditLedger
from ...kvtransfer.protocol.holder import HandoffHolder
from ...kvtransfer.protocol.puller import HandoffPuller
from ...kvtransfer.ticket import RefusalReason, Ticket
from ..engine.block_pool import BlockPool
from ..engine.policies import policy_for
from ..engine.prefix_cache import PrefixCache
from ..engine.scheduler import QueueFull, Scheduler
from ..engine.scheduler_events import BlocksGranted, PrefillAdvanced, SchedulerEvent, TokensEmitted
from ..latency.interface import StepCosts
from ..types import EngineLoad, Handoff, Role, SequenceSpec, StepTimeCoefficients, Urgency
from .engine import TOKEN, SimEngine
from .links import Medium
from .pull import Pull
from .timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a simulated worker is."""

    worker_id: str
    role: Role
    costs: StepCosts
    num_blocks: int
    block_size: int = 16
    block_bytes: int = 0
    """Of KV; what a handoff moves."""
    node: str = ""
    max_batched_tokens: int = 512
    max_running: int = 256
    max_waiting: int = 256
    max_model_len: int = 2048
    batching: str = "iteration"
    prefix_cache: bool = True
    credit_factor: float = 1.0
    """Of its blocks: how many may be promised at once."""
    credit_ttl_s: float = 10.0
    lease_s: float = 30.0
    pull_wait_s: float = 30.0


@dataclass(slots=True, kw_only=True)
class Heard:
    """What a worker tells a router of one sequence."""

    request_id: str
    tokens: int
    finished: bool
    queue_s: float
    prefill_s: float
    cached_tokens: int
    exposed_transfer_s: float = 0.0
    transferred_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """What a heartbeat says."""

    load: EngineLoad
    credited_blocks: int
    step_time: StepTimeCoefficients
    steps_total: int


@dataclass(slots=True)
class _Live:
    """A sequence that runs here."""

    request_id: str
    handoff: Handoff
    told: bool = False
    pull: Pull | None = None


class SimWorker:
    """See the module. `wire` names it to the others before anything runs."""

    def __init__(self, timeline: Timeline, spec: WorkerSpec, *, epoch: int, rpc_s: float) -> None:
        """`rpc_s`: how long a message to another worker is on its way."""
        self.spec = spec
        self.epoch = epoch
        self._timeline = timeline
        self._rpc_s = rpc_s
        pool = BlockPool(spec.num_blocks, spec.block_size)
        self.scheduler = Scheduler(
            block_pool=pool,
            prefix_cache=PrefixCache(pool, enabled=spec.prefix_cache),
            policy=policy_for(spec.role, spec.batching),
            clock=timeline,
            max_batched_tokens=max(spec.max_batched_tokens, spec.max_running),
            max_running=spec.max_running,
            max_waiting=spec.max_waiting,
            max_model_len=spec.max_model_len,
            eos_token_ids=(),
            max_outstanding_plans=spec.costs.pipeline_stages,
        )
        self.engine = SimEngine(timeline, self.scheduler, spec.costs, self._on_events)
        self.holder = HandoffHolder(
            worker_id=spec.worker_id,
            epoch=epoch,
            fingerprint="",
            block_size=spec.block_size,
            lease_s=spec.lease_s,
            pull_wait_s=spec.pull_wait_s,
        )
        self.credit_limit_blocks = max(1, int(spec.num_blocks * spec.credit_factor))
        self.puller = HandoffPuller(
            block_size=spec.block_size,
            credits=CreditLedger(limit_blocks=self.credit_limit_blocks, ttl_s=spec.credit_ttl_s, max_credits=4096),
        )
        self._live: dict[str, _Live] = {}
        self._readers: dict[int, Pull] = {}
        """Pulls of others that read here."""
        self._on_heard: Callable[[Heard], None] = lambda heard: None
        self._on_refused: Callable[[str], None] = lambda seq_id: None
        self._find: Callable[[str], SimWorker | None] = lambda worker_id: None
        self._links_to: Callable[[SimWorker, SimWorker], Sequence[Medium]] = lambda source, target: ()

    def wire(
        self,
        *,
        find: Callable[[str], SimWorker | None],
        links: Callable[[SimWorker, SimWorker], Sequence[Medium]],
        on_heard: Callable[[Heard], None],
        on_refused: Callable[[str], None],
    ) -> None:
        """`find`: the worker of that id; `links`: what KV crosses from one to the other; `on_heard`, `on_refused`: what
        a router is told of a sequence, at the moment it leaves here.
        """
        self._find, self._links_to = find, links
        self._on_heard, self._on_refused = on_heard, on_refused

    def status(self) -> Status:
        """As a heartbeat that leaves now."""
        load, engine = self.scheduler.load(), self.engine
        steps, rows = engine.steps_under_way()
        grown = steps * rows // self.spec.block_size
        load = replace(
            load,
            context_tokens=load.context_tokens + steps * rows,
            free_blocks=max(0, load.free_blocks - grown),
        )
        credited = self.puller.counts().credited_blocks
        return Status(load, credited, engine.fit.coefficients(), engine.steps_total + steps)

    def tick(self) -> None:
        """Ends credits, leases and waits that ran out, as the runtime's does a few times a second."""
        now_s = self._timeline.now_s()
        self._run_holder(self.holder.tick(now_s))
        self._run_puller(self.puller.tick(now_s))

    # --- the router's commands --------------------------------------------------------------------------------------

    def reserve(self, request_id: str, attempt: int, context_tokens: int, urgency: Urgency) -> int | None:
        """A credit's id, or None: not now. As `DecodeService.reserve`."""
        blocks = -(-(context_tokens + 1) // self.spec.block_size)
        others = max(0, self.scheduler.load().waiting - self.puller.counts().waiting_blocks)
        places = self.spec.max_waiting - others
        now_s = self._timeline.now_s()
        [action] = self.puller.reserve(request_id, 0, attempt, blocks, now_s, urgency=urgency, places=places)
        return action.credit_id if isinstance(action, Credit) else None

    def prefill(self, request_id: str, attempt: int, spec: SequenceSpec) -> None:
        """Queues a prompt, whose KV is handed off where the spec says OUT."""
        if spec.handoff is Handoff.OUT:
            now_s = self._timeline.now_s()
            actions = self.holder.prefill_submitted(request_id, 0, attempt, spec.context_tokens, now_s)
            if any(isinstance(action, Refuse) for action in actions):
                self._on_refused(spec.seq_id)
                return
        self._add(request_id, spec)

    def decode(self, request_id: str, attempt: int, spec: SequenceSpec, credit_id: int, ticket: Ticket | None) -> None:
        """Redeems a credit and queues the sequence; no ticket: it is prefilled here."""
        now_s = self._timeline.now_s()
        if ticket is None:
            actions = self.puller.submit_local(request_id, 0, attempt, credit_id, now_s)
        else:
            actions = self.puller.submit(ticket, credit_id, math.inf, now_s)
        if actions:
            self._on_refused(spec.seq_id)
            return
        self._add(request_id, spec)

    def _add(self, request_id: str, spec: SequenceSpec) -> None:
        self._live[spec.seq_id] = _Live(request_id, spec.handoff)

        def add(scheduler: Scheduler) -> None:
            try:
                scheduler.add(spec)
            except QueueFull:
                del self._live[spec.seq_id]
                self._on_refused(spec.seq_id)

        self.engine.submit(add)

    def _order(self, command: Callable[[Scheduler, str], object], key: str) -> None:
        """The engine's thread does it between two steps."""
        self.engine.submit(lambda scheduler: command(scheduler, key))

    # --- the engine's events ----------------------------------------------------------------------------------------

    def _on_events(self, events: Sequence[SchedulerEvent]) -> None:
        for event in events:
            live = self._live.get(event.seq_id)
            if live is not None:
                _HANDLERS[live.handoff](self, live, event)

    def _on_local(self, live: _Live, event: SchedulerEvent) -> None:
        if isinstance(event, TokensEmitted):
            self._tell(live, event)

    def _on_out(self, live: _Live, event: SchedulerEvent) -> None:
        match event:
            case BlocksGranted(seq_id=key):
                self._run_holder(self.holder.blocks_granted(key, event.blocks, event.cached_tokens))
            case PrefillAdvanced(seq_id=key):
                self._run_holder(self.holder.advanced(key, event.computed_tokens))
            case TokensEmitted(seq_id=key):
                now_s = self._timeline.now_s()
                self._tell(live, event)
                if event.finish_reason is not None:
                    self._run_holder(self.holder.prefill_failed(key, RefusalReason.FINISHED, now_s))
                else:
                    self._run_holder(self.holder.prefill_done(key, event.tokens[0], now_s))

    def _on_in(self, live: _Live, event: SchedulerEvent) -> None:
        match event:
            case BlocksGranted(seq_id=key):
                self._run_puller(self.puller.blocks_granted(key, event.blocks, event.cached_tokens))
            case TokensEmitted(seq_id=key):
                if not live.told:
                    self._run_puller(self.puller.first_step(key))
                self._tell(live, event)

    def _tell(self, live: _Live, event: TokensEmitted) -> None:
        heard = Heard(
            request_id=live.request_id,
            tokens=event.index + len(event.tokens),
            finished=event.finish_reason is not None,
            queue_s=event.queue_s,
            prefill_s=event.prefill_s,
            cached_tokens=event.cached_tokens,
        )
        if live.pull is not None and not live.told:
            heard.exposed_transfer_s = live.pull.exposed_s
            heard.transferred_bytes = live.pull.received_bytes
        live.told = True
        if heard.finished:
            del self._live[event.seq_id]
        self._on_heard(heard)

    # --- the holder -------------------------------------------------------------------------------------------------

    def _run_holder(self, actions: Sequence[HolderAction]) -> int | None:
        served = None
        for action in actions:
            match action:
                case Serve(reader_id=reader_id):
                    served = reader_id
                case Wake(key=key):
                    for pull in [pull for pull in self._readers.values() if pull.key_there == key]:
                        pull.go_on()
                case Revoke(reader_ids=reader_ids):
                    for reader_id in reader_ids:
                        self._readers[reader_id].stop(action.reason)
                case ReleaseBlocks(key=key):
                    self._live.pop(key, None)
                    self._order(Scheduler.release, key)
                case AbortPrefill(key=key):
                    self._live.pop(key, None)
                    self._order(Scheduler.abort, key)
                case Refuse():
                    return None
        return served

    def open_pull(self, pull: Pull) -> int | None:
        """See `Reading.open_pull`."""
        action, now_s = pull.action, self._timeline.now_s()
        reader_id = self._run_holder(self.holder.pull(action.ticket, action.first_block, action.pull_index, now_s))
        if reader_id is not None:
            self._readers[reader_id] = pull
        return reader_id

    def close_pull(self, reader_id: int) -> None:
        """See `Reading.close_pull`."""
        self._readers.pop(reader_id, None)
        self._run_holder(self.holder.pull_ended(reader_id, self._timeline.now_s()))

    def confirm(self, ticket: Ticket) -> None:
        """The reader has made its first step."""
        self._run_holder(self.holder.confirm(ticket, self._timeline.now_s()))

    # --- the puller -------------------------------------------------------------------------------------------------

    def _run_puller(self, actions: Sequence[PullerAction]) -> None:
        for action in actions:
            match action:
                case StartPull():
                    self._start(action)
                case KvReady(key=key):
                    self._order(_join, key)
                case WriterDone(key=key):
                    self._order(Scheduler.writer_done, key)
                case CancelPull(key=key):
                    pull = self._live[key].pull
                    assert pull is not None
                    pull.cancel()
                case Confirm(ticket=ticket):
                    self._timeline.after(self._rpc_s, partial(self._confirm, ticket))
                case Failed(key=key):
                    del self._live[key]
                    self._order(Scheduler.abort, key)
                    self._on_refused(key)
                case _:
                    raise AssertionError(f"{action} has no effect here")

    def _start(self, action: StartPull) -> None:
        source = self._find(action.ticket.prefill_worker)
        self._live[action.key].pull = Pull(
            self._timeline,
            action,
            puller=self.puller,
            source=source,
            links=() if source is None else self._links_to(source, self),
            block_bytes=self.spec.block_bytes,
            rpc_s=self._rpc_s,
            run=self._run_puller,
        )

    def _confirm(self, ticket: Ticket) -> None:
        source = self._find(ticket.prefill_worker)
        if source is not None:
            source.confirm(ticket)
        self.puller.confirm_ended(ticket.decode_key, self._timeline.now_s())


def _join(scheduler: Scheduler, key: str) -> None:
    scheduler.kv_ready(key, TOKEN)


_HANDLERS = {Handoff.NONE: SimWorker._on_local, Handoff.OUT: SimWorker._on_out, Handoff.IN: SimWorker._on_in}
