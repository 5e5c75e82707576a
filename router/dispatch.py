"""Where admitted requests wait until workers take them: drives `DispatchPolicy` with the workers' views and real calls.

1. `expect`, at the door: a place in the queue, so that the next one to come is told how much waits before it.
2. `place`, in the request's own task: waits for its turn, asks (`Placer.try_place`), and waits again where all refuse.
3. The turn comes when the policy says so and a prefill worker has room: its own queue is kept short, so that the order
   is decided here, among all that wait, and not by who was sent first.

A request that leaves (canceled, out of time) is out of the queue at once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..cluster.clock import Clock
from ..cluster.types import Role, Urgency
from .attempt import Attempt, Work
from .dispatch_policy import DispatchPolicy
from .errors import Unavailable
from .forecast import Forecast, forecast, learned, room_tokens
from .members import Membership
from .placement import WorkerView, idle_tpot_s, pair
from .placer import Placer

UNREADY_POLL_S = 0.25
"""How often those that wait for any worker at all are looked at."""


class Spot:
    """A place in the queue, of one attempt at one choice."""

    __slots__ = ("entered_s", "needs_room", "turn", "urgency", "waits_until_s")

    def __init__(self, entered_s: float, urgency: Urgency, *, needs_room: bool) -> None:
        self.entered_s = entered_s
        self.urgency = urgency
        self.needs_room = needs_room
        """Of a prefill worker; not where the prompt is computed already."""
        self.waits_until_s: float | None = None
        """Up to when it waits for workers to come back, where the work says so."""
        self.turn: asyncio.Future[None] | None = None
        """Set when it may ask; None while it does not wait for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What one choice takes along into every queue."""

    urgency: Urgency = field(default_factory=Urgency)
    tpot_s: float = math.inf
    """Time per output token that it is to keep; inf: none."""
    block_keys: dict[int, list[bytes]] = field(default_factory=dict)
    """Of the prompt, by block size, as far as anybody came to need them."""
    spot: Spot | None = None
    """Its first attempt's place, taken at the door."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A request as the queue sees it."""

    cost_tokens: int
    """Of its prompt, what the worker that has the most of it lacks."""
    forecast: Forecast | None
    """None: nobody knows yet."""


