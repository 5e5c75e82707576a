"""Credits: a decode worker's bounded promises of KV, given before prefill is dispatched, so that the second queue
pushes back on the first. A credit takes no block: it counts against a limit until the blocks are granted or the
promise lapses.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ticket import RefusalReason
from .memory import ChoiceKey


@dataclass(slots=True)
class _Entry:
    credit_id: int
    owner: ChoiceKey
    attempt: int
    blocks: int
    expires_s: float | None
    """None: redeemed; the sequence waits for its blocks."""


class CreditLedger:
    """Promises by key, in blocks. A redeemed credit still counts until `drop`, because its sequence still wants
    blocks.
    """

    def __init__(self, *, limit_blocks: int, ttl_s: float, max_credits: int) -> None:
        self._limit_blocks = limit_blocks
        self._ttl_s = ttl_s
        self._max_credits = max_credits
        self._entries: dict[str, _Entry] = {}
        self._blocks = 0
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def blocks(self) -> int:
        """Blocks promised now."""
        return self._blocks

    @property
    def limit_blocks(self) -> int:
        """Blocks that may be promised at once."""
        return self._limit_blocks

    def granted(self, key: str) -> bool:
        """True if the key has a credit that is not redeemed."""
        entry = self._entries.get(key)
        return entry is not None and entry.expires_s is not None

    def grant(self, key: str, owner: ChoiceKey, attempt: int, blocks: int, now_s: float) -> int | None:
        """Promises `blocks`; returns the credit's id, or None if the limit would be passed. A key that asks again gets
        its credit again, renewed. One promise is possible even where it alone passes the limit, so that a request as
        large as the whole memory is not refused forever.
        """
        entry = self._entries.get(key)
        if entry is not None:
            if entry.expires_s is None:
                return None
            entry.expires_s = now_s + self._ttl_s
            return entry.credit_id
        over = self._blocks + blocks > self._limit_blocks and self._blocks > 0
        if over or len(self._entries) >= self._max_credits:
            return None
        credit_id, self._next_id = self._next_id, self._next_id + 1
        self._entries[key] = _Entry(credit_id, owner, attempt, blocks, now_s + self._ttl_s)
        self._blocks += blocks
        return credit_id

    def redeem(self, credit_id: int, key: str, now_s: float) -> RefusalReason | None:
        """The request came: the promise no longer lapses. Returns why not, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return RefusalReason.EXPIRED
        if entry.expires_s is None:
            return RefusalReason.DUPLICATE
        if entry.credit_id != credit_id:
            return RefusalReason.STALE_ATTEMPT
        if now_s >= entry.expires_s:
            self.drop(key)
            return RefusalReason.EXPIRED
        entry.expires_s = None
        return None

    def expire(self, now_s: float) -> tuple[str, ...]:
        """Drops promises that nobody redeemed in time; returns their keys."""
        lapsed = tuple(k for k, e in self._entries.items() if e.expires_s is not None and now_s >= e.expires_s)
        for key in lapsed:
            self.drop(key)
        return lapsed

    def drop(self, key: str) -> None:
        """Ends the promise: its blocks were granted, or nobody wants them any more; idempotent."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._blocks -= entry.blocks

    def drop_unredeemed(self, owner: ChoiceKey, attempt: int) -> None:
        """Ends the choice's promises that were not redeemed, of `attempt` and all before it."""
        for key, entry in list(self._entries.items()):
            if entry.owner == owner and entry.attempt <= attempt and entry.expires_s is not None:
                self.drop(key)

    def held_keys(self) -> tuple[str, ...]:
        """Keys that hold a credit, redeemed or not."""
        return tuple(self._entries)

    def check_integrity(self) -> None:
        """Raises AssertionError if the count is not the sum."""
        assert self._blocks == sum(entry.blocks for entry in self._entries.values())
        assert self._blocks <= self._limit_blocks or len(self._entries) == 1
        assert len(self._entries) <= self._max_credits
