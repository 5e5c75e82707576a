"""What timings depend on, whatever was timed."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """As its maker calls it, or its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    line = next((line for line in text.splitlines() if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.machine()
