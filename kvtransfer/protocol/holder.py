"""Prefill side of the handoff: who may read which blocks until when. Pure; keyed by (request, choice, prefill attempt).

Life of one ticket here:
1. `prefill_submitted`: QUEUED. A pull that came first waits, bounded, in AWAITED and is adopted.
2. `blocks_granted`: COMPUTING. `advanced` moves the watermark; full blocks below it are readable.
3. `prefill_done`: HELD. Everything is readable and a lease runs on this worker's clock; pulls renew it.
4. `pull` is accepted at any of these states; a newer decode attempt (or a newer pull of the same) revokes the older
   reader.
5. `confirm` by the current attempt, an abort, or the end of the lease: no new reader; old ones are revoked (REVOKED);
   when the last has reported `pull_ended`, the blocks go (`ReleaseBlocks`, or `AbortPrefill` where prefill was not
   done).
6. A bounded tombstone (DONE) refuses whatever comes late. An abort that overtakes its prefill leaves one as well.
"""

from __future__ import annotations

from ...cluster.types import BlockRef, SampledToken, Side, seq_id
from ..ticket import RefusalReason, Ticket
from .actions import AbortPrefill, HolderAction, Outcome, Refuse, ReleaseBlocks, Revoke, Serve, Wake
from .holder_past import PastTickets
from .holder_state import HolderCounts, HolderState, Owed, Reader, ReaderView, Record, Tombstone
from .memory import ChoiceKey


