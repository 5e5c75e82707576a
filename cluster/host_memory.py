"""How much memory this machine has, or what a control group leaves of it to this process (Linux; `cgroups(7)`)."""

from __future__ import annotations

from pathlib import Path

_MEMINFO, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def total_bytes(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """All of it; 0: not known."""
    total, allowed = _of_machine("MemTotal:", meminfo), _number(group / "memory.max")
    return total if allowed is None else min(total, allowed)


def available_bytes(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """What could be used now without taking it from anybody; 0: not known."""
    free = _of_machine("MemAvailable:", meminfo)
    allowed, used = _number(group / "memory.max"), _number(group / "memory.current")
    return free if allowed is None or used is None else min(free, max(0, allowed - used))


def _of_machine(which: str, meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)


def _number(path: Path) -> int | None:
    """None: there is no such file, or it sets no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
