"""How long each part of a member's start took, from the birth of its process on: what `tandem serve` says when it is
ready, and a plain process (`cluster.launch.process`) in its first line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path


class Stages:
    """One stage at a time; a stage that comes again goes on. Used by one thread at a time."""

    def __init__(self, first: str = "process", *, age_s: float | None = None) -> None:
        """`age_s`: how long ago the first stage began; None: with this process."""
        self._took_s: dict[str, float] = {}
        self._stage = first
        self._since_s = time.monotonic() - (process_age_s() if age_s is None else age_s)

    def enter(self, stage: str) -> None:
        """The stage that ran ends, and this one begins."""
        now_s = time.monotonic()
        self._took_s[self._stage] = self._took_s.get(self._stage, 0.0) + now_s - self._since_s
        self._stage, self._since_s = stage, now_s

    def end(self) -> dict[str, float]:
        """Seconds of every stage, in order; the last one ends now."""
        self.enter("")
        return {stage: round(took_s, 3) for stage, took_s in self._took_s.items()}


def process_age_s() -> float:
    """Since this process began, from proc_pid_stat(5); 0 where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def describe(took_s: Mapping[str, float]) -> str:
    """`5.2 s (process 0.9, imports 1.1, …)`. Pure."""
    parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in took_s.items())
    return f"{sum(took_s.values()):.1f} s ({parts})"
