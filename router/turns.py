"""Whose turn it is among those that wait at the router: `DispatchPolicy`'s order, the room that prefill workers have,
and how long one waits where no worker is there at all. Pure: `dispatch` drives it with tasks and calls, `cluster.sim`
in virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from ..cluster.types import Urgency
from .dispatch_policy import RETRY_S, DispatchPolicy
from .forecast import Forecast, forecast, room_tokens
from .placement import WorkerView

UNREADY_POLL_S = 0.25
"""How often those that wait for any worker at all are looked at."""
MIN_WAIT_S = 0.001
"""No timer is set for less."""


class Spot:
    """A place in the queue, of one attempt at one choice."""

    __slots__ = ("entered_s", "needs_room", "urgency", "waits_until_s")

    def __init__(self, entered_s: float, urgency: Urgency, *, needs_room: bool) -> None:
        self.entered_s = entered_s
        self.urgency = urgency
        self.needs_room = needs_room
        """Of a prefill worker; not where the prompt is computed already."""
        self.waits_until_s: float | None = None
        """Up to when it waits for workers to come back, where the work says so."""


S = TypeVar("S", bound=Spot)
Views = Callable[[], tuple[WorkerView, ...]]


class Outlook(NamedTuple):
    """A request as the queue sees it."""

    cost_tokens: int
    """Of its prompt, what the worker that has the most of it lacks."""
    forecast: Forecast | None
    """None: nobody knows yet."""


class Turns(Generic[S]):
    """One per router. `expect`, then `ready`; whom `due` names asks the workers, and then is `placed`, `refused`,
    `absent`, or leaves.
    """

    def __init__(self, *, unready_wait_s: float) -> None:
        self._unready_wait_s = unready_wait_s
        self._policy: DispatchPolicy[S] = DispatchPolicy()
        self._room: tuple[tuple[WorkerView, ...], bool, float] = ((), False, 0.0)
        """What `room_tokens` said last: of which workers, and whether of work that is due at some time."""
        self._unready_s: float | None = None
        """Since when no worker was there at all, as far as anybody asked."""

    def __len__(self) -> int:
        return len(self._policy)

    def waiting_by_class(self) -> Mapping[str, int]:
        """How many wait here, by SLO class."""
        return self._policy.waiting_by_class()

    def outlook(
        self, views: tuple[WorkerView, ...], uncached_tokens: Mapping[str, int], urgency: Urgency, now_s: float
    ) -> Outlook:
        """What a prompt that came now would cost, and wait for its first token. `views`: those that would compute it;
        `uncached_tokens`: what each of them lacks of it.
        """
        if not views:
            return Outlook(cost_tokens=1, forecast=None)
        ahead, own = self._policy.cost_ahead(urgency, now_s), min(uncached_tokens.values())
        decode_wait_s = self._policy.decode_wait_s(ahead + own, now_s)
        told = forecast(views, uncached_tokens, urgency=urgency, ahead_tokens=ahead, decode_wait_s=decode_wait_s)
        return Outlook(cost_tokens=own, forecast=told)

    def open_to(self, urgency: Urgency, views: Views, *, needs_room: bool) -> bool:
        """Whether somebody who came now would ask at once, and alone: nobody waits, and there is room. Who is then
        placed may `pass_by`.
        """
        if len(self._policy) or self._unready_s is not None:
            return False
        there = views() if needs_room else ()
        return not there or self._room_tokens(there, urgency) > 0.0

    def pass_by(self, urgency: Urgency, cost_tokens: int) -> None:
        """It was placed without a place in the queue: as `expect`, `ready`, `due` and `placed`."""
        self._policy.pass_by(urgency, cost=float(cost_tokens))

    def expect(self, spot: S, cost_tokens: int, now_s: float) -> None:
        """It takes its place; it counts for those behind, but does not ask before it is `ready`."""
        self._policy.enter(spot, spot.urgency, cost=float(cost_tokens), now_s=now_s)

    def ready(self, spot: S) -> None:
        """It could ask now."""
        self._policy.ready(spot)

    def leave(self, spot: S, now_s: float) -> None:
        """It waits no longer, served or not; idempotent."""
        self._policy.leave(spot, now_s)

    def changed(self) -> None:
        """The workers' state may have changed: who was refused may ask again soon."""
        self._policy.changed()

    def due(self, now_s: float, views: Views) -> Iterator[S]:
        """Everybody who asks now, in order; whoever was named has the turn, and may be placed, be refused or leave
        before the next one is named. `views`: the workers that compute prompts.
        """
        if self._unready_s is not None:
            for spot in [spot for spot in self._policy if now_s >= self._gives_up_s(spot)]:
                if self._policy.waits(spot):
                    self._policy.ask(spot)
                    yield spot
        while (head := self._policy.candidate(now_s)) is not None:
            if head.needs_room:
                there = views()
                # Where nobody is there, who asks is told so.
                if there and self._room_tokens(there, head.urgency) <= self._policy.asking_cost:
                    break
            self._policy.ask(head)
            yield head

    def placed(self, spot: S, now_s: float) -> None:
        """Workers took it: it is served."""
        self._unready_s = None
        self._policy.granted(spot, now_s)

    def refused(self, spot: S, now_s: float) -> None:
        """None took it now: it waits on."""
        self._unready_s = None
        self._policy.refused(spot, now_s)

    def absent(self, spot: S, now_s: float) -> bool:
        """No worker is there. True: it has waited long enough for one; it should leave."""
        self._unready_s = now_s if self._unready_s is None else self._unready_s
        if now_s >= self._gives_up_s(spot):
            return True
        self._policy.refused(spot, now_s, absent=True)
        return False

    def look_again_s(self, now_s: float) -> float | None:
        """When `due`, asked just now, should be asked again though nothing has happened; None: no need. A change may
        bring it forward.
        """
        if self._unready_s is not None:
            return now_s + UNREADY_POLL_S if self._policy.holds else None
        retry_s = self._policy.retry_s()
        if retry_s is None:
            return None
        if retry_s <= now_s:  # it lacks room on prefill workers, of which every change tells
            return now_s + RETRY_S
        return max(retry_s, now_s + MIN_WAIT_S)

    def _room_tokens(self, views: tuple[WorkerView, ...], urgency: Urgency) -> float:
        """As `room_tokens`: asked again and again of the same workers while nobody has room."""
        due = math.isfinite(urgency.deadline_s)
        seen, seen_due, room = self._room
        if seen is not views or seen_due is not due:
            room = room_tokens(views, urgency)
            self._room = (views, due, room)
        return room

    def _gives_up_s(self, spot: S) -> float:
        """When it has waited long enough for any worker to be there."""
        if self._unready_s is None:
            return math.inf
        if spot.waits_until_s is not None:
            return spot.waits_until_s
        return max(self._unready_s, spot.entered_s) + self._unready_wait_s
