"""How many processors this process may use: those it is allowed to run on, and no more than its control groups grant it
time for (Linux, `cgroups(7)`: `cpu.max` in version 2, `cpu.cfs_quota_us` in version 1).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def processors() -> int:
    """At least 1; a part of one is not counted."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return max(1, min(len(os.sched_getaffinity(0)), math.floor(min(quota(), 2**20))))


def quota(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> float:
    """Processors' worth of time that this process's control groups grant, the tightest of them; inf: any.
    `groups`: where they are mounted, `membership`: what this process belongs to.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    found = [math.inf]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found.extend(_along(groups, path, _quota_v2))
        elif "cpu" in controllers.split(","):
            for mount in {controllers, "cpu"}:
                found.extend(_along(groups / mount, path, _quota_v1))
    return min(found)


def _along(mount: Path, path: str, read: Callable[[Path], float]) -> list[float]:
    """Of a group and those above it. A container may see its own as the topmost, whatever it is called outside."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [read(mount.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]


def _quota_v2(group: Path) -> float:
    try:
        granted, period = (group / "cpu.max").read_text().split()
        return math.inf if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _quota_v1(group: Path) -> float:
    try:
        granted = int((group / "cpu.cfs_quota_us").read_text())
        return math.inf if granted <= 0 else granted / int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
