"""The order in which waiting requests are served: shares between SLO classes, earliest deadline first inside one.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM '96, §2): while several classes wait, each gets service in
proportion to its share; what a class leaves unused goes to the others, and none is starved, however small its share.
Inside a class the earliest deadline goes first (Liu and Layland 1973). Whoever has no deadline stands as if it were due
`PATIENCE_S` after it came, so that promises of others do not starve it for good.

Pure; the router's dispatch queue, the engines' queues and the simulator all use this one.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

from .types import Urgency

K = TypeVar("K", bound=Hashable)
PATIENCE_S = 60.0
_DUE = attrgetter("due")


@dataclass(slots=True)
class _Waiter(Generic[K]):
    key: K
    due: tuple[float, int]
    """Deadline, then order of arrival."""
    cost: float
    slo_class: str


@dataclass(slots=True)
class _Class(Generic[K]):
    share: float
    finish: float = 0.0
    """Virtual time at which what it was served so far is paid for."""
    line: list[_Waiter[K]] = field(default_factory=list)
    """Earliest deadline first."""


class FairQueue(Generic[K]):
    """Keys that wait, each with an `Urgency` and a cost (tokens). Not thread-safe; every method is O(waiting) or
    better, the first few of an iteration cost O(classes) each.
    """

    def __init__(self) -> None:
        self._classes: dict[str, _Class[K]] = {}
        self._waiters: dict[K, _Waiter[K]] = {}
        self._now = 0.0
        """Virtual time: the start tag of whoever was served last."""
        self._next_order = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, key: object) -> bool:
        return key in self._waiters

    def __iter__(self) -> Iterator[K]:
        """All keys, in the order in which they would be taken if nobody else came. The queue must not change before
        the last one that is looked at.
        """
        if (line := self._only_line()) is not None:
            for waiter in line:
                yield waiter.key
            return
        heads = [(max(self._now, c.finish), -c.share, name, 0) for name, c in self._classes.items() if c.line]
        heapq.heapify(heads)
        while heads:
            tag, minus_share, name, place = heads[0]
            line = self._classes[name].line
            yield line[place].key
            if place + 1 < len(line):
                heapq.heapreplace(heads, (tag - line[place].cost / minus_share, minus_share, name, place + 1))
            else:
                heapq.heappop(heads)

    def push(self, key: K, urgency: Urgency, *, cost: float, now_s: float) -> None:
        """Adds a waiter; its class takes the share that came last. `cost` above 0."""
        assert key not in self._waiters, f"{key!r} waits already"
        mine = self._class_of(urgency)
        due, line = (min(urgency.deadline_s, now_s + PATIENCE_S), self._next_order), mine.line
        waiter = self._waiters[key] = _Waiter(key, due, max(cost, 1e-9), urgency.slo_class)
        if line and line[-1].due > due:
            insort(line, waiter, key=_DUE)
        else:
            line.append(waiter)
        self._next_order += 1

    def peek(self) -> K | None:
        """Who would be taken next."""
        if (line := self._only_line()) is not None:
            return line[0].key if line else None
        return next(iter(self), None)

    def take(self, key: K) -> None:
        """Serves a waiter, the first or another: it leaves, and its class has paid for it."""
        self.serve(key, self._waiters[key].cost)
        self.remove(key)

    def pass_by(self, urgency: Urgency, *, cost: float) -> None:
        """Who comes while nobody waits is served at once: as `push` and `take`."""
        assert not self._waiters, "others come first"
        self._next_order += 1
        mine = self._class_of(urgency)
        start = max(self._now, mine.finish)
        mine.finish = start + max(cost, 1e-9) / mine.share
        self._now = start
        self._forget_idle()

    def serve(self, key: K, cost: float, *, left: float = 0.0) -> None:
        """Serves a part of a waiter: its class has paid `cost`, and it keeps its place, for `left` more."""
        waiter = self._waiters[key]
        mine = self._classes[waiter.slo_class]
        start = max(self._now, mine.finish)
        mine.finish = start + cost / mine.share
        if len(self._classes) > 1:
            # Where another class should have been first, time does not pass it by: it would lose what it is owed.
            now = self._now
            for other in self._classes.values():
                if other is not mine and other.line:
                    start = min(start, max(now, other.finish))
        self._now = start
        waiter.cost = max(left, 1e-9)

    def remove(self, key: K) -> bool:
        """A waiter leaves, and nothing more is paid for it; False if it does not wait."""
        waiter = self._waiters.pop(key, None)
        if waiter is None:
            return False
        line = self._classes[waiter.slo_class].line
        del line[0 if line[0] is waiter else bisect_left(line, waiter.due, key=_DUE)]
        self._forget_idle()
        return True

    def cost_ahead(self, urgency: Urgency, now_s: float) -> float:
        """Cost of those that would be served before somebody who came now, as if it were pushed and iterated."""
        line = self._only_line()
        if line is not None and (not line or line[0].slo_class == urgency.slo_class):
            due = (min(urgency.deadline_s, now_s + PATIENCE_S), self._next_order)
            return sum([waiter.cost for waiter in line[: bisect_left(line, due, key=_DUE)]])
        probe = object()
        ahead = 0.0
        self.push(probe, urgency, cost=1.0, now_s=now_s)  # type: ignore[arg-type]
        try:
            for key in self:
                if key is probe:
                    return ahead
                ahead += self._waiters[key].cost
        finally:
            self.remove(probe)  # type: ignore[arg-type]
        raise AssertionError("the probe was not found")

    def _only_line(self) -> list[_Waiter[K]] | None:
        """Of the only class in which anybody waits, as is usual; empty where nobody does. None: there are several."""
        found: list[_Waiter[K]] = []
        for mine in self._classes.values():
            if mine.line:
                if found:
                    return None
                found = mine.line
        return found

    def _forget_idle(self) -> None:
        """Classes that wait for nothing and owe nothing are forgotten: the table is as large as what waits."""
        now = self._now
        for name in [name for name, mine in self._classes.items() if not mine.line and mine.finish <= now]:
            del self._classes[name]

    def _class_of(self, urgency: Urgency) -> _Class[K]:
        """Its class, with the share that came last."""
        mine = self._classes.get(urgency.slo_class)
        if mine is None:
            mine = self._classes[urgency.slo_class] = _Class(urgency.share)
        mine.share = urgency.share
        return mine
