"""Ctrl-C once: drain. Twice: stop at once. SIGTERM and SIGHUP count as Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Turns signals into events while it is entered; main thread only. A third signal raises KeyboardInterrupt.

    `on_signal` is called in the handler with how many have come; it should only print.
    """

    def __init__(self, on_signal: Callable[[int], None] | None = None) -> None:
        self.first = threading.Event()
        self.second = threading.Event()
        self._on_signal = on_signal or (lambda count: None)
        self._count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._on_signal(self._count)
        self.first.set()
        if self._count == 2:
            self.second.set()
        if self._count > 2:
            raise KeyboardInterrupt
