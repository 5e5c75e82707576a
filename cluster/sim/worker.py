"""A worker in virtual time: one engine, and the same holder and puller that its services drive in the runtime.

What `prefill_worker.service`, `decode_worker.service`, `kvtransfer.source` and `kvtransfer.sink` do with tasks, streams
and memory is done here with events and counts:

1. `reserve` promises KV, `prefill` and `decode` queue a sequence, as a router's commands do.
2. The engine's events go to the holder (blocks, watermark, end of prefill) and to the puller (blocks, first step).
3. A `pull` of its `sink` reads what is below the watermark, run after run, from another one's `source`, over the links
   between the two workers (`links`).
4. What a router would hear goes to `Wiring.heard` and `Wiring.turned`.

One object is one life: a worker that fails (`die`) does nothing more, and comes back as another object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ...kvtransfer.protocol.actions import Credit, Refuse
from ...kvtransfer.protocol.credits import CreditLedger
from ...kvtransfer.protocol.holder import HandoffHolder
from ...kvtransfer.protocol.puller import HandoffPuller
from ...kvtransfer.ticket import RefusalReason, Ticket
from ..engine.block_pool import BlockPool
from ..engine.policies import policy_for
from ..engine.prefix_cache import PrefixCache
from ..engine.scheduler import QueueFull, Scheduler
from ..engine.scheduler_events import BlocksGranted, PrefillAdvanced, SchedulerEvent, TokensEmitted
from ..types import EngineLoad, Handoff, SequenceSpec, Side, Urgency
from .engine import TOKEN, SimEngine, beyond_stage_s, prior_of
from .links import Medium
from .observer import StepSpan, TransferSpan
from .pull import Pull
from .sink import SimSink
from .source import SimSource
from .timeline import Timeline
from .worker_spec import Heard, Status, Turned, WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """A worker's way to the others."""

    find: Callable[[str], SimWorker | None]
    """The worker of that id, while it lives."""
    links: Callable[[SimWorker, SimWorker], Sequence[Medium]]
    """What KV crosses from one to the other."""
    heard: Callable[[Heard], None]
    """What a router is told of a sequence, at the moment it leaves here."""
    turned: Callable[[Turned], None]
    """The same of one that cannot go on here."""
    on_step: Callable[[StepSpan], None] | None = None
    on_transfer: Callable[[TransferSpan], None] | None = None
    """Who watches (`observer`)."""


@dataclass(slots=True)
class _Live:
    """A sequence that runs here."""

    request_id: str
    side: Side
    attempt: int
    handoff: Handoff
    told: bool = False
    exposed_transfer_s: float = 0.0
    transferred_bytes: int = 0


