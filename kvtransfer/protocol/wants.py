"""Wants: what a decode worker remembers of credits that it had to refuse, so that whoever asked first, or most
urgently, gets the next ones, whatever others ask for meanwhile and however many routers there are. Without them a large
context would wait for ever behind small ones that always fit.

A want is no promise: it takes no block and no place, and lapses shortly after it was asked for last. Its order is that
of `cluster.fair_queue`, and its class pays when it is granted.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ...cluster.fair_queue import FairQueue
from ...cluster.types import Urgency
from .memory import ChoiceKey

WANT_TTL_S = 0.5
"""Several times what a router lets pass before it asks again."""


@dataclass(slots=True)
class _Want:
    owner: ChoiceKey
    attempt: int
    blocks: int
    expires_s: float


class Wants:
    """At most `limit` of them, each for `ttl_s` after its last `ask`."""

    def __init__(self, *, limit: int, ttl_s: float = WANT_TTL_S) -> None:
        self._limit = limit
        self._ttl_s = ttl_s
        self._wants: OrderedDict[str, _Want] = OrderedDict()
        """In the order of their expiry."""
        self._order: FairQueue[str] = FairQueue()

    def __len__(self) -> int:
        return len(self._wants)

    def ask(self, key: str, owner: ChoiceKey, attempt: int, blocks: int, urgency: Urgency, now_s: float) -> None:
        """Takes a place in the order, or keeps the one that it has; where the table is full, none."""
        if key in self._wants:
            del self._wants[key]
        elif len(self._wants) >= self._limit:
            return
        else:
            self._order.push(key, urgency, cost=blocks, now_s=now_s)
        self._wants[key] = _Want(owner, attempt, blocks, now_s + self._ttl_s)

    def ahead(self, key: str, *, enough_blocks: int, enough_wants: int) -> tuple[int, int]:
        """Blocks and number of the wants that come before this one; before one that has no place come all. Does not
        look on when it has seen more than enough of either.
        """
        blocks = wants = 0
        for other in self._order:
            if other == key or blocks > enough_blocks or wants > enough_wants:
                break
            blocks += self._wants[other].blocks
            wants += 1
        return blocks, wants

    def pass_by(self, blocks: int, urgency: Urgency) -> None:
        """Who asks while nobody waits, and has its credit at once: as `ask` and `granted`."""
        self._order.pass_by(urgency, cost=blocks)

    def granted(self, key: str) -> None:
        """It has its credit."""
        if self._wants.pop(key, None) is not None:
            self._order.take(key)

    def drop(self, owner: ChoiceKey, attempt: int) -> None:
        """Forgets those of the choice, of `attempt` and all before it."""
        for key in [k for k, w in self._wants.items() if w.owner == owner and w.attempt <= attempt]:
            self._forget(key)

    def expire(self, now_s: float) -> None:
        """Forgets those that were not asked for again in time."""
        while self._wants and now_s >= next(iter(self._wants.values())).expires_s:
            self._forget(next(iter(self._wants)))

    def check_integrity(self) -> None:
        """Raises AssertionError if the order and the table differ, or are too long."""
        assert set(self._order) == set(self._wants)
        assert len(self._wants) <= self._limit

    def _forget(self, key: str) -> None:
        del self._wants[key]
        self._order.remove(key)
