"""Processes that a benchmark starts, and that say in one line of their standard output where they serve."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from typing import Any

STOP_TIMEOUT_S = 10.0


def addresses_of(process: subprocess.Popen[bytes], name: str, within_s: float) -> dict[str, Any]:
    """What its first line says, JSON. RuntimeError where it ends before, or says nothing within `within_s`."""
    assert process.stdout is not None
    line, until_s = b"", time.monotonic() + within_s
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(until_s - time.monotonic(), 0.0))[0]:
            raise RuntimeError(f"{name} did not serve within {within_s:g} s")
        part = os.read(process.stdout.fileno(), 65536)
        if not part:
            raise RuntimeError(f"{name} ended with {process.wait(STOP_TIMEOUT_S)} before it served")
        line += part
    addresses: dict[str, Any] = json.loads(line)
    return addresses


def end(process: subprocess.Popen[bytes]) -> None:
    """Closes its standard input, where that is ours, asks it to end, and kills it where it does not."""
    assert process.stdout is not None
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
