"""Ctrl-C in the middle of a measurement: what was measured is kept, a second one ends the process at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(asyncio.Event):
    """Set by the first signal."""

    signal_number: int = signal.SIGINT
    """Which one it was."""

    @property
    def exit_code(self) -> int:
        """As shells count it: 130 after Ctrl-C."""
        return 128 + self.signal_number


@contextmanager
def stops() -> Iterator[Stop]:
    """Inside, in the main thread's event loop: SIGINT or SIGTERM sets the event; a second signal does what it always
    did, as does the first one before and after.
    """
    loop, stop = asyncio.get_running_loop(), Stop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            if loop.remove_signal_handler(number):
                signal.signal(number, handler)

    def told(number: int) -> None:
        stop.signal_number = number
        stop.set()
        restore()

    for number in _SIGNALS:
        loop.add_signal_handler(number, told, number)
    try:
        yield stop
    finally:
        restore()


async def finishes(work: Coroutine[Any, Any, object], stop: Stop | None) -> bool:
    """Awaits the work; False where the stop came first, and the work is canceled. Raises what the work raises."""
    if stop is None:
        await work
        return True
    task, told = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        told.cancel()
        task.cancel()
