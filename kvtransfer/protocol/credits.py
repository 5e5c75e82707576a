"""Credits: a decode worker's bounded promises of KV, given before prefill is dispatched, so that the second queue
pushes back on the first. A credit takes no block: it counts against a limit until the blocks are granted or the
promise lapses. Who is refused is remembered for a short time (`wants`): nobody behind it is promised what it waits for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...cluster.types import Urgency
from ..ticket import RefusalReason
from .memory import ChoiceKey
from .wants import Wants

NO_PROMISE = Urgency()


@dataclass(slots=True)
class _Entry:
    credit_id: int
    owner: ChoiceKey
    attempt: int
    blocks: int
    router_id: str
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
        self._wants = Wants(limit=max_credits)
        self._entries: dict[str, _Entry] = {}
        self._blocks = 0
        self._next_id = 1
        self._next_expiry_s = math.inf
        """No promise lapses before."""

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

    @property
    def wants(self) -> int:
        """Refused asks that are remembered."""
        return len(self._wants)

    def granted(self, key: str) -> bool:
        """True if the key has a credit that is not redeemed."""
        entry = self._entries.get(key)
        return entry is not None and entry.expires_s is not None

    def grant(
        self,
        key: str,
        owner: ChoiceKey,
        attempt: int,
        blocks: int,
        now_s: float,
        *,
        urgency: Urgency = NO_PROMISE,
        places: int | None = None,
        router_id: str = "",
    ) -> int | None:
        """Promises `blocks`; returns the credit's id, or None if the limit, or that of `places` for promises, would be
        passed by this one and those that want theirs and come before it. A key that asks again gets its credit again,
        renewed. One promise is possible even where it alone passes the limit, so that a request as large as the whole
        memory is not refused forever.
        """
        entry = self._entries.get(key)
        if entry is not None:
            if entry.expires_s is None:
                return None
            entry.expires_s = now_s + self._ttl_s  # later than it was: what lapses next is known as before
            return entry.credit_id
        self._wants.expire(now_s)
        room = self._limit_blocks - self._blocks - blocks
        free = min(self._max_credits, self._max_credits if places is None else places) - len(self._entries) - 1
        if room >= 0 and free >= 0 and not len(self._wants):
            self._wants.pass_by(blocks, urgency)
        else:
            self._wants.ask(key, owner, attempt, blocks, urgency, now_s)
            blocks_ahead, wants_ahead = self._wants.ahead(key, enough_blocks=max(room, 0), enough_wants=max(free, 0))
            over = blocks_ahead > room and self._blocks + blocks_ahead > 0
            if over or wants_ahead > free:
                return None
            self._wants.granted(key)
        credit_id, self._next_id = self._next_id, self._next_id + 1
        self._entries[key] = _Entry(credit_id, owner, attempt, blocks, router_id, now_s + self._ttl_s)
        self._blocks += blocks
        self._next_expiry_s = min(self._next_expiry_s, now_s + self._ttl_s)
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
        """Drops promises that nobody redeemed in time, and wants; returns the keys of the promises."""
        self._wants.expire(now_s)
        if now_s < self._next_expiry_s:
            return ()
        lapsed = tuple(k for k, e in self._entries.items() if e.expires_s is not None and now_s >= e.expires_s)
        for key in lapsed:
            self.drop(key)
        self._next_expiry_s = min(
            (e.expires_s for e in self._entries.values() if e.expires_s is not None), default=math.inf
        )
        return lapsed

    def drop(self, key: str) -> None:
        """Ends the promise: its blocks were granted, or nobody wants them any more; idempotent."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._blocks -= entry.blocks

    def drop_unredeemed(self, owner: ChoiceKey, attempt: int) -> None:
        """Ends the choice's promises that were not redeemed, and its wants, of `attempt` and all before it."""
        self._wants.drop(owner, attempt)
        for key, entry in list(self._entries.items()):
            if entry.owner == owner and entry.attempt <= attempt and entry.expires_s is not None:
                self.drop(key)

    def drop_unredeemed_of(self, router_id: str) -> None:
        """Ends the promises to a router that it has not redeemed."""
        for key, entry in list(self._entries.items()):
            if entry.router_id == router_id and entry.expires_s is not None:
                self.drop(key)

    def fullness(self) -> str:
        """Why nothing can be promised now, in words."""
        return (
            f"{self._blocks} of {self._limit_blocks} blocks are promised to {len(self._entries)} sequences, "
            f"{len(self._wants)} wait for a promise"
        )

    def held_keys(self) -> tuple[str, ...]:
        """Keys that hold a credit, redeemed or not."""
        return tuple(self._entries)

    def check_integrity(self) -> None:
        """Raises AssertionError if the count is not the sum."""
        self._wants.check_integrity()
        assert self._blocks == sum(entry.blocks for entry in self._entries.values())
        assert self._blocks <= self._limit_blocks or len(self._entries) == 1
        assert len(self._entries) <= self._max_credits
