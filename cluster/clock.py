"""Time as a parameter: pure code asks a `Clock`, the runtime gives it real time, tests and the simulator virtual
time.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """Seconds since an arbitrary origin, never going back. Called often; must not block."""

    @abstractmethod
    def now_s(self) -> float:
        """Current time in seconds."""


class MonotonicClock(Clock):
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()


class VirtualClock(Clock):
    """A clock that moves only when told to; for tests and the simulator."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> float:
        """Moves time forward by `seconds` >= 0 and returns the new time."""
        if seconds < 0:
            raise ValueError(f"seconds: {seconds} is negative; a clock never goes back")
        self._now_s += seconds
        return self._now_s
