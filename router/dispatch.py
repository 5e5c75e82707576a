"""Where admitted requests wait until workers take them: drives `Turns` with the workers' views and real calls.

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
from ..cluster.types import Urgency
from .attempt import Attempt, Work
from .errors import Unavailable
from .forecast import learned
from .members import Membership
from .placement import WorkerView, idle_tpot_s
from .placer import Placer
from .turns import Outlook, Spot, Turns


class TaskSpot(Spot):
    """A place in the queue whose turn a task waits for."""

    __slots__ = ("turn",)

    def __init__(self, entered_s: float, urgency: Urgency, *, needs_room: bool) -> None:
        super().__init__(entered_s, urgency, needs_room=needs_room)
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
    spot: TaskSpot | None = None
    """Its first attempt's place, taken at the door."""


class Dispatcher:
    """One per router, on its event loop."""

    def __init__(self, placer: Placer, members: Membership, *, clock: Clock, unready_wait_s: float) -> None:
        self._placer = placer
        self._clock = clock
        self._turns: Turns[TaskSpot] = Turns(unready_wait_s=unready_wait_s)
        self._timer: asyncio.Handle | None = None
        self._timer_s = math.inf
        """When it is due; handles need not know (uvloop's do not, of what is due at once)."""
        members.watch(self._on_change)

    # --- at the door ------------------------------------------------------------------------------------------------

    def outlook(self, work: Work) -> Outlook:
        """What a request that came now would cost, and wait for its first token."""
        views = self._prefill_views()
        return self._turns.outlook(views, self._uncached_tokens(work, views), work.urgency, self._clock.now_s())

    def idle_tpot_s(self, context_tokens: int) -> float:
        """The best that an idle worker could do for one sequence of that context; 0: nobody knows."""
        views = learned(self._placer.pools().decode_workers)
        return min([idle_tpot_s(view, context_tokens) for view in views], default=0.0)

    def expect(self, work: Work, cost_tokens: int) -> TaskSpot:
        """Takes a place for work whose `place` will follow, or else `leave`."""
        now_s = self._clock.now_s()
        spot = TaskSpot(now_s, work.urgency, needs_room=work.half is None)
        self._turns.expect(spot, cost_tokens, now_s)
        return spot

    def leave(self, spot: TaskSpot) -> None:
        """Gives the place back; idempotent."""
        self._turns.leave(spot, self._clock.now_s())
        if len(self._turns):
            self._pump()
        else:
            self._disarm()

    def waiting_by_class(self) -> Mapping[str, int]:
        """How many wait here, by SLO class."""
        return self._turns.waiting_by_class()

    # --- in the request's task --------------------------------------------------------------------------------------

    async def place(self, work: Work, spot: TaskSpot | None = None) -> Attempt:
        """Waits until workers for this attempt are found; bounded by the caller's deadline. `spot`: the place that was
        taken for it at the door. `Unavailable` when no worker was there at all for `unready_wait_s`, or until the
        work's own `waits_until_s`; `Refusal` (INVALID_ARGUMENT) when it can never be placed.
        """
        if spot is None:
            spot = self.expect(work, 1 if work.half is not None else self.outlook(work).cost_tokens)
        spot.waits_until_s = work.waits_until_s
        try:
            self._turns.ready(spot)
            while True:
                await self._turn(spot)
                attempt = await self._ask(work, spot)
                if attempt is not None:
                    return attempt
        finally:
            self._placer.withdraw(work)
            self.leave(spot)

    async def _turn(self, spot: TaskSpot) -> None:
        spot.turn = asyncio.get_running_loop().create_future()
        try:
            self._pump()
            await spot.turn
        finally:
            spot.turn = None

    async def _ask(self, work: Work, spot: TaskSpot) -> Attempt | None:
        try:
            attempt = await self._placer.try_place(work)
        except Unavailable:
            if self._turns.absent(spot, self._clock.now_s()):
                raise
            return None
        if attempt is None:
            self._turns.refused(spot, self._clock.now_s())
        else:
            self._turns.placed(spot, self._clock.now_s())
        return attempt

    # --- turns ------------------------------------------------------------------------------------------------------

    def _on_change(self) -> None:
        if len(self._turns):
            self._turns.changed()
            self._pump()

    def _pump(self) -> None:
        """Gives the turn to everybody who may ask now."""
        now_s = self._clock.now_s()
        for spot in self._turns.due(now_s, self._prefill_views):
            assert spot.turn is not None, "who is ready and does not ask waits for its turn"
            if not spot.turn.done():  # canceled, it leaves as soon as its task runs
                spot.turn.set_result(None)
        self._arm(now_s)

    def _arm(self, now_s: float) -> None:
        """Looks again when who is held may ask again, or has waited long enough for a worker to be there."""
        at_s = self._turns.look_again_s(now_s)
        if at_s is not None and at_s < self._timer_s:
            self._disarm()
            self._timer = asyncio.get_running_loop().call_later(at_s - now_s, self._on_timer)
            self._timer_s = at_s

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = None, math.inf

    def _on_timer(self) -> None:
        self._timer, self._timer_s = None, math.inf
        self._pump()

    def _prefill_views(self) -> tuple[WorkerView, ...]:
        """Workers that would compute a prompt that came now."""
        return self._placer.pools().prompt_workers

    def _uncached_tokens(self, work: Work, views: tuple[WorkerView, ...]) -> dict[str, int]:
        cached_tokens = self._placer.cached_tokens(work, views)
        return {worker_id: work.context_tokens - cached for worker_id, cached in cached_tokens.items()}
