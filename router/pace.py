"""How far apart frames of commands leave where a router's process is busy all the time. Pure.

A frame and its answer take 0.15 ms of the event loop, whatever is in them. gRPC hands a router its requests one by one,
and each would send frames of its own: a third of the loop at 900 requests a second. Waiting for company costs nothing
where the loop has other work meanwhile, and time to first token where it has not: the gap grows while the process takes
about all of a core, and shrinks as soon as it does not.
"""

from __future__ import annotations

from collections.abc import Callable

WINDOW_S = 0.02
BUSY_SHARE = 0.95
MAX_GAP_S = 0.003
LONGER_S, SHORTER_S = 0.00025, 0.0005
"""A window."""


class Pace:
    """Of one worker's frames."""

    def __init__(self, now_s: float, cpu_s: Callable[[], float]) -> None:
        """`cpu_s`: processor time of this process so far; asked once a window."""
        self.gap_s = 0.0
        """The next frame leaves so long after the last one."""
        self._cpu_s = cpu_s
        self._begun_s = now_s
        self._begun_cpu_s = cpu_s()

    def left(self, now_s: float) -> None:
        """A frame leaves."""
        window_s = now_s - self._begun_s
        if window_s < WINDOW_S:
            return
        cpu_s = self._cpu_s()
        busy = cpu_s - self._begun_cpu_s >= BUSY_SHARE * window_s
        self.gap_s = min(self.gap_s + LONGER_S, MAX_GAP_S) if busy else max(self.gap_s - SHORTER_S, 0.0)
        self._begun_s, self._begun_cpu_s = now_s, cpu_s
