"""A queue of one event loop for one reader: what `asyncio.Queue` is, without the bounds and counts that cost every
token. Whoever uses one says what bounds it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """First in, first out. `tap`, while the reader waits and nothing is here, is offered an item in the call that
    brings it; what it takes (True) the reader never sees, and no task is woken for it. It must not raise.
    """

    __slots__ = ("_items", "_reader", "tap")

    def __init__(self) -> None:
        self.tap: Callable[[T], bool] | None = None
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put_nowait(self, item: T) -> None:
        """Wakes the reader, unless the tap takes the item."""
        reader = self._reader
        if reader is None or reader.done():
            self._items.append(item)
            return
        if self.tap is not None and self.tap(item):
            return
        self._items.append(item)
        self._reader = None
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
