"""Waiting for what a front end that serves in another thread will do."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 20


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, "timed out"
        time.sleep(0.005)