class HandoffHolder:
    """See the module. Every event returns the actions to take, in order; `now_s` never goes back."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        fingerprint: str,
        block_size: int,
        lease_s: float,
        pull_wait_s: float,
        max_tickets: int = 4096,
        max_tombstones: int = 4096,
        tombstone_ttl_s: float = 300.0,
    ) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._lease_s = lease_s
        self._pull_wait_s = pull_wait_s
        self._max_tickets = max_tickets
        self._records: dict[str, Record] = {}
        self._readers: dict[int, Reader] = {}
        self._next_reader_id = 1
        self._past = PastTickets(limit=max_tombstones, ttl_s=tombstone_ttl_s)

    # The engine's events

    def prefill_submitted(
        self, request_id: str, choice: int, prefill_attempt: int, num_tokens: int, now_s: float
    ) -> list[HolderAction]:
        """A prefill whose KV is to be handed off entered the queue. `Refuse` (ABORTED, DUPLICATE, LIMIT): do not add
        it.
        """
        key, name = seq_id(request_id, choice, Side.PREFILL, prefill_attempt), ChoiceKey(request_id, choice)
        record = self._records.get(key)
        if self._past.aborted(name, prefill_attempt) or key in self._past:
            return [Refuse(key, RefusalReason.ABORTED)]
        if record is not None and record.state is not HolderState.AWAITED:
            reason = record.reason if record.state is HolderState.REVOKED else RefusalReason.DUPLICATE
            return [Refuse(key, reason)]
        if len(self._records) >= self._max_tickets <= self._engine_tickets():
            return [Refuse(key, RefusalReason.LIMIT)]
        actions: list[HolderAction] = []
        if record is None:
            record = Record(key, name, prefill_attempt, HolderState.QUEUED, num_tokens)
            record.decode_attempt, record.pull_index = self._past.newest_reader(key)
            self._records[key] = record
        elif record.num_tokens != num_tokens:
            actions += self._revoke_readers(record, RefusalReason.WRONG_TOKENS)
        record.state, record.owed = HolderState.QUEUED, Owed.ABORT
        record.num_tokens, record.deadline_s = num_tokens, None
        return actions

    def blocks_granted(self, key: str, refs: tuple[BlockRef, ...], cached_tokens: int) -> list[HolderAction]:
        """The engine took blocks; the first `cached_tokens` are there already and readable at once."""
        record = self._records.get(key)
        if record is None or record.state is not HolderState.QUEUED:
            return []
        needed = self._blocks_for(record.num_tokens)
        if len(refs) < needed:
            raise ValueError(f"refs: {len(refs)} blocks cannot hold the {record.num_tokens} tokens of {key}")
        record.state, record.blocks = HolderState.COMPUTING, refs[:needed]
        record.watermark_tokens = min(cached_tokens, record.num_tokens)
        return [Wake(key)] if record.readers else []

    def advanced(self, key: str, computed_tokens: int) -> list[HolderAction]:
        """KV of positions below `computed_tokens` is written; a watermark never goes back."""
        record = self._records.get(key)
        if record is None or record.state is not HolderState.COMPUTING:
            return []
        before = record.watermark_tokens // self._block_size
        record.watermark_tokens = max(record.watermark_tokens, min(computed_tokens, record.num_tokens))
        moved = record.watermark_tokens // self._block_size > before
        return [Wake(key)] if moved and record.readers else []

    def preempted(self, key: str) -> list[HolderAction]:
        """The engine took the blocks back and will compute again: nothing is readable until it does."""
        record = self._records.get(key)
        if record is not None and record.state is HolderState.COMPUTING:
            record.state, record.blocks, record.watermark_tokens = HolderState.QUEUED, (), 0
        return []

    def prefill_done(self, key: str, first_token: SampledToken, now_s: float) -> list[HolderAction]:
        """The first token is out and the choice goes on: the engine holds the blocks until `ReleaseBlocks`."""
        record = self._records.get(key)
        if record is None:
            return []
        if record.state is HolderState.REVOKED:
            if record.owed is Owed.ABORT:
                record.owed = Owed.RELEASE
            return []
        if record.state is not HolderState.COMPUTING:
            return []
        record.state, record.owed = HolderState.HELD, Owed.RELEASE
        record.watermark_tokens = record.num_tokens
        record.first_token, record.prefill_end_s = first_token, now_s
        record.deadline_s = now_s + self._lease_s
        return [Wake(key)] if record.readers else []

    def prefill_failed(self, key: str, reason: RefusalReason, now_s: float) -> list[HolderAction]:
        """The engine freed the sequence itself: an error, or (FINISHED) a first token that ended the choice."""
        record = self._records.get(key)
        if record is None or record.state is HolderState.AWAITED:
            return []
        record.owed = Owed.NOTHING
        if record.state is HolderState.REVOKED:
            return []
        return self._end(record, Outcome.FAILED, reason, now_s)

    # The reader's events

    def pull(self, ticket: Ticket, first_block: int, pull_index: int, now_s: float) -> list[HolderAction]:
        """Someone wants the blocks from `first_block` on: `Serve`, or `Refuse` with the reason."""
        key = ticket.prefill_key
        reason = self._refusal(ticket)
        if reason is None and not 0 <= first_block <= self._blocks_for(ticket.num_tokens):
            reason = RefusalReason.INVALID
        record = self._records.get(key)
        if reason is None and record is not None:
            if record.state is HolderState.REVOKED:
                reason = record.reason
            elif (ticket.decode_attempt, pull_index) <= (record.decode_attempt, record.pull_index):
                reason = RefusalReason.STALE_ATTEMPT
            elif ticket.num_tokens != record.num_tokens:
                reason = RefusalReason.WRONG_TOKENS
        if reason is None and record is None:
            if (ticket.decode_attempt, pull_index) <= self._past.newest_reader(key):
                reason = RefusalReason.STALE_ATTEMPT
            elif self._awaited_tickets() >= self._max_tickets:
                reason = RefusalReason.LIMIT
        if reason is not None:
            return [Refuse(key, reason)]
        if record is None:
            name = ChoiceKey(ticket.request_id, ticket.choice)
            record = Record(key, name, ticket.prefill_attempt, HolderState.AWAITED, ticket.num_tokens)
            record.deadline_s = now_s + self._pull_wait_s
            self._records[key] = record
        actions = self._revoke_readers(record, RefusalReason.STALE_ATTEMPT)
        record.decode_attempt, record.pull_index = ticket.decode_attempt, pull_index
        self._renew(record, now_s)
        reader = Reader(self._next_reader_id, key, ticket.decode_attempt)
        self._next_reader_id += 1
        self._readers[reader.reader_id] = record.readers[reader.reader_id] = reader
        return [*actions, Serve(key, reader.reader_id)]

    def view(self, reader_id: int) -> ReaderView:
        """What this reader may read now; does not change anything. A reader that ended is refused."""
        reader = self._readers.get(reader_id)
        record = self._records.get(reader.key) if reader is not None else None
        if reader is None or record is None:
            return ReaderView(RefusalReason.STALE_ATTEMPT, (), 0, 0, None, 0.0)
        if reader.revoked is not None:
            return ReaderView(reader.revoked, (), 0, record.num_tokens, None, 0.0)
        done = record.state is HolderState.HELD
        readable = len(record.blocks) if done else record.watermark_tokens // self._block_size
        return ReaderView(
            None, record.blocks, readable, record.num_tokens, record.first_token if done else None, record.prefill_end_s
        )

    def pull_progress(self, reader_id: int, now_s: float) -> list[HolderAction]:
        """A reader took another run of blocks: the lease is renewed."""
        reader = self._readers.get(reader_id)
        if reader is not None and reader.revoked is None:
            self._renew(self._records[reader.key], now_s)
        return []

    def pull_ended(self, reader_id: int, now_s: float) -> list[HolderAction]:
        """A reader touches no block any more, for whatever reason; idempotent."""
        reader = self._readers.pop(reader_id, None)
        if reader is None:
            return []
        record = self._records[reader.key]
        del record.readers[reader_id]
        if record.readers:
            return []
        if record.state is HolderState.AWAITED:
            del self._records[record.key]
            self._past.reader_left(record.key, (record.decode_attempt, record.pull_index), now_s)
            return []
        return self._bury(record, now_s) if record.state is HolderState.REVOKED else []

    def read(self, ticket: Ticket, now_s: float) -> list[HolderAction]:
        """Blocks that a pull has named are copied out for their reader, perhaps after the pull's end: `Refuse`, or the
        lease is renewed. Nothing is held meanwhile: who copies compares generations.
        """
        key = ticket.prefill_key
        reason = self._refusal(ticket)
        record = self._records.get(key)
        if reason is None:
            if record is None or record.state is HolderState.AWAITED:
                reason = RefusalReason.UNKNOWN_TICKET
            elif record.state is HolderState.REVOKED:
                reason = record.reason
            elif ticket.decode_attempt != record.decode_attempt or ticket.num_tokens != record.num_tokens:
                reason = RefusalReason.STALE_ATTEMPT
            elif record.state is HolderState.QUEUED:  # preempted: it will be computed again, elsewhere
                reason = RefusalReason.WRONG_GENERATION
            else:
                self._renew(record, now_s)
        return [Refuse(key, reason)] if reason is not None else []

    def confirm(self, ticket: Ticket, now_s: float) -> list[HolderAction]:
        """The current decode attempt has done its first step. Again, for a confirmed ticket, is no error."""
        key = ticket.prefill_key
        tombstone = self._past.tombstone(key)
        if tombstone is not None and tombstone.outcome is Outcome.CONFIRMED:
            same = ticket.epoch == self._epoch and ticket.decode_attempt == tombstone.decode_attempt
            return [] if same else [Refuse(key, RefusalReason.STALE_ATTEMPT)]
        reason = self._refusal(ticket)
        record = self._records.get(key)
        if reason is None:
            if record is None or record.state in (HolderState.AWAITED, HolderState.QUEUED, HolderState.COMPUTING):
                reason = RefusalReason.UNKNOWN_TICKET
            elif ticket.decode_attempt < record.decode_attempt:
                reason = RefusalReason.STALE_ATTEMPT
            elif ticket.decode_attempt > record.decode_attempt or ticket.num_tokens != record.num_tokens:
                reason = RefusalReason.UNKNOWN_TICKET
            elif record.state is HolderState.REVOKED and record.outcome is not Outcome.CONFIRMED:
                reason = record.reason
        if reason is not None or record is None:
            return [Refuse(key, reason or RefusalReason.UNKNOWN_TICKET)]
        if record.state is HolderState.REVOKED:
            return []
        return self._end(record, Outcome.CONFIRMED, RefusalReason.STALE_ATTEMPT, now_s)

    def abort_ticket(self, ticket: Ticket, now_s: float) -> list[HolderAction]:
        """The decode attempt is over. The current one takes the handoff with it; an older one is refused."""
        key = ticket.prefill_key
        record = self._records.get(key)
        tombstone = self._past.tombstone(key)
        if ticket.epoch != self._epoch or ticket.prefill_worker != self._worker_id:
            return [Refuse(key, RefusalReason.WRONG_EPOCH)]
        current = record.decode_attempt if record is not None else tombstone.decode_attempt if tombstone else -1
        if ticket.decode_attempt < current:
            return [Refuse(key, RefusalReason.STALE_ATTEMPT)]
        if record is None:
            if tombstone is None:
                buried = Tombstone(Outcome.ABORTED, RefusalReason.ABORTED, ticket.decode_attempt)
                self._past.bury(key, buried, now_s)
            return []
        record.decode_attempt = ticket.decode_attempt
        if record.state is HolderState.REVOKED:
            return []
        return self._end(record, Outcome.ABORTED, RefusalReason.ABORTED, now_s)

    # The router's event, and time

    def abort_attempt(self, request_id: str, choice: int, prefill_attempt: int, now_s: float) -> list[HolderAction]:
        """Ends this prefill attempt and all before it, at any state, even before they came; idempotent."""
        name = ChoiceKey(request_id, choice)
        self._past.abort_attempts(name, prefill_attempt, now_s)
        actions: list[HolderAction] = []
        for record in [r for r in self._records.values() if r.choice == name and r.attempt <= prefill_attempt]:
            if record.state is not HolderState.REVOKED:
                actions += self._end(record, Outcome.ABORTED, RefusalReason.ABORTED, now_s)
        return actions

    def tick(self, now_s: float) -> list[HolderAction]:
        """Ends leases and waits that ran out; call a few times a second."""
        actions: list[HolderAction] = []
        for record in list(self._records.values()):
            if record.deadline_s is None or now_s < record.deadline_s:
                continue
            awaited = record.state is HolderState.AWAITED
            reason = RefusalReason.UNKNOWN_TICKET if awaited else RefusalReason.EXPIRED
            actions += self._end(record, Outcome.EXPIRED, reason, now_s)
        self._past.expire(now_s)
        return actions

    # What it says about itself

    def state_of(self, key: str) -> HolderState:
        """Where the ticket stands; DONE only while its tombstone is remembered."""
        record = self._records.get(key)
        if record is not None:
            return record.state
        return HolderState.DONE if key in self._past else HolderState.ABSENT

    def counts(self) -> HolderCounts:
        """Tickets by state, readers, leases, tombstones."""
        by_state = [record.state for record in self._records.values()]
        return HolderCounts(
            awaited=by_state.count(HolderState.AWAITED),
            queued=by_state.count(HolderState.QUEUED),
            computing=by_state.count(HolderState.COMPUTING),
            held=by_state.count(HolderState.HELD),
            revoked=by_state.count(HolderState.REVOKED),
            readers=len(self._readers),
            leases=sum(r.state is HolderState.HELD and r.deadline_s is not None for r in self._records.values()),
            tombstones=len(self._past),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if a reader, a lease or a count does not add up."""
        assert self._readers == {i: r for record in self._records.values() for i, r in record.readers.items()}
        self._past.check_integrity()
        assert self._engine_tickets() <= self._max_tickets
        awaited = sum(record.state is HolderState.AWAITED for record in self._records.values())
        assert awaited <= self._max_tickets  # beside those that failed under a reader
        for key, record in self._records.items():
            assert record.key == key
            assert key not in self._past
            assert record.state not in (HolderState.ABSENT, HolderState.DONE)
            assert 0 <= record.watermark_tokens <= record.num_tokens
            assert sum(r.revoked is None for r in record.readers.values()) <= 1
            assert (record.state is HolderState.REVOKED) == (record.outcome is not None)
            if record.state in (HolderState.AWAITED, HolderState.REVOKED):
                assert record.readers
            if record.state is HolderState.HELD:
                assert record.first_token is not None
                assert record.deadline_s is not None
                assert len(record.blocks) == self._blocks_for(record.num_tokens)

    # Within

    def _refusal(self, ticket: Ticket) -> RefusalReason | None:
        """Why no message with this ticket can be served, whatever the state of its record."""
        if ticket.epoch != self._epoch or ticket.prefill_worker != self._worker_id:
            return RefusalReason.WRONG_EPOCH
        if ticket.fingerprint != self._fingerprint:
            return RefusalReason.FINGERPRINT_MISMATCH
        return self._past.refusal(ticket)

    def _renew(self, record: Record, now_s: float) -> None:
        if record.state is HolderState.HELD:
            record.deadline_s = now_s + self._lease_s

    def _revoke_readers(self, record: Record, reason: RefusalReason) -> list[HolderAction]:
        if not record.readers:
            return []
        revoked = tuple(r.reader_id for r in record.readers.values() if r.revoked is None)
        for reader_id in revoked:
            record.readers[reader_id].revoked = reason
        return [Revoke(record.key, revoked, reason)] if revoked else []

    def _end(self, record: Record, outcome: Outcome, reason: RefusalReason, now_s: float) -> list[HolderAction]:
        actions = self._revoke_readers(record, reason)
        record.state, record.outcome, record.reason = HolderState.REVOKED, outcome, reason
        record.deadline_s = None
        return actions if record.readers else actions + self._bury(record, now_s)

    def _bury(self, record: Record, now_s: float) -> list[HolderAction]:
        """The last reader is gone: gives the blocks back and leaves a tombstone."""
        assert record.outcome is not None
        assert not record.readers
        del self._records[record.key]
        if record.reason is RefusalReason.UNKNOWN_TICKET:  # its prefill may still come, for another decode attempt
            self._past.reader_left(record.key, (record.decode_attempt, record.pull_index), now_s)
        else:
            buried = Tombstone(record.outcome, record.reason, record.decode_attempt)
            self._past.bury(record.key, buried, now_s)
        if record.owed is Owed.RELEASE:
            return [ReleaseBlocks(record.key, record.outcome)]
        return [AbortPrefill(record.key)] if record.owed is Owed.ABORT else []

    def _engine_tickets(self) -> int:
        return sum(record.owed is not Owed.NOTHING for record in self._records.values())

    def _awaited_tickets(self) -> int:
        return sum(record.owed is Owed.NOTHING for record in self._records.values())

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
