"""Waiting for what must be over before whoever waits for it goes on, and be it to its own end. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

R = TypeVar("R")


async def to_its_end(work: Awaitable[R], on_cancel: Callable[[], object] = lambda: None) -> R:
    """The result of `work`, which nobody's cancellation ends: whoever is cancelled while it waits, once or more often,
    is cancelled when it is over. A pull may be: by its own deadline, by what aborts it, by its worker's end.
    `on_cancel` is called each time.
    """
    ended, cancelled = asyncio.ensure_future(work), None
    while not ended.done():
        try:
            await asyncio.wait((ended,))
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is not None:
        await asyncio.gather(ended, return_exceptions=True)  # what went wrong is not asked for any more
        raise cancelled
    return ended.result()
