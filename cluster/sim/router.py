"""The router in virtual time: the runtime's admission, dispatch order, forecasts and rankings, with calls that take a
fixed time instead of a network.

A request's way: `arrive` (after the router's own work on it) → admission → the dispatch queue → placement, with a
credit of the decode worker → both halves → first token, tokens, end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...kvtransfer.ticket import Ticket
from ...router.admission import Admission
from ...router.dispatch_policy import DispatchPolicy
from ...router.errors import Overloaded
from ...router.forecast import Forecast, forecast, learned, room_tokens
from ...router.placement import WorkerView, idle_tpot_s, keeps_tpot, rank_decode, rank_mixed, rank_prefill
from ...router.placing import Path
from ...router.prefix_index import PrefixIndex
from ...router.slo_classes import Promise
from ..types import Handoff, Role, SamplingParams, SequenceSpec, Side, Urgency, seq_id
from .member import SimMember
from .request import Asked, Outcome
from .timeline import Event, Timeline
from .worker import Heard, WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """What a simulated router is."""

    promises: dict[str, Promise]
    """By SLO class."""
    max_waiting: int = 1024
    refuses: bool = True
    """Whether a request whose promise cannot be kept is refused, or waits all the same."""
    own_s: float = 0.0
    """The router's work on a request before its admission: text, checks."""
    own_token_s: float = 0.0
    """The same, for each token of its prompt."""
    rpc_s: float = 0.0
    """A command's way to a worker, and a token's way back."""
    local_threshold_tokens: int = 0
    decode_after_prefill: bool = False
    """The decode worker hears of a request only when its prompt is computed: no transfer overlaps with prefill."""
    heartbeat_s: float = 0.25


@dataclass(slots=True)
class _Request:
    """One request under way."""

    asked: Asked
    outcome: Outcome
    promise: Promise
    urgency: Urgency = field(default_factory=Urgency)
    tpot_s: float = math.inf
    keys: dict[int, list[bytes]] = field(default_factory=dict)
    number: int = 0
    prefill: SimMember | None = None
    decode: SimMember | None = None
    credit_id: int = 0
    uncached: int = 0
    """Tokens of the prompt that are to be computed."""
    path: Path = Path.SPLIT


