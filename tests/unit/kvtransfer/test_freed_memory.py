"""Memory of KV messages is used again: the kernel is not asked for it message by message."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource
from tandem.kvtransfer.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(64):
        message = bytes(2**20)
        del message
        [bytes(2**19) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
faults()
print(faults())
"""


def test_messages_are_written_into_pages_that_are_there() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 1000, "64 messages of 1 MiB, and four of half of it each, have 49152 pages"
