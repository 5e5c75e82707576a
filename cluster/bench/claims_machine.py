"""Whether the machine, and not what is measured, limited a measurement: how long processes waited for a processor
(Linux counts it for every thread), how much they had, and how busy the machine was with whatever else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_WAIT_SHARE = 0.1
"""Of the time, that a process may stand in the line for a processor: its threads' waits together."""
MAX_CPU_SHARE = 0.85
"""Of one processor, that a process with one event loop may use."""
MAX_STOLEN_SHARE = 0.05
"""Of the machine, that its host may give to somebody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Counters at one moment, seconds."""

    at_s: float
    ran_s: Mapping[str, float]
    """Processor time by process."""
    waited_s: Mapping[str, float]
    busy_s: float
    """Of all processors of the machine."""
    stolen_s: float
    whole_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Strain:
    """What a stretch of time asked of the machine. Shares, 0 to 1; of processes: of one processor."""

    cpu: Mapping[str, float]
    waited: Mapping[str, float]
    busy: float
    stolen: float
    others: float = 0.0
    """Of the machine, what was in use by nobody of those that were watched."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why what was measured meanwhile says more about the machine; empty: it does not."""
        found = [
            f"{name} waited {100 * share:.0f} % of the time for a processor"
            for name, share in self.waited.items()
            if share > MAX_WAIT_SHARE
        ]
        found += [
            f"{name} used {100 * share:.0f} % of a processor"
            for name, share in self.cpu.items()
            if share > MAX_CPU_SHARE
        ]
        if self.stolen > MAX_STOLEN_SHARE:
            found.append(f"the host took {100 * self.stolen:.0f} % of the machine away")
        return tuple(found)


def take_sample(processes: Mapping[str, int], proc: Path = Path("/proc")) -> Sample:
    """Reads the counters of processes, by name and id. A process that is gone counts nothing."""
    ran, waited = {}, {}
    for name, pid in processes.items():
        ran[name], waited[name] = _threads(proc / str(pid) / "task")
    tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, iowait, irq, softirq, steal = (
        int(value) * tick_s for value in (proc / "stat").read_text().splitlines()[0].split()[1:9]
    )
    busy_s = user + nice + system + irq + softirq
    return Sample(
        at_s=time.monotonic(),
        ran_s=ran,
        waited_s=waited,
        busy_s=busy_s,
        stolen_s=steal,
        whole_s=busy_s + idle + iowait + steal,
    )


def strain(before: Sample, after: Sample) -> Strain:
    """What happened between two samples."""
    wall_s = max(after.at_s - before.at_s, 1e-9)
    whole_s = max(after.whole_s - before.whole_s, 1e-9)
    ran_s = {name: max(0.0, after.ran_s[name] - before.ran_s[name]) for name in after.ran_s}
    busy = (after.busy_s - before.busy_s) / whole_s
    return Strain(
        cpu={name: seconds / wall_s for name, seconds in ran_s.items()},
        waited={name: max(0.0, after.waited_s[name] - before.waited_s[name]) / wall_s for name in after.waited_s},
        busy=busy,
        stolen=(after.stolen_s - before.stolen_s) / whole_s,
        others=max(0.0, busy - sum(ran_s.values()) / whole_s),
    )


def _threads(folder: Path) -> tuple[float, float]:
    """(ran, waited) of all threads, seconds."""
    ran = waited = 0
    for thread in folder.glob("*/schedstat"):
        try:
            values = thread.read_text().split()
        except OSError:  # it ended meanwhile
            continue
        ran, waited = ran + int(values[0]), waited + int(values[1])
    return ran * 1e-9, waited * 1e-9
