"""How many bytes of request bodies a router holds at once: one body is bounded by `max_body_bytes`, all of them here.

A request holds its bytes from the moment they arrive until it was answered, because its parsed form lives as long.
Used from one event loop. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import Overloaded

MAX_HELD_BYTES = 128 * 2**20
"""A parsed body takes several times its bytes; this leaves a router well below two gigabytes whatever it is sent."""
RETRY_AFTER_S = 1.0


class BodyBudget:
    """Counts bytes; whoever takes some gives them back."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Overloaded where the bodies inside leave no room for so many more."""
        if self.held_bytes + size_bytes > self._limit_bytes:
            raise Overloaded(
                f"requests with {self.held_bytes} bytes of bodies are inside; allowed: {self._limit_bytes} at once",
                retry_after_s=RETRY_AFTER_S,
            )
        self.held_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Once for everything that was taken."""
        assert 0 <= size_bytes <= self.held_bytes
        self.held_bytes -= size_bytes

    @contextmanager
    def holding(self, size_bytes: int) -> Iterator[None]:
        """Takes and gives back."""
        self.take(size_bytes)
        try:
            yield
        finally:
            self.give_back(size_bytes)
