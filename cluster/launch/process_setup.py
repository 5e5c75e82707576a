"""What an actor's process does first, before it loads what computes."""

from __future__ import annotations

import os
import signal
import threading

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def set_threads(count: int) -> None:
    """Threads of the libraries that are loaded later."""
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(count)


def ignore_interrupts() -> None:
    """Ctrl-C in the terminal reaches every process of its group; the driver alone decides what it means."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