class Dispatcher:
    """One per router, on its event loop."""

    def __init__(self, placer: Placer, members: Membership, *, clock: Clock, unready_wait_s: float) -> None:
        self._placer = placer
        self._members = members
        self._clock = clock
        self._unready_wait_s = unready_wait_s
        self._policy: DispatchPolicy[Spot] = DispatchPolicy()
        self._unready_s: float | None = None
        """Since when no worker was there at all, as far as anybody asked."""
        self._timer: asyncio.TimerHandle | None = None
        members.watch(self._on_change)

    # --- at the door ------------------------------------------------------------------------------------------------

    def outlook(self, work: Work) -> Outlook:
        """What a request that came now would cost, and wait for its first token."""
        views = self._prefill_views()
        if not views:
            return Outlook(cost_tokens=1, forecast=None)
        uncached_tokens = self._uncached_tokens(work, views)
        now_s = self._clock.now_s()
        ahead = self._policy.cost_ahead(work.urgency, now_s)
        own = min(uncached_tokens.values())
        decode_wait_s = self._policy.decode_wait_s(ahead + own, now_s)
        told = forecast(views, uncached_tokens, urgency=work.urgency, ahead_tokens=ahead, decode_wait_s=decode_wait_s)
        return Outlook(cost_tokens=own, forecast=told)

    def idle_tpot_s(self, context_tokens: int) -> float:
        """The best that an idle worker could do for one sequence of that context; 0: nobody knows."""
        views = self._members.routable(Role.DECODE) or self._members.routable(Role.MIXED)
        return min((idle_tpot_s(view, context_tokens) for view in learned(views)), default=0.0)

    def expect(self, work: Work, cost_tokens: int) -> Spot:
        """Takes a place for work whose `place` will follow, or else `leave`."""
        now_s = self._clock.now_s()
        spot = Spot(now_s, work.urgency, needs_room=work.half is None)
        self._policy.enter(spot, work.urgency, cost=float(cost_tokens), now_s=now_s)
        return spot

    def leave(self, spot: Spot) -> None:
        """Gives the place back; idempotent."""
        self._policy.leave(spot, self._clock.now_s())
        if not len(self._policy) and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def waiting_by_class(self) -> Mapping[str, int]:
        """How many wait here, by SLO class."""
        return self._policy.waiting_by_class()

    # --- in the request's task --------------------------------------------------------------------------------------

    async def place(self, work: Work, spot: Spot | None = None) -> Attempt:
        """Waits until workers for this attempt are found; bounded by the caller's deadline. `spot`: the place that was
        taken for it at the door. `Unavailable` when no worker was there at all for `unready_wait_s`, or until the
        work's own `waits_until_s`; `Refusal` (INVALID_ARGUMENT) when it can never be placed.
        """
        if spot is None:
            spot = self.expect(work, 1 if work.half is not None else self.outlook(work).cost_tokens)
        spot.waits_until_s = work.waits_until_s
        try:
            self._policy.ready(spot)
            while True:
                await self._turn(spot)
                attempt = await self._ask(work, spot)
                if attempt is not None:
                    return attempt
        finally:
            self._placer.withdraw(work)
            self.leave(spot)
            self._pump()

    async def _turn(self, spot: Spot) -> None:
        spot.turn = asyncio.get_running_loop().create_future()
        try:
            self._pump()
            await spot.turn
        finally:
            spot.turn = None

    async def _ask(self, work: Work, spot: Spot) -> Attempt | None:
        try:
            attempt = await self._placer.try_place(work)
        except Unavailable:
            now_s = self._clock.now_s()
            self._unready_s = now_s if self._unready_s is None else self._unready_s
            if now_s >= self._gives_up_s(spot):
                raise
            self._policy.refused(spot, now_s, absent=True)
            return None
        self._unready_s = None
        if attempt is None:
            self._policy.refused(spot, self._clock.now_s())
        else:
            self._policy.granted(spot, self._clock.now_s())
        return attempt

    def _gives_up_s(self, spot: Spot) -> float:
        """When it has waited long enough for any worker to be there."""
        if self._unready_s is None:
            return math.inf
        if spot.waits_until_s is not None:
            return spot.waits_until_s
        return max(self._unready_s, spot.entered_s) + self._unready_wait_s

    # --- turns ------------------------------------------------------------------------------------------------------

    def _on_change(self) -> None:
        if len(self._policy):
            self._policy.changed()
            self._pump()

    def _pump(self) -> None:
        """Gives the turn to everybody who may ask now."""
        now_s = self._clock.now_s()
        if self._unready_s is not None:
            for spot in self._policy:
                if spot.turn is not None and not spot.turn.done() and now_s >= self._gives_up_s(spot):
                    self._give_turn(spot)
        views: tuple[WorkerView, ...] | None = None
        while (candidate := self._policy.candidate(now_s)) is not None:
            if candidate.needs_room:
                views = self._prefill_views() if views is None else views
                # Where nobody is there, who asks is told so.
                if views and room_tokens(views, candidate.urgency) <= self._policy.asking_cost:
                    break
            self._give_turn(candidate)
        self._arm(now_s)

    def _give_turn(self, spot: Spot) -> None:
        assert spot.turn is not None, "who is ready and does not ask waits for its turn"
        self._policy.ask(spot)
        if not spot.turn.done():  # canceled, it leaves as soon as its task runs
            spot.turn.set_result(None)

    def _arm(self, now_s: float) -> None:
        """Looks again when who is held may ask again, or has waited long enough for a worker to be there."""
        retry_s = self._policy.retry_s()
        if retry_s is None or self._timer is not None:
            return
        delay_s = max(retry_s - now_s, 0.001) if self._unready_s is None else UNREADY_POLL_S
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _prefill_views(self) -> tuple[WorkerView, ...]:
        """Workers that would compute a prompt that came now."""
        prefill, _ = pair(self._members.routable(Role.PREFILL), self._members.routable(Role.DECODE))
        return prefill or self._members.routable(Role.MIXED)

    def _uncached_tokens(self, work: Work, views: tuple[WorkerView, ...]) -> dict[str, int]:
        cached_tokens = self._placer.cached_tokens(work, views)
        return {worker_id: work.context_tokens - cached for worker_id, cached in cached_tokens.items()}
