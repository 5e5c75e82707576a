"""Keeps memory that KV messages are read into, message after message, instead of giving it back each time.

glibc maps allocations of 128 KiB and more anew from the kernel and trims the end of its heap, so that every message of
a pull is written into pages that the kernel first has to find and zero: about a third of the processor time of
receiving it.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
MMAP_BYTES = 8 * 2**20
"""Allocations from here on are mapped, and given back, one by one."""
TRIM_BYTES = 16 * 2**20
"""What may lie free at the end of a heap."""


def keep_freed_memory() -> bool:
    """Sets glibc's thresholds for this process; False where there is another allocator. Idempotent."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES))
