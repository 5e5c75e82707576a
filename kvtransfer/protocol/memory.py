"""A bounded, forgetful map: what a state machine remembers about attempts that are over, so that late messages are
refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedMemory(Generic[K, V]):
    """Remembers at most `limit` values, each for `ttl_s` after its last `put`; the oldest goes first."""

    def __init__(self, *, limit: int, ttl_s: float) -> None:
        if limit < 1:
            raise ValueError(f"limit: {limit} is not positive")
        self._limit = limit
        self._ttl_s = ttl_s
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def put(self, key: K, value: V, now_s: float) -> None:
        """Remembers `value`, anew."""
        self._values.pop(key, None)
        self._values[key] = (now_s + self._ttl_s, value)
        while len(self._values) > self._limit:
            self._values.popitem(last=False)

    def get(self, key: K) -> V | None:
        """The value, or None. Does not renew."""
        entry = self._values.get(key)
        return entry[1] if entry is not None else None

    def expire(self, now_s: float) -> None:
        """Forgets what is older than `ttl_s`. Values are in order of their expiry."""
        while self._values and next(iter(self._values.values()))[0] <= now_s:
            self._values.popitem(last=False)


class ChoiceKey(NamedTuple):
    """Names one choice of one request over all its attempts."""

    request_id: str
    choice: int


class AbortFloors:
    """The highest attempt that was aborted, by choice: an abort that overtakes what it aborts still counts."""

    def __init__(self, *, limit: int, ttl_s: float) -> None:
        self._floors: BoundedMemory[ChoiceKey, int] = BoundedMemory(limit=limit, ttl_s=ttl_s)

    def __len__(self) -> int:
        return len(self._floors)

    def raise_to(self, choice: ChoiceKey, attempt: int, now_s: float) -> None:
        """Aborts `attempt` and all before it."""
        self._floors.put(choice, max(attempt, self._floors.get(choice) or 0), now_s)

    def covers(self, choice: ChoiceKey, attempt: int) -> bool:
        """True if `attempt` was aborted."""
        floor = self._floors.get(choice)
        return floor is not None and attempt <= floor

    def expire(self, now_s: float) -> None:
        """Forgets what is old."""
        self._floors.expire(now_s)
