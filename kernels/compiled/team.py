"""Threads that run one compiled step together: each calls the same kernel with its own rank and meets the others at
spin barriers inside it.

Helpers sleep on a lock between steps. Inside a step they spin, at first without giving up the core, then yielding it:
a step still ends where there are more threads than cores. A kernel that a team runs ends with a barrier: after it no
helper touches the step's memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .atomics import atomic_add, atomic_load, atomic_store, pause, sched_yield
from .target import kernel

BARRIER_BYTES = 128
"""Memory of one barrier, zeroed: how many have arrived; 64 bytes on, how often all had."""
_SPINS = 2000
"""Looks at the barrier before the core is given up; some tens of microseconds."""


@kernel
def barrier(address: int, ranks: int) -> None:
    """Returns when all `ranks` threads have called it. What each wrote before is seen by all after."""
    if ranks == 1:
        return
    turn = atomic_load(address + 64)
    if atomic_add(address, 1) == ranks - 1:
        atomic_store(address, 0)
        atomic_store(address + 64, turn + 1)
        return
    spins = 0
    while atomic_load(address + 64) == turn:
        spins += 1
        if spins > _SPINS:
            sched_yield()
        else:
            pause()


class Team:
    """`threads` threads, the caller's included. Used by one caller at a time; `close` ends the helpers."""

    def __init__(self, threads: int, cpus: Sequence[int] = ()) -> None:
        """Starts threads - 1 helpers, pinned in turn to `cpus`, the caller's being the first; empty: not pinned.

        ValueError if `threads` is not 1 or more.
        """
        if threads < 1:
            raise ValueError(f"threads: {threads} is not 1 or more")
        self.threads = threads
        memory = np.zeros(BARRIER_BYTES + 64, dtype=np.uint8)
        start = -memory.ctypes.data % 64
        self._memory = memory[start : start + BARRIER_BYTES]
        self.barrier = self._memory.ctypes.data
        """Address of the team's barrier."""
        self._call: tuple[Callable[..., Any], tuple[int, ...]] | None = None
        self._wake = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._helpers = [
            threading.Thread(
                target=self._help,
                args=(rank, cpus[rank % len(cpus)] if cpus else None),
                name=f"kernel-{rank}",
                daemon=True,
            )
            for rank in range(1, threads)
        ]
        for helper in self._helpers:
            helper.start()

    def run(self, function: Callable[..., Any], *arguments: int) -> None:
        """function(*arguments, rank, threads) on every thread; returns when the caller's part has ended.

        `function` is a kernel that was compiled before, and ends with `barrier`.
        """
        self._call = (function, arguments)
        for wake in self._wake:
            wake.release()
        function(*arguments, 0, self.threads)

    def close(self) -> None:
        """Ends the helpers and waits for them. Nothing runs then; may be called again."""
        self._call = None
        for wake in self._wake:
            wake.release()
        for helper in self._helpers:
            helper.join()
        self._wake, self._helpers = [], []

    def _help(self, rank: int, cpu: int | None) -> None:
        if cpu is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {cpu})
        wake = self._wake[rank - 1]
        while True:
            wake.acquire()
            if self._call is None:
                return
            function, arguments = self._call
            function(*arguments, rank, self.threads)
