"""The router's own bounded queue: requests between the door and their first token. Pure; time is passed in.

Beyond the bound a request is refused at once with 429 and a Retry-After, not left to rot. The Retry-After is the time
the queue needs to drain at the rate at which first tokens have been coming.
"""

from __future__ import annotations

from collections import deque

from .errors import Overloaded

RATE_WINDOW = 64
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


class Admission:
    """Counts who waits: `enter` when a request comes, `first_token` when one of its choices has one, `leave` at its
    end.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: set[str] = set()
        self._first_tokens_s: deque[float] = deque(maxlen=RATE_WINDOW)

    @property
    def waiting(self) -> int:
        """Requests admitted that have no first token yet."""
        return len(self._waiting)

    def enter(self, key: str, now_s: float) -> None:
        """Takes a place; `Overloaded` when there is none."""
        assert key not in self._waiting, f"{key} enters twice"
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests already wait for their first token; the limit is {self._max_waiting}",
                retry_after_s=self.retry_after_s(now_s),
            )
        self._waiting.add(key)

    def first_token(self, key: str, now_s: float) -> None:
        """The request got its first token: its place is free, and the rate is known better."""
        if key in self._waiting:
            self._waiting.discard(key)
            self._first_tokens_s.append(now_s)

    def leave(self, key: str) -> None:
        """The request ended, first token or not; idempotent."""
        self._waiting.discard(key)

    def retry_after_s(self, now_s: float) -> float:
        """Seconds until about the whole queue has been served; between 1 and 60."""
        if len(self._first_tokens_s) < 2:
            return MIN_RETRY_AFTER_S
        span_s = max(now_s - self._first_tokens_s[0], 1e-3)
        rate = len(self._first_tokens_s) / span_s
        return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, len(self._waiting) / rate))
