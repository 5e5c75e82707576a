"""A queue of one event loop for one reader: what `asyncio.Queue` is, without the bounds and counts that cost every
token. Whoever uses one says what bounds it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """First in, first out."""

    __slots__ = ("_items", "_reader")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put_nowait(self, item: T) -> None:
        """Wakes the reader."""
        self._items.append(item)
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    async def get(self) -> T:
        """The next item; waits for one. One task at a time."""
        while not self._items:
            reader = self._reader = asyncio.get_running_loop().create_future()
            await reader
        return self._items.popleft()

    def get_nowait(self) -> T:
        """The next item. IndexError where there is none."""
        return self._items.popleft()

    def peek(self) -> T:
        """The next item, which stays. IndexError where there is none."""
        return self._items[0]

    def empty(self) -> bool:
        """Whether there is none."""
        return not self._items
