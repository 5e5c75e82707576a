"""How much a holder has copied out of its blocks and not sent yet, over all sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class StagedBytes:
    """First come, first served. Used on one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes: int = limit_bytes
        self._taken_bytes = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @property
    def taken_bytes(self) -> int:
        """Now."""
        return self._taken_bytes

    @asynccontextmanager
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        """Waits until so many bytes are free, and has them. ValueError where they never are."""
        if num_bytes > self.limit_bytes:
            raise ValueError(f"num_bytes: {num_bytes} is more than {self.limit_bytes}")
        async with self._turn:
            while self._taken_bytes + num_bytes > self.limit_bytes:
                self._freed.clear()
                await self._freed.wait()
            self._taken_bytes += num_bytes
        try:
            yield
        finally:
            self._taken_bytes -= num_bytes
            self._freed.set()