class SimRouter:
    """See the module."""

    def __init__(
        self,
        timeline: Timeline,
        spec: RouterSpec,
        members: Sequence[SimMember],
        on_end: Callable[[Outcome], None],
    ) -> None:
        self._timeline = timeline
        self._spec = spec
        self._members = {member.worker.spec.worker_id: member for member in members}
        self._on_end = on_end
        self._admission = Admission(spec.max_waiting)
        self._policy: DispatchPolicy[str] = DispatchPolicy()
        self._prefixes = PrefixIndex()
        self._caches = any(member.worker.spec.prefix_cache for member in members)
        self._requests: dict[str, _Request] = {}
        self._retry: Event | None = None

    # --- the door ---------------------------------------------------------------------------------------------------

    def arrive(self, asked: Asked, outcome: Outcome) -> None:
        """A request comes."""
        request = _Request(asked, outcome, self._spec.promises[asked.slo_class])
        self._requests[asked.request_id] = request
        own_s = self._spec.own_s + self._spec.own_token_s * len(asked.prompt_token_ids)
        self._timeline.after(own_s, lambda: self._admit(request))

    def _admit(self, request: _Request) -> None:
        now_s, arrival_s, promise = self._timeline.now_s(), request.asked.arrival_s, request.promise
        ttft_s = math.inf if promise.ttft_s is None else promise.ttft_s
        views = self._prefill_views()
        uncached = {view.worker_id: len(request.asked.prompt_token_ids) - self._cached(request, view) for view in views}
        told = self._outlook(request, views, uncached, arrival_s + ttft_s)
        if told is not None and promise.effective_ttft_s(told.idle_s) > ttft_s:
            told = self._outlook(request, views, uncached, arrival_s + promise.effective_ttft_s(told.idle_s))
        if self._spec.refuses:
            try:
                self._admission.enter(
                    request.asked.request_id, now_s, promise=promise, forecast=told, elapsed_s=now_s - arrival_s
                )
            except Overloaded as refusal:
                request.outcome.refused = refusal.code or refusal.type
                self._end(request)
                return
        decode = learned(self._decode_views())
        idle_s = min((idle_tpot_s(view, len(request.asked.prompt_token_ids)) for view in decode), default=0.0)
        request.tpot_s = promise.effective_tpot_s(idle_s)
        self._queue(request, min(uncached.values(), default=1))

    def _outlook(
        self, request: _Request, views: tuple[WorkerView, ...], uncached: dict[str, int], deadline_s: float
    ) -> Forecast | None:
        now_s = self._timeline.now_s()
        promise = request.promise
        request.urgency = Urgency(slo_class=promise.slo_class, share=promise.share, deadline_s=deadline_s)
        if not views:
            return None
        ahead = self._policy.cost_ahead(request.urgency, now_s)
        wait_s = self._policy.decode_wait_s(ahead + min(uncached.values()), now_s)
        return forecast(views, uncached, urgency=request.urgency, ahead_tokens=ahead, decode_wait_s=wait_s)

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def _queue(self, request: _Request, cost_tokens: int) -> None:
        name, now_s = request.asked.request_id, self._timeline.now_s()
        request.number += 1
        self._policy.enter(name, request.urgency, cost=float(cost_tokens), now_s=now_s)
        self._policy.ready(name)
        self._pump()

    def changed(self) -> None:
        """A heartbeat, or less work under way: who was refused may ask again."""
        if len(self._policy):
            self._policy.changed()
            self._pump()

    def _pump(self) -> None:
        now_s = self._timeline.now_s()
        while (name := self._policy.candidate(now_s)) is not None:
            request = self._requests[name]
            views = self._prefill_views()
            if views and room_tokens(views, request.urgency) <= self._policy.asking_cost:
                break
            self._policy.ask(name)
            if self._place(request):
                self._policy.granted(name, now_s)
                self._dispatch(request)
            else:
                self._policy.refused(name, now_s)
        retry_s = self._policy.retry_s()
        if retry_s is not None and self._retry is None:
            self._retry = self._timeline.at(max(retry_s, now_s + 0.001), self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._pump()

    # --- placement --------------------------------------------------------------------------------------------------

    def _place(self, request: _Request) -> bool:
        prefill, decode = self._prefill_views(), self._decode_views()
        if not prefill or prefill[0].role is Role.MIXED:
            return self._place_alone(request, decode, Path.MIXED)
        cached = {view.worker_id: self._cached(request, view) for view in prefill}
        context = len(request.asked.prompt_token_ids)
        best = rank_prefill(prefill, context, cached)[0]
        request.uncached = context - cached[best.worker_id]
        request.prefill = self._members[best.worker_id]
        if request.asked.output_tokens == 1:
            request.path, request.decode = Path.PREFILL_ONLY, None
            return True
        if self._spec.local_threshold_tokens:
            below = context - self._spec.local_threshold_tokens
            near = tuple(view for view in decode if self._cached(request, view) > below)
            if near:
                return self._place_alone(request, near, Path.LOCAL)
        request.path = Path.SPLIT
        return self._reserve(request, rank_decode(self._keeping(request, decode), context))

    def _place_alone(self, request: _Request, views: tuple[WorkerView, ...], path: Path) -> bool:
        request.prefill, request.path = None, path
        cached = {view.worker_id: self._cached(request, view) for view in views}
        ranked = rank_mixed(self._keeping(request, views), len(request.asked.prompt_token_ids), cached)
        if not self._reserve(request, ranked):
            return False
        assert request.decode is not None
        request.uncached = len(request.asked.prompt_token_ids) - self._cached(request, request.decode.view)
        return True

    def _reserve(self, request: _Request, views: tuple[WorkerView, ...]) -> bool:
        context = len(request.asked.prompt_token_ids)
        for view in views:
            member = self._members[view.worker_id]
            credit_id = member.worker.reserve(request.asked.request_id, request.number, context, request.urgency)
            if credit_id is not None:
                request.decode, request.credit_id = member, credit_id
                return True
        return False

    @staticmethod
    def _keeping(request: _Request, views: tuple[WorkerView, ...]) -> tuple[WorkerView, ...]:
        context = len(request.asked.prompt_token_ids)
        return tuple(view for view in views if keeps_tpot(view, context, request.tpot_s))

    def _prefill_views(self) -> tuple[WorkerView, ...]:
        views = self._views(Role.PREFILL)
        return views or self._views(Role.MIXED)

    def _decode_views(self) -> tuple[WorkerView, ...]:
        return self._views(Role.DECODE) or self._views(Role.MIXED)

    def _views(self, role: Role) -> tuple[WorkerView, ...]:
        return tuple(member.view for member in self._members.values() if member.worker.spec.role is role)

    def _cached(self, request: _Request, view: WorkerView) -> int:
        if not self._caches:
            return 0
        blocks = self._prefixes.match_blocks(view.worker_id, self._keys(request, view.block_size))
        return min(blocks * view.block_size, len(request.asked.prompt_token_ids) - 1)

    def _keys(self, request: _Request, block_size: int) -> list[bytes]:
        if block_size not in request.keys:
            request.keys[block_size] = request.asked.block_keys(block_size)
        return request.keys[block_size]

    # --- what was placed --------------------------------------------------------------------------------------------

    def _dispatch(self, request: _Request) -> None:
        """Both halves' commands leave: the credit took a round trip, the decode command follows prefill's answer."""
        outcome, rpc_s = request.outcome, self._spec.rpc_s
        outcome.tries += 1
        outcome.path = request.path.value
        outcome.dispatched_s = outcome.dispatched_s or self._timeline.now_s()
        first = request.prefill or request.decode
        assert first is not None
        patient = 0 if math.isfinite(request.urgency.deadline_s) else request.uncached
        first.sent.prompt_sent(request.uncached, patient)
        for member in (request.prefill, request.decode):
            if member is not None and self._caches:
                view = member.view
                self._prefixes.insert(view.worker_id, self._keys(request, view.block_size), view.num_blocks)
        if request.prefill is not None:
            outcome.prefill_worker = request.prefill.worker.spec.worker_id
            self._timeline.after((3 if request.decode else 1) * rpc_s, lambda: self._send_prefill(request))
        if request.decode is not None:
            request.decode.sent.row_begun(request.tpot_s)
            outcome.decode_worker = request.decode.worker.spec.worker_id
            if not (request.prefill and self._spec.decode_after_prefill):
                self._timeline.after((5 if request.prefill else 3) * rpc_s, lambda: self._send_decode(request))

    def _send_prefill(self, request: _Request) -> None:
        assert request.prefill is not None
        handoff = Handoff.OUT if request.decode is not None else Handoff.NONE
        spec = self._spec_of(request, Side.PREFILL, handoff, request.prefill.worker.spec)
        request.prefill.worker.prefill(request.asked.request_id, request.number, spec)

    def _send_decode(self, request: _Request) -> None:
        assert request.decode is not None
        handoff = Handoff.NONE if request.prefill is None else Handoff.IN
        spec = self._spec_of(request, Side.DECODE, handoff, request.decode.worker.spec)
        ticket = None
        if request.prefill is not None:
            source = request.prefill.worker
            ticket = Ticket(
                request_id=request.asked.request_id,
                choice=0,
                prefill_attempt=request.number,
                decode_attempt=request.number,
                prefill_worker=source.spec.worker_id,
                epoch=source.epoch,
                num_tokens=spec.context_tokens,
                fingerprint="",
            )
        request.decode.worker.decode(request.asked.request_id, request.number, spec, request.credit_id, ticket)

    def _spec_of(self, request: _Request, side: Side, handoff: Handoff, worker: WorkerSpec) -> SequenceSpec:
        asked = request.asked
        return SequenceSpec(
            seq_id=seq_id(asked.request_id, 0, side, request.number),
            prompt_token_ids=tuple(asked.prompt_token_ids),
            sampling=SamplingParams(temperature=0.0, max_tokens=asked.output_tokens, ignore_eos=True),
            handoff=handoff,
            arrival_s=self._timeline.now_s(),
            urgency=request.urgency,
            block_keys=tuple(self._keys(request, worker.block_size)) if worker.prefix_cache else (),
        )

    # --- what workers say -------------------------------------------------------------------------------------------

    def on_heard(self, heard: Heard) -> None:
        """See `SimWorker.wire`."""
        self._timeline.after(self._spec.rpc_s, lambda: self._hear(heard))

    def on_refused(self, seq: str) -> None:
        """See `SimWorker.wire`."""
        raise AssertionError(f"{seq} was refused by its worker")

    def _hear(self, heard: Heard) -> None:
        request = self._requests[heard.request_id]
        outcome, now_s, rpc_s = request.outcome, self._timeline.now_s(), self._spec.rpc_s
        if outcome.first_token_s is None:
            outcome.first_token_s = now_s
            outcome.queue_s, outcome.prefill_s = heard.queue_s, heard.prefill_s
            outcome.cached_tokens = heard.cached_tokens
            self._admission.first_token(heard.request_id, now_s)
            self._prompt_done(request)
            if request.prefill and request.decode and self._spec.decode_after_prefill:
                self._timeline.after(rpc_s, lambda: self._send_decode(request))
        elif not outcome.transferred_bytes and heard.transferred_bytes:
            outcome.exposed_transfer_s = heard.exposed_transfer_s
            outcome.transferred_bytes = heard.transferred_bytes
            outcome.decode_queue_s = heard.queue_s
        if heard.tokens > outcome.output_tokens:
            outcome.output_tokens, outcome.last_token_s = heard.tokens, now_s
        if heard.finished:
            if request.decode is not None:
                request.decode.sent.row_ended(request.tpot_s)
            self._end(request)
            self.changed()

    def _prompt_done(self, request: _Request) -> None:
        first = request.prefill or request.decode
        assert first is not None
        patient = 0 if math.isfinite(request.urgency.deadline_s) else request.uncached
        first.sent.prompt_done(request.uncached, patient)
        self.changed()

    def _end(self, request: _Request) -> None:
        del self._requests[request.asked.request_id]
        self._on_end(request.outcome)