class SimWorker:
    """See the module."""

    def __init__(self, timeline: Timeline, spec: WorkerSpec, wiring: Wiring, *, epoch: int, rpc_s: float) -> None:
        """`rpc_s`: how long a message to another worker is on its way."""
        self.spec = spec
        self.epoch = epoch
        self.alive = True
        self._wiring = wiring
        self._timeline = timeline
        pool = BlockPool(spec.num_blocks, spec.block_size)
        policy = policy_for(spec.role, spec.batching)
        self.scheduler = Scheduler(
            block_pool=pool,
            prefix_cache=PrefixCache(pool, enabled=spec.prefix_cache),
            policy=policy,
            clock=timeline,
            max_batched_tokens=max(spec.max_batched_tokens, spec.max_running),
            max_running=spec.max_running,
            max_waiting=spec.max_waiting,
            max_model_len=spec.max_model_len,
            eos_token_ids=(),
            max_outstanding_plans=spec.costs.pipeline_stages,
        )
        self.engine = SimEngine(
            timeline,
            self.scheduler,
            spec.costs,
            self._on_events,
            worker_id=spec.worker_id,
            on_span=wiring.on_step,
            prior=prior_of(spec.costs, spec.role),  # type: ignore[arg-type]  # a Protocol names no hash; all have one
            beyond_stage_s=beyond_stage_s(spec.costs, spec.role),
            pads_prompts=policy.pads_prompts,
        )
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
        self.source = SimSource(timeline, self.holder, self._over)
        self._sink = SimSink(
            timeline,
            self.puller,
            block_bytes=spec.block_bytes,
            rpc_s=rpc_s,
            source=self._source_of,
            links=self._links_from,
            on_ready=self._kv_ready,
            on_writer_done=partial(self.engine.submit, Scheduler.writer_done),
            on_failed=self._pull_failed,
        )

    def status(self) -> Status:
        """As a heartbeat that leaves now."""
        engine = self.engine
        steps, _ = engine.steps_under_way()
        return Status(self.load(), self.puller.credited_blocks, engine.fit.coefficients(), engine.learned_steps + steps)

    def load(self) -> EngineLoad:
        """As of now: with what steps under way have done already."""
        load = self.scheduler.load()
        steps, rows = self.engine.steps_under_way()
        if steps:
            load = load._replace(
                context_tokens=load.context_tokens + steps * rows,
                free_blocks=max(0, load.free_blocks - steps * rows // self.spec.block_size),
            )
        return load

    def tick(self) -> None:
        """Ends credits, leases and waits that ran out, as the runtime's does a few times a second."""
        now_s = self._timeline.time_s
        self.source.run(self.holder.tick(now_s))
        self._sink.run(self.puller.tick(now_s))

    @property
    def idle(self) -> bool:
        """Whether nothing runs here or is owed to anybody: until it is asked for something, it says the same."""
        puller = self.puller.counts()
        return not (self.scheduler.has_work or self.holder.counts().live or puller.live or puller.wants)

    def drawn(self, seq_id: str) -> int:
        """Output tokens of that sequence by now; 0 where it is not here."""
        return self.engine.drawn(seq_id) if seq_id in self._live else 0

    # --- the router's commands --------------------------------------------------------------------------------------

    def reserve(self, request_id: str, attempt: int, context_tokens: int, urgency: Urgency) -> int | None:
        """A credit's id, or None: not now. As `DecodeService.reserve`."""
        if not self.alive:
            return None
        blocks = -(-(context_tokens + 1) // self.spec.block_size)
        others = max(0, self.scheduler.waiting - self.puller.waiting_blocks)
        places = self.spec.max_waiting - others
        now_s = self._timeline.time_s
        [action] = self.puller.reserve(request_id, 0, attempt, blocks, now_s, urgency=urgency, places=places)
        return action.credit_id if isinstance(action, Credit) else None

    def prefill(self, request_id: str, attempt: int, spec: SequenceSpec) -> None:
        """Queues a prompt, whose KV is handed off where the spec says OUT."""
        if not self.alive:
            return
        live = _Live(request_id, Side.PREFILL, attempt, spec.handoff)
        if spec.handoff is Handoff.OUT:
            now_s = self._timeline.time_s
            actions = self.holder.prefill_submitted(request_id, 0, attempt, spec.context_tokens, now_s)
            for action in actions:
                if isinstance(action, Refuse):
                    self._turn(live, action.reason, lost=False)
                    return
            self.source.run(actions)
        self._add(live, spec)

    def decode(
        self,
        request_id: str,
        attempt: int,
        spec: SequenceSpec,
        credit_id: int,
        ticket: Ticket | None,
        deadline_s: float = math.inf,
    ) -> None:
        """Redeems a credit and queues the sequence; no ticket: it is prefilled here."""
        if not self.alive:
            return
        now_s, live = self._timeline.time_s, _Live(request_id, Side.DECODE, attempt, spec.handoff)
        if ticket is None:
            actions = self.puller.submit_local(request_id, 0, attempt, credit_id, now_s)
        else:
            actions = self.puller.submit(ticket, credit_id, deadline_s, now_s)
        for action in actions:
            if isinstance(action, Refuse):
                self._turn(live, action.reason, lost=False)
                return
        self._add(live, spec)

    def abort_prefill(self, request_id: str, attempt: int) -> None:
        """Ends that prefill, and what is left of it, wherever it stands."""
        if not self.alive:
            return
        for key in self._keys(request_id, Side.PREFILL, attempt):
            if self._live[key].handoff is not Handoff.OUT:
                del self._live[key]
                self.engine.submit(Scheduler.abort, key)
        self.source.run(self.holder.abort_attempt(request_id, 0, attempt, self._timeline.time_s))

    def abort_decode(self, request_id: str, attempt: int, *, notify_holder: bool) -> None:
        """Ends that attempt, credit included. `notify_holder`: its KV is wanted by nobody any more."""
        if not self.alive:
            return
        for key in self._keys(request_id, Side.DECODE, attempt):
            del self._live[key]
            self.engine.submit(Scheduler.abort, key)
        now_s = self._timeline.time_s
        self._sink.run(self.puller.abort(request_id, 0, attempt, now_s, notify=notify_holder))

    def die(self) -> None:
        """Everything that ran here is lost. Tokens that were drawn have been sent."""
        for key, live in self._live.items():
            drawn = self.engine.drawn(key)
            if drawn and live.handoff is not Handoff.OUT and (live.told or live.handoff is Handoff.NONE):
                self._wiring.heard(Heard(live.request_id, live.side, live.attempt, tokens=drawn))
        self.alive = False
        self.engine.stop()
        self._sink.die()
        self.source.die()
        self._live.clear()

    def _keys(self, request_id: str, side: Side, attempt: int) -> list[str]:
        """Sequences of that request and side, of `attempt` and those before it."""
        names = [f"{request_id}/0/{side[0]}{number}" for number in range(1, attempt + 1)]
        return [name for name in names if name in self._live]

    def _add(self, live: _Live, spec: SequenceSpec) -> None:
        self._live[spec.seq_id] = live
        self.engine.submit(self._add_now, spec)

    def _add_now(self, scheduler: Scheduler, spec: SequenceSpec) -> None:
        live = self._live.get(spec.seq_id)
        if live is None:  # aborted meanwhile
            return
        try:
            scheduler.add(spec)
        except QueueFull:
            del self._live[spec.seq_id]
            self._not_added(live, spec.seq_id)

    def _not_added(self, live: _Live, key: str) -> None:
        """The engine's queue is full: what the handoff keeps of it goes, and the router may try elsewhere."""
        now_s = self._timeline.time_s
        if live.handoff is Handoff.OUT:
            self.source.run(self.holder.prefill_failed(key, RefusalReason.PREFILL_FAILED, now_s))
        elif live.side is Side.DECODE:
            self._sink.run(self.puller.abort(live.request_id, 0, live.attempt, now_s, notify=False))
        self._turn(live, RefusalReason.LIMIT, lost=False)

    def _turn(self, live: _Live, reason: RefusalReason, *, lost: bool) -> None:
        self._wiring.turned(
            Turned(live.request_id, live.side, live.attempt, reason.value, lost=lost, retryable=reason.retryable)
        )

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
                self.source.run(self.holder.blocks_granted(key, event.blocks, event.cached_tokens))
            case PrefillAdvanced(seq_id=key):
                self.source.run(self.holder.advanced(key, event.computed_tokens))
            case TokensEmitted(seq_id=key):
                now_s = self._timeline.time_s
                self._tell(live, event)
                if event.finish_reason is not None:
                    self.source.run(self.holder.prefill_failed(key, RefusalReason.FINISHED, now_s))
                else:
                    self.source.run(self.holder.prefill_done(key, event.tokens[0], now_s))

    def _on_in(self, live: _Live, event: SchedulerEvent) -> None:
        match event:
            case BlocksGranted(seq_id=key):
                self._sink.run(self.puller.blocks_granted(key, event.blocks, event.cached_tokens))
            case TokensEmitted(seq_id=key):
                if not live.told:
                    self._sink.run(self.puller.first_step(key))
                self._tell(live, event)

    def _tell(self, live: _Live, event: TokensEmitted) -> None:
        """A router hears of a sequence's first tokens here and of its last: those between say nothing new."""
        finished = event.finish_reason is not None
        if live.told and not finished:
            return
        live.told = True
        tokens, transfer = event.index + len(event.tokens), (live.exposed_transfer_s, live.transferred_bytes)
        waterfall = (event.queue_s, event.prefill_s, event.cached_tokens, *transfer)
        heard = Heard(live.request_id, live.side, live.attempt, tokens, finished, *waterfall)
        if finished:
            del self._live[event.seq_id]
        self._wiring.heard(heard)

    # --- what becomes of handoffs -----------------------------------------------------------------------------------

    def _over(self, command: Callable[[Scheduler, str], object], key: str) -> None:
        """The holder needs that sequence no more."""
        self._live.pop(key, None)
        self.engine.submit(command, key)

    def _source_of(self, worker_id: str) -> SimSource | None:
        worker = self._wiring.find(worker_id)
        return None if worker is None else worker.source

    def _links_from(self, worker_id: str) -> Sequence[Medium]:
        worker = self._wiring.find(worker_id)
        return () if worker is None else self._wiring.links(worker, self)

    def _kv_ready(self, key: str, pull: Pull) -> None:
        live, on_transfer = self._live.get(key), self._wiring.on_transfer
        if live is not None:
            live.exposed_transfer_s, live.transferred_bytes = pull.exposed_s, pull.received_bytes
        if on_transfer is not None:
            ticket = pull.action.ticket
            on_transfer(
                TransferSpan(
                    request_id=ticket.request_id,
                    source=ticket.prefill_worker,
                    target=self.spec.worker_id,
                    start_s=pull.opened_s,
                    end_s=self._timeline.time_s,
                    size_bytes=pull.received_bytes,
                    exposed_s=pull.exposed_s,
                )
            )
        self.engine.submit(_join, key)

    def _pull_failed(self, key: str, reason: RefusalReason) -> None:
        self.engine.submit(Scheduler.abort, key)
        live = self._live.pop(key, None)
        if live is not None:
            self._turn(live, reason, lost=True)


def _join(scheduler: Scheduler, key: str) -> None:
    scheduler.kv_ready(key, TOKEN)


_HANDLERS = {Handoff.NONE: SimWorker._on_local, Handoff.OUT: SimWorker._on_out, Handoff.IN: SimWorker._on_in}
