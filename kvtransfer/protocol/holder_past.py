"""What `HandoffHolder` remembers of tickets that are over, so that what comes late is refused: bounded, for a while."""

from __future__ import annotations

from ..ticket import RefusalReason, Ticket
from .holder_state import Tombstone
from .memory import AbortFloors, BoundedMemory, ChoiceKey


class PastTickets:
    """Each kind of memory has `limit` places; the oldest goes first."""

    def __init__(self, *, limit: int, ttl_s: float) -> None:
        self._limit = limit
        self._tombstones: BoundedMemory[str, Tombstone] = BoundedMemory(limit=limit, ttl_s=ttl_s)
        self._floors = AbortFloors(limit=limit, ttl_s=ttl_s)
        self._unmet: BoundedMemory[str, tuple[int, int]] = BoundedMemory(limit=limit, ttl_s=ttl_s)

    def __len__(self) -> int:
        """Tickets that are over."""
        return len(self._tombstones)

    def __contains__(self, key: str) -> bool:
        return key in self._tombstones

    def tombstone(self, key: str) -> Tombstone | None:
        """Of a ticket that is over."""
        return self._tombstones.get(key)

    def bury(self, key: str, tombstone: Tombstone, now_s: float) -> None:
        """A ticket is over."""
        self._tombstones.put(key, tombstone, now_s)

    def abort_attempts(self, choice: ChoiceKey, attempt: int, now_s: float) -> None:
        """Ends a prefill attempt and all before it, come or not."""
        self._floors.raise_to(choice, attempt, now_s)

    def aborted(self, choice: ChoiceKey, attempt: int) -> bool:
        """Whether this prefill attempt was aborted."""
        return self._floors.covers(choice, attempt)

    def reader_left(self, key: str, newest: tuple[int, int], now_s: float) -> None:
        """The readers of a ticket went away before its prefill came. `newest`: (decode attempt, pull)."""
        self._unmet.put(key, newest, now_s)

    def newest_reader(self, key: str) -> tuple[int, int]:
        """As `reader_left` said; (-1, -1) where none has left."""
        return self._unmet.get(key) or (-1, -1)

    def refusal(self, ticket: Ticket) -> RefusalReason | None:
        """Why no message with this ticket can be served any more."""
        tombstone = self._tombstones.get(ticket.prefill_key)
        if tombstone is not None:
            stale = ticket.decode_attempt < tombstone.decode_attempt
            return RefusalReason.STALE_ATTEMPT if stale else tombstone.reason
        if len(self._floors):
            name = ChoiceKey(ticket.request_id, ticket.choice)
            return RefusalReason.ABORTED if self._floors.covers(name, ticket.prefill_attempt) else None
        return None

    def expire(self, now_s: float) -> None:
        """Forgets what is old."""
        self._tombstones.expire(now_s)
        self._unmet.expire(now_s)
        self._floors.expire(now_s)

    def check_integrity(self) -> None:
        """Raises AssertionError where more is remembered than there are places."""
        assert len(self._tombstones) <= self._limit
        assert len(self._floors) <= self._limit
        assert len(self._unmet) <= self._limit
