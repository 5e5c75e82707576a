"""How long a step takes on a device, whether it is over, and whether all is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

_LOOK_S = 0.001


class Queue(Protocol):
    """A stream, as far as its end is concerned."""

    def query(self) -> bool:
        """Whether all of it is done."""
        ...


def at_rest(queues: Sequence[Queue], timeout_s: float) -> bool:
    """Whether all of them are done within that time; one that has failed is."""
    deadline_s = time.monotonic() + timeout_s
    for queue in queues:
        try:
            while not queue.query():
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(_LOOK_S)
        except RuntimeError:
            continue
    return True


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
