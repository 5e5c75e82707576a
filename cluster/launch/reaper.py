"""Ends what a local Ray has started when whoever started it is gone, kill -9 included: Ray's own agents would go on.

Runs as a file of its own, with the standard library alone: `python -I -S reaper.py FOLDER`, in a session of its own. It
waits for its stdin to close, which happens when the launcher ends, however it ends, and then kills the processes that
work inside the folder and removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

_ROUND_S = 0.05
_PATIENCE_S = 5.0


def inside_of(folder: Path) -> list[int]:
    """Processes whose working directory is within the folder: all that a Ray started from it has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.joinpath("cwd").readlink().is_relative_to(folder) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def reap(folder: Path) -> None:
    """Kills what works inside the folder, until nothing does, and removes the folder. Bounded; idempotent."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while (pids := inside_of(folder)) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_ROUND_S)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    reap(Path(sys.argv[1]))
