"""How long a step takes on a device, and whether it is over."""

from __future__ import annotations

import time

import torch


class StepClock:
    """When a step began and ended on the device, and what tells that it has."""

    def __init__(self, on_gpu: bool) -> None:
        self._events = None
        if on_gpu:
            self._events = tuple(torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self._times_s = [0.0, 0.0]

    def begin(self) -> None:
        self._mark(0)

    def end(self) -> None:
        self._mark(1)

    def ended(self) -> bool:
        """Whether the end is behind the device."""
        return self._events is None or bool(self._events[1].query())

    def wait_s(self) -> float:
        """Waits for the end; how long the step took."""
        if self._events is None:
            return self._times_s[1] - self._times_s[0]
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000

    def _mark(self, which: int) -> None:
        if self._events is None:
            self._times_s[which] = time.monotonic()
        else:
            self._events[which].record()
