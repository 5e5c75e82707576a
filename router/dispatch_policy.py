"""Who of those that wait at the router may ask the workers now. Pure: time is passed in, asking is the driver's
(`router.dispatch`).

Everybody waits in one `FairQueue`. While nobody is refused, several ask at once, in its order. Who is refused (no
worker grants a credit, or none would keep its promise) is held: from then on only the head of the queue asks, when
something has changed or a while has passed, until the one that was held has been granted or has left. So a large
request at the head is not overtaken for ever by small ones behind it, but by more urgent ones that come.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..cluster.fair_queue import FairQueue
from ..cluster.types import Urgency

K = TypeVar("K", bound=Hashable)
MAX_ASKING = 32
"""Requests that ask at once while nobody is refused: many times what one round trip would allow one after the other."""
RETRY_S = 0.05
"""Longest wait until who is held asks again."""
RETRY_CHANGED_S = 0.005
"""The same after something has changed, so that a busy cluster is not asked with every token."""
DRAIN_MEMORY_S = 10.0
DRAIN_LEARNED_S = 0.25


@dataclass(slots=True)
class _Entry:
    urgency: Urgency
    cost: float
    ready: bool = False
    asking: bool = False


class _Drain:
    """The rate at which the workers take what is held back, over the last seconds in which something was."""

    def __init__(self) -> None:
        self._held_s = 0.0
        self._granted = 0.0
        self._last_s = 0.0

    def begin(self, now_s: float) -> None:
        self._last_s = now_s

    def advance(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._last_s)
        fade = math.exp(-passed_s / DRAIN_MEMORY_S)
        self._held_s = self._held_s * fade + passed_s
        self._granted *= fade
        self._last_s = now_s

    def granted(self, cost: float) -> None:
        self._granted += cost

    def per_s(self, at_least: float) -> float | None:
        """Cost a second; None: too early to say. `at_least`: what is about to be granted, if nothing was so far."""
        if self._held_s < DRAIN_LEARNED_S:
            return None
        return max(self._granted, at_least) / self._held_s


class DispatchPolicy(Generic[K]):
    """One per router. `enter`, then `ready`; while `candidate` names somebody: `ask`, and then `granted`, `refused` or
    `leave`.
    """

    def __init__(self, *, max_asking: int = MAX_ASKING) -> None:
        self._max_asking = max_asking
        self._queue: FairQueue[K] = FairQueue()
        self._entries: dict[K, _Entry] = {}
        self._asking_cost = 0.0
        self._asking = 0
        self._held: K | None = None
        self._tried: K | None = None
        """The head that was refused last, and when."""
        self._tried_s = -math.inf
        self._changed = False
        self._drain = _Drain()
        self._absent = False

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        """All that wait, in their order."""
        return iter(self._queue)

    @property
    def asking_cost(self) -> float:
        """Of those that ask now."""
        return self._asking_cost

    def waiting_by_class(self) -> dict[str, int]:
        """How many wait, by SLO class."""
        counts: dict[str, int] = {}
        for entry in self._entries.values():
            counts[entry.urgency.slo_class] = counts.get(entry.urgency.slo_class, 0) + 1
        return counts

    def enter(self, key: K, urgency: Urgency, *, cost: float, now_s: float) -> None:
        """Takes a place; it counts for those behind, but does not ask before it is `ready`."""
        self._entries[key] = _Entry(urgency, cost)
        self._queue.push(key, urgency, cost=cost, now_s=now_s)

    def pass_by(self, urgency: Urgency, *, cost: float) -> None:
        """Who comes while nobody waits, asks and is served at once: as `enter`, `ready`, `ask` and `granted`."""
        self._absent = False
        self._queue.pass_by(urgency, cost=cost)

    def ready(self, key: K) -> None:
        """It could ask now."""
        self._entries[key].ready = True

    def waits(self, key: K) -> bool:
        """Whether it could ask and does not."""
        entry = self._entries.get(key)
        return entry is not None and entry.ready and not entry.asking

    def candidate(self, now_s: float) -> K | None:
        """Who should ask now; None: nobody, until something changes or `retry_s`."""
        if self._held is not None:
            head = self._queue.peek()
            assert head is not None, "somebody is held, so somebody waits"
            entry = self._entries[head]
            if not entry.ready or entry.asking:
                return None
            return head if head is not self._tried or now_s >= self._retry_s() else None
        if self._asking >= min(self._max_asking, len(self._entries)):
            return None
        for key in self._queue:
            entry = self._entries[key]
            if not entry.asking:
                return key if entry.ready else None
        return None

    def _retry_s(self) -> float:
        return self._tried_s + (RETRY_CHANGED_S if self._changed else RETRY_S)

    @property
    def holds(self) -> bool:
        """Whether somebody was refused and waits for it."""
        return self._held is not None

    def retry_s(self) -> float | None:
        """When `candidate` should be asked again though nothing has happened; None: no need: nobody is held, or what
        the head of the queue does brings news of itself.
        """
        head = self._queue.peek() if self.holds else None
        return self._retry_s() if head is not None and self.waits(head) else None

    def ask(self, key: K) -> None:
        """It asks now."""
        entry = self._entries[key]
        entry.asking = True
        self._asking += 1
        self._asking_cost += entry.cost

    def refused(self, key: K, now_s: float, *, absent: bool = False) -> None:
        """Nobody takes it now: it keeps its place. `absent`: because nobody is there, which says nothing of how fast
        workers take what waits.
        """
        self._asked(key)
        if self._held is None:
            self._held = key
            self._drain.begin(now_s)
        self._drain_to(now_s)
        self._absent = absent
        self._tried, self._tried_s, self._changed = key, now_s, False

    def granted(self, key: K, now_s: float) -> None:
        """It is served, and its class has paid."""
        entry = self._entries[key]
        self._asked(key)
        if self._held is not None:
            self._drain_to(now_s)
            self._drain.granted(entry.cost)
        self._absent = False
        self._queue.take(key)
        self._forget(key)

    def leave(self, key: K, now_s: float) -> None:
        """It waits no longer, served or not; idempotent."""
        if key not in self._entries:
            return
        self._asked(key)
        if self._held is not None:
            self._drain_to(now_s)
        self._queue.remove(key)
        self._forget(key)

    def changed(self) -> None:
        """The workers' state may have changed: who was refused may ask again soon."""
        self._changed = True

    def cost_ahead(self, urgency: Urgency, now_s: float) -> float:
        """Of those that would be served before somebody who came now."""
        return self._queue.cost_ahead(urgency, now_s)

    def decode_wait_s(self, cost: float, now_s: float) -> float:
        """How long the workers would take, at the rate of the last seconds, for so much; 0 while nobody is held."""
        if self._held is None or self._absent:
            return 0.0
        self._drain_to(now_s)
        per_s = self._drain.per_s(self._entries[self._held].cost)
        return 0.0 if per_s is None else cost / per_s

    def _drain_to(self, now_s: float) -> None:
        if self._absent:
            self._drain.begin(now_s)
        else:
            self._drain.advance(now_s)

    def _asked(self, key: K) -> None:
        entry = self._entries[key]
        if entry.asking:
            entry.asking = False
            self._asking -= 1
            self._asking_cost -= entry.cost

    def _forget(self, key: K) -> None:
        del self._entries[key]
        if key is self._held:
            self._held = None
        if key is self._tried:
            self._tried = None
        if not self._entries:
            self._asking_cost = 0.0
