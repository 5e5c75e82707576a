"""The router in virtual time: the runtime's admission, turns, places, forecasts and rules of trying again, with calls
that take a fixed time instead of a network.

A request's way: `arrive` (after the router's own work on it) → admission → the queue → a place, with a credit of the
decode worker → both halves (`choice`) → first token, tokens, end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from ...router.admission import Admission
from ...router.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from ...router.forecast import learned
from ...router.placement import WorkerView, idle_tpot_s
from ...router.placing import NoWorkers, Path, Place, Pools, find_place
from ...router.prefix_index import PrefixIndex
from ...router.slo_classes import Promise
from ...router.tries import Tries
from ...router.turns import Outlook, Turns
from ..types import Role, Urgency
from .choice import ChoiceSpot, SimChoice
from .member import SimMember
from .request import Asked, Outcome
from .timeline import Event, Timeline
from .worker_spec import Heard, Turned


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """What a simulated router is. What has a namesake in `RouterConfig` has its meaning."""

    promises: dict[str, Promise]
    """By SLO class."""
    max_waiting: int = 1024
    refuses: bool = True
    """Whether a request beyond `max_waiting`, or whose promise cannot be kept, is refused, or waits all the same."""
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
    heartbeat_timeout_s: float = 1.0
    worker_lost_after_s: float = 10.0
    unready_wait_s: float = 10.0
    max_attempts: int = 3
    timeout_s: float = math.inf
    """Of a request, after which it is given up; inf: never."""


class _Granted(NamedTuple):
    """Where a try runs, and the credit that it has there."""

    place: Place
    decode: SimMember | None
    credit_id: int


class SimRouter:
    """See the module. The `choice.Desk` of its requests."""

    def __init__(
        self,
        timeline: Timeline,
        spec: RouterSpec,
        members: Sequence[SimMember],
        on_end: Callable[[Outcome], None],
    ) -> None:
        self.rpc_s = spec.rpc_s
        self.decode_after_prefill = spec.decode_after_prefill
        self._timeline = timeline
        self._spec = spec
        self._members = {member.worker.spec.worker_id: member for member in members}
        self._on_end = on_end
        self._admission = Admission(spec.max_waiting)
        self._turns: Turns[ChoiceSpot] = Turns(unready_wait_s=spec.unready_wait_s)
        self._prefixes = PrefixIndex()
        workers = [member.worker.spec for member in members]
        self._caches = any(worker.prefix_cache for worker in workers)
        promised = any(promise.ttft_s is not None for promise in spec.promises.values())
        self._forecasts = spec.refuses or promised
        """Whether anybody looks at a forecast."""
        self._longest = min(worker.max_model_len for worker in workers)
        self._kv_tokens = min(worker.num_blocks * worker.block_size for worker in workers)
        self._choices: dict[str, SimChoice] = {}
        self._retry: Event | None = None
        self._shown = -1
        """As of how many changes of all its members `_pools` is; -1: others are to be shown."""
        self._pools = Pools((), (), ())

    @property
    def waiting(self) -> int:
        """Requests that wait here for workers."""
        return len(self._turns)

    # --- the door ---------------------------------------------------------------------------------------------------

    def arrive(self, asked: Asked, outcome: Outcome) -> None:
        """A request comes."""
        timeout_s = self._spec.timeout_s
        deadline_s = asked.arrival_s + timeout_s
        choice = SimChoice(
            timeline=self._timeline,
            desk=self,
            asked=asked,
            outcome=outcome,
            promise=self._spec.promises[asked.slo_class],
            tries=Tries(max_attempts=self._spec.max_attempts, deadline_s=deadline_s, timeout_s=timeout_s),
            timeout_s=timeout_s,
        )
        own_s = self._spec.own_s + self._spec.own_token_s * len(asked.prompt_token_ids)
        self._timeline.do_after(own_s, partial(self._admit, choice))

    def _refusal(self, asked: Asked) -> str:
        """Why such a request can never be served here, as a code of the runtime's errors; empty: it can."""
        longest = len(asked.prompt_token_ids) + asked.output_tokens
        if longest > self._longest:
            return ContextLengthExceeded.code or ""
        return InvalidRequest.type if longest - 1 > self._kv_tokens else ""

    def _admit(self, choice: SimChoice) -> None:
        """As `RouterCore._admit`."""
        now_s, arrival_s, promise = self._timeline.time_s, choice.asked.arrival_s, choice.promise
        refused = self._refusal(choice.asked)
        if refused:
            choice.outcome.refused = refused
            self._on_end(choice.outcome)
            return
        ttft_s = math.inf if promise.ttft_s is None else promise.ttft_s
        outlook = self._outlook(choice, arrival_s + ttft_s)
        told = outlook.forecast
        if told is not None and promise.effective_ttft_s(told.idle_s) > ttft_s:
            told = self._outlook(choice, arrival_s + promise.effective_ttft_s(told.idle_s)).forecast
        name, idle_s = choice.asked.request_id, 0.0
        if promise.tpot_s is not None:
            decode = learned(self.pools().decode_workers)
            idle_s = min([idle_tpot_s(view, choice.context_tokens) for view in decode], default=0.0)
        if self._spec.refuses:
            elapsed_s = now_s - arrival_s
            try:
                self._admission.enter(
                    name, now_s, promise=promise, forecast=told, elapsed_s=elapsed_s, idle_tpot_s=idle_s
                )
            except Overloaded as refusal:
                choice.outcome.refused = refusal.code or refusal.type
                self._on_end(choice.outcome)
                return
        choice.tpot_s = promise.effective_tpot_s(idle_s)
        self._choices[name] = choice
        if math.isfinite(self._spec.timeout_s):
            choice.deadline = self._timeline.at(max(now_s, arrival_s + self._spec.timeout_s), choice.out_of_time)
        choice.tries.begin()
        self._enter(choice, outlook.cost_tokens)

    def _outlook(self, choice: SimChoice, deadline_s: float) -> Outlook:
        promise = choice.promise
        if deadline_s == math.inf:
            choice.urgency = _patient(promise.slo_class, promise.share)
        else:
            choice.urgency = Urgency(slo_class=promise.slo_class, share=promise.share, deadline_s=deadline_s)
        return self._look(choice)

    def _look(self, choice: SimChoice) -> Outlook:
        views, context = self.pools().prompt_workers, choice.context_tokens
        if views and not (self._forecasts or self._caches):
            return Outlook(cost_tokens=context, forecast=None)
        cached = self._cached_tokens(choice, views)
        uncached = {worker_id: context - tokens for worker_id, tokens in cached.items()}
        if not self._forecasts:
            return Outlook(cost_tokens=min(uncached.values(), default=1), forecast=None)
        return self._turns.outlook(views, uncached, choice.urgency, self._timeline.time_s)

    # --- the queue --------------------------------------------------------------------------------------------------

    def queue(self, choice: SimChoice) -> None:
        """See `choice.Desk`."""
        self._enter(choice, 1 if choice.half is not None else self._look(choice).cost_tokens)

    def _enter(self, choice: SimChoice, cost_tokens: int) -> None:
        now_s = self._timeline.time_s
        if self._turns.open_to(choice.urgency, self._prompt_workers, needs_room=choice.half is None):
            tried = self._try(choice)
            if isinstance(tried, _Granted):
                self._turns.pass_by(choice.urgency, cost_tokens)
                self._send(choice, tried)
                return
        spot = choice.spot = ChoiceSpot(choice, now_s, choice.urgency, needs_room=choice.half is None)
        spot.waits_until_s = choice.tries.waits_until_s
        self._turns.expect(spot, cost_tokens, now_s)
        self._turns.ready(spot)
        self._pump()

    def withdraw(self, choice: SimChoice) -> None:
        """See `choice.Desk`."""
        spot, choice.spot = choice.spot, None
        if spot is not None:
            self._turns.leave(spot, self._timeline.time_s)
        name, number = choice.asked.request_id, choice.tries.number
        while choice.wants:
            abort = choice.wants.pop().worker.abort_decode
            self._timeline.do_after(self.rpc_s, partial(abort, name, number, notify_holder=False))

    def less(self) -> None:
        """See `choice.Desk`."""
        self.changed()

    def changed(self) -> None:
        """A heartbeat, or less work under way: who was refused may ask again."""
        if len(self._turns):
            self._turns.changed()
            self._pump()

    def _pump(self) -> None:
        now_s = self._timeline.time_s
        for spot in self._turns.due(now_s, self._prompt_workers):
            self._ask(spot, now_s)
        retry_s = self._turns.look_again_s(now_s)
        if retry_s is not None and (self._retry is None or retry_s < self._retry.at_s):
            if self._retry is not None:
                self._retry.cancel()
            self._retry = self._timeline.at(retry_s, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._pump()

    def _prompt_workers(self) -> tuple[WorkerView, ...]:
        return self.pools().prompt_workers

    # --- places -----------------------------------------------------------------------------------------------------

    def _ask(self, spot: ChoiceSpot, now_s: float) -> None:
        """As `Dispatcher._ask`."""
        choice = spot.choice
        tried = self._try(choice)
        if isinstance(tried, NoWorkers):
            if self._turns.absent(spot, now_s):
                told = choice.tries.nobody_came(tried)
                choice.give_up(told.code or told.type)
        elif tried is None:
            self._turns.refused(spot, now_s)
        else:
            self._turns.placed(spot, now_s)
            choice.spot = None
            self._send(choice, tried)

    def _try(self, choice: SimChoice) -> _Granted | NoWorkers | None:
        """As `Placer.try_place`. None: no worker grants a credit now. Asked twice at one moment, they say the same."""
        try:
            place = find_place(
                choice.needs, self.pools(), partial(self._cached_tokens, choice), self._spec.local_threshold_tokens
            )
        except NoWorkers as none:
            return none
        if place.path is Path.PREFILL_ONLY:
            return _Granted(place, None, 0)
        return self._reserve(choice, place)

    def _reserve(self, choice: SimChoice, place: Place) -> _Granted | None:
        """The first worker, best first, that grants a credit."""
        name, number, context = choice.asked.request_id, choice.tries.number, choice.context_tokens
        for view in place.decode:
            member = self._members[view.worker_id]
            credit_id = member.worker.reserve(name, number, context, choice.urgency)
            if credit_id is not None:
                if member in choice.wants:
                    choice.wants.remove(member)
                return _Granted(place, member, credit_id)
            if member not in choice.wants:
                choice.wants.append(member)
        return None

    def _send(self, choice: SimChoice, granted: _Granted) -> None:
        """Its try begins there; elsewhere it wants no credit any more."""
        self.withdraw(choice)
        place, decode, credit_id = granted
        prefill = None if place.prefill is None else self._members[place.prefill.worker_id]
        uncached_tokens = 0
        if choice.half is None:
            first = prefill or decode
            assert first is not None
            uncached_tokens = choice.context_tokens - place.cached_tokens[first.worker.spec.worker_id]
        if self._caches:
            for member in (prefill, decode):
                if member is not None:
                    worker = member.worker.spec
                    self._prefixes.insert(worker.worker_id, self.keys(choice, worker.block_size), worker.num_blocks)
        choice.dispatch(place.path, prefill, decode, credit_id, uncached_tokens)

    def pools(self) -> Pools:
        """The workers that can take work now: the same object while nothing has changed."""
        changes = 0
        for member in self._members.values():
            changes += member.sent.version + member.heartbeats
        if changes != self._shown:
            self._shown = changes
            of: dict[Role, list[WorkerView]] = {Role.PREFILL: [], Role.DECODE: [], Role.MIXED: []}
            for member in self._members.values():
                if member.routable:
                    of[member.role].append(member.view)
            self._pools = Pools(tuple(of[Role.PREFILL]), tuple(of[Role.DECODE]), tuple(of[Role.MIXED]))
        return self._pools

    def _cached_tokens(self, choice: SimChoice, views: tuple[WorkerView, ...]) -> Mapping[str, int]:
        if not self._caches:
            return {view.worker_id: 0 for view in views}
        most = choice.context_tokens - 1
        return {
            view.worker_id: min(
                self._prefixes.match_blocks(view.worker_id, self.keys(choice, view.block_size)) * view.block_size, most
            )
            for view in views
        }

    def keys(self, choice: SimChoice, block_size: int) -> tuple[bytes, ...]:
        """See `choice.Desk`. What was answered before a worker was lost is not counted."""
        if block_size not in choice.keys:
            choice.keys[block_size] = tuple(choice.asked.block_keys(block_size))
        return choice.keys[block_size]

    # --- what workers say -------------------------------------------------------------------------------------------

    def on_heard(self, heard: Heard) -> None:
        """See `worker.Wiring`."""
        self._timeline.do_after(self.rpc_s, partial(self._hear, heard))

    def _hear(self, heard: Heard) -> None:
        choice = self._choices.get(heard.request_id)
        if choice is not None:
            choice.hear(heard)

    def on_turned(self, turned: Turned) -> None:
        """See `worker.Wiring`."""
        self._timeline.do_after(self.rpc_s, partial(self._turn, turned))

    def _turn(self, turned: Turned) -> None:
        choice = self._choices.get(turned.request_id)
        if choice is not None:
            choice.turned(turned)

    def first_token(self, choice: SimChoice) -> None:
        """See `choice.Desk`."""
        self._admission.first_token(choice.asked.request_id, self._timeline.time_s)

    def ended(self, choice: SimChoice) -> None:
        """See `choice.Desk`."""
        del self._choices[choice.asked.request_id]
        self._admission.leave(choice.asked.request_id)
        self._on_end(choice.outcome)

    # --- membership -------------------------------------------------------------------------------------------------

    def on_stale(self, member: SimMember) -> None:
        """Its heartbeats are late: no new work goes there."""
        member.routable = False
        self._shown = -1

    def on_lost(self, member: SimMember, *, silent: bool) -> None:
        """Its stream broke, or (`silent`) was given up: what ran there goes on elsewhere. Idempotent."""
        if not member.attached:
            return
        member.routable = member.attached = False
        self._shown = -1
        self._prefixes.forget(member.worker.spec.worker_id)
        for choice in list(self._choices.values()):
            choice.worker_lost(member, silent=silent)
        self.changed()

    def on_joined(self, member: SimMember) -> None:
        """A worker is here in a new life."""
        older = self._members[member.worker.spec.worker_id]
        self.on_lost(older, silent=False)
        self._members[member.worker.spec.worker_id] = member
        self._shown = -1
        self.changed()


@lru_cache(maxsize=256)
def _patient(slo_class: str, share: float) -> Urgency:
    """Of all that are due at no time."""
    return Urgency(slo_class=slo_class, share=share)
