"""Virtual time: what is to happen, in order.

Entries are `(time, number, action)`: of two at the same time, the one that was planned first comes first, so that a run
depends on nothing but its input (the idea is SimPy's).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from ..clock import Clock

Action = Callable[[], None]


class Event:
    """Something planned that may be given up: `cancel` until it has happened."""

    __slots__ = ("action", "at_s")

    def __init__(self, at_s: float, action: Action) -> None:
        self.at_s = at_s
        self.action: Action | None = action

    def cancel(self) -> None:
        """It will not happen; idempotent."""
        self.action = None


class Timeline(Clock):
    """A clock that jumps from one event to the next. Single-threaded."""

    def __init__(self) -> None:
        self.time_s = 0.0
        """As `now_s()`, for who asks often."""
        self._heap: list[tuple[float, int, Action | Event]] = []
        self._next_number = 0
        self.events_total = 0
        """Events that have happened."""

    def now_s(self) -> float:
        """See `Clock.now_s`."""
        return self.time_s

    def at(self, at_s: float, action: Action) -> Event:
        """Plans `action` for `at_s`, which is not before now."""
        assert at_s >= self.time_s, f"{at_s} is before {self.time_s}"
        event = Event(at_s, action)
        number = self._next_number = self._next_number + 1
        heapq.heappush(self._heap, (at_s, number, event))
        return event

    def after(self, delay_s: float, action: Action) -> Event:
        """Plans `action` for `delay_s` from now, 0 or more."""
        return self.at(self.time_s + delay_s, action)

    def do_at(self, at_s: float, action: Action) -> None:
        """As `at`, of what is never cancelled: most that happens, and cheaper."""
        number = self._next_number = self._next_number + 1
        heapq.heappush(self._heap, (at_s, number, action))

    def do_after(self, delay_s: float, action: Action) -> None:
        """As `after`, of what is never cancelled."""
        number = self._next_number = self._next_number + 1
        heapq.heappush(self._heap, (self.time_s + delay_s, number, action))

    def nothing_now(self) -> bool:
        """Whether nothing else is planned for this very moment: what would be planned for it may as well be done."""
        return not self._heap or self._heap[0][0] > self.time_s

    def end(self) -> None:
        """Nothing that is planned happens any more."""
        self._heap.clear()

    def run(self, until_s: float = math.inf) -> None:
        """Lets things happen, in order, until nothing is planned or the next thing would be later than `until_s`."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            at_s, _, planned = pop(heap)
            if isinstance(planned, Event):
                action, planned.action = planned.action, None
                if action is None:
                    continue
            else:
                action = planned
            self.time_s = at_s
            self.events_total += 1
            action()
        if math.isfinite(until_s):
            self.time_s = max(self.time_s, until_s)
