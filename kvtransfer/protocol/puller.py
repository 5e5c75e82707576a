"""Decode side of the handoff: credit, blocks, pull, first step, confirmation. Pure; keyed by (request, choice, decode
attempt).

Life of one sequence here:
1. `reserve`: CREDITED. A bounded promise, no block; it lapses if nobody redeems it. A refusal is remembered for a
   moment (`wants`), so that who asks again is not overtaken for ever.
2. `submit` redeems it: WAITING_BLOCKS. No free block, no pull: the KV waits in the prefill worker's memory.
3. `blocks_granted`: PULLING, from the first block that the own prefix cache lacks. Every frame is checked
   (`blocks_arrived`: this ticket, this pull, the next index) before it may be written, and counts when it is written
   whole (`blocks_written`): a block whose memory changed while it was copied is still wanted.
4. A pull that breaks is started again from the first missing block, a bounded number of times; a late frame of the
   older pull is refused.
5. `end_arrived`: READY (`KvReady`). `first_step`: RUNNING (`Confirm`). `confirm_ended`: over, a bounded tombstone
   stays.
6. An abort, a deadline or a refusal at any state ends it. While a writer runs that is CANCELLING: `WriterDone`, which
   lets the engine free the blocks, comes only after the writer has reported `pull_ended`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...cluster.types import BlockRef, SampledToken, Side, Urgency, seq_id
from ..ticket import RefusalReason, Ticket
from .actions import (
    CancelPull,
    Confirm,
    Credit,
    Failed,
    KvReady,
    Outcome,
    PullerAction,
    Refuse,
    SendAbort,
    StartPull,
    WriteBlocks,
    WriterDone,
)
from .credits import NO_PROMISE, CreditLedger
from .memory import AbortFloors, BoundedMemory, ChoiceKey
from .puller_state import PullerCounts, PullerState, Record


class HandoffPuller:
    """See the module. Every event returns the actions to take, in order; `now_s` never goes back."""

    def __init__(
        self,
        *,
        block_size: int,
        credits: CreditLedger,
        max_sequences: int = 4096,
        max_tombstones: int = 4096,
        tombstone_ttl_s: float = 300.0,
        max_pull_retries: int = 3,
        retry_delay_s: float = 0.05,
    ) -> None:
        self._block_size = block_size
        self._credits = credits
        self._max_sequences = max_sequences
        self._max_tombstones = max_tombstones
        self._max_pull_retries = max_pull_retries
        self._retry_delay_s = retry_delay_s
        self._records: dict[str, Record] = {}
        self._waiting_blocks = 0
        self._tombstones: BoundedMemory[str, Outcome] = BoundedMemory(limit=max_tombstones, ttl_s=tombstone_ttl_s)
        self._floors = AbortFloors(limit=max_tombstones, ttl_s=tombstone_ttl_s)

    # The router's events

    def reserve(
        self,
        request_id: str,
        choice: int,
        decode_attempt: int,
        blocks: int,
        now_s: float,
        *,
        urgency: Urgency = NO_PROMISE,
        places: int | None = None,
        router_id: str = "",
    ) -> list[PullerAction]:
        """Wants a promise of `blocks`, and one of `places`: `Credit`, or `Refuse` (LIMIT: who asks again soon keeps its
        place in the order; ABORTED if the abort came first).
        """
        key = seq_id(request_id, choice, Side.DECODE, decode_attempt)
        self._credits.expire(now_s)
        if self._is_over(key, request_id, choice, decode_attempt):
            return [Refuse(key, RefusalReason.ABORTED)]
        if key in self._records:
            return [Refuse(key, RefusalReason.DUPLICATE)]
        name = ChoiceKey(request_id, choice)
        credit_id = self._credits.grant(
            key, name, decode_attempt, blocks, now_s, urgency=urgency, places=places, router_id=router_id
        )
        if credit_id is None:
            return [Refuse(key, RefusalReason.LIMIT, f"no credit of {blocks} blocks: {self._credits.fullness()}")]
        return [Credit(key, credit_id)]

    def submit(self, ticket: Ticket, credit_id: int, deadline_s: float, now_s: float) -> list[PullerAction]:
        """Redeems a credit: the sequence now waits for its blocks. `Refuse`: do not add it to the engine."""
        key = ticket.decode_key
        reason = self._redeem(key, ticket.request_id, ticket.choice, ticket.decode_attempt, credit_id, now_s)
        if reason is None and len(self._records) >= self._max_sequences:
            self._credits.drop(key)
            reason = RefusalReason.LIMIT
        if reason is not None:
            return [Refuse(key, reason)]
        self._records[key] = Record(key, ticket, PullerState.WAITING_BLOCKS, deadline_s)
        self._waiting_blocks += 1
        return []

    def submit_local(
        self, request_id: str, choice: int, decode_attempt: int, credit_id: int, now_s: float
    ) -> list[PullerAction]:
        """Redeems a credit for a sequence that this worker prefills itself; nothing of it stays here."""
        key = seq_id(request_id, choice, Side.DECODE, decode_attempt)
        reason = self._redeem(key, request_id, choice, decode_attempt, credit_id, now_s)
        if reason is not None:
            return [Refuse(key, reason)]
        self._credits.drop(key)
        return []

    def abort(
        self, request_id: str, choice: int, decode_attempt: int, now_s: float, *, notify: bool = True
    ) -> list[PullerAction]:
        """Ends this attempt and all before it, at any state, even before they came; idempotent. `notify`: tell the
        holder too; False where another decode attempt shall find the KV.
        """
        name = ChoiceKey(request_id, choice)
        self._floors.raise_to(name, decode_attempt, now_s)
        self._credits.drop_unredeemed(name, decode_attempt)
        actions: list[PullerAction] = []
        for record in list(self._records.values()):
            ticket = record.ticket
            same_choice = ticket.request_id == request_id and ticket.choice == choice
            if same_choice and ticket.decode_attempt <= decode_attempt:
                actions += self._abort(record, notify, now_s)
        return actions

    def router_gone(self, router_id: str) -> list[PullerAction]:
        """Nobody will redeem what was promised to it. Its sequences are aborted one by one."""
        self._credits.drop_unredeemed_of(router_id)
        return []

    # The engine's events

    def blocks_granted(self, key: str, refs: tuple[BlockRef, ...], cached_tokens: int) -> list[PullerAction]:
        """The engine took blocks; those of the first `cached_tokens` hold their KV already."""
        record = self._records.get(key)
        if record is None:
            return [WriterDone(key)] if key in self._tombstones else []
        if record.state is not PullerState.WAITING_BLOCKS:
            return []
        needed = self._blocks_for(record.ticket.num_tokens)
        if len(refs) < needed:
            raise ValueError(f"refs: {len(refs)} blocks cannot hold the {record.ticket.num_tokens} tokens of {key}")
        self._credits.drop(key)
        record.state, record.blocks = PullerState.PULLING, refs[:needed]
        self._waiting_blocks -= 1
        record.next_block = min(cached_tokens // self._block_size, needed)
        return [self._start_pull(record, 0.0)]

    def first_step(self, key: str) -> list[PullerAction]:
        """The sequence has produced a token of its own here: the holder's copy is not needed any more."""
        record = self._records.get(key)
        if record is None or record.state is not PullerState.READY:
            return []
        record.state = PullerState.RUNNING
        return [Confirm(record.ticket)]

    # The writer's events

    def blocks_arrived(
        self, key: str, pull_index: int, tickets: Iterable[Ticket], block_indices: Sequence[int]
    ) -> list[PullerAction]:
        """Frames whose checksums hold, in the order in which they came: `WriteBlocks`, or `Refuse` (STALE_ATTEMPT;
        CORRUPT if they are not the next ones).
        """
        record = self._writing(key, pull_index)
        if record is None:
            return [Refuse(key, RefusalReason.STALE_ATTEMPT)]
        due = range(record.next_block, record.next_block + len(block_indices))
        wrong = any(ticket != record.ticket for ticket in tickets)
        if wrong or (block_indices != due and list(block_indices) != list(due)) or due.stop > len(record.blocks):
            return [Refuse(key, RefusalReason.CORRUPT)]
        return [WriteBlocks(key, tuple([ref.block_id for ref in record.blocks[due.start : due.stop]]))]

    def blocks_written(self, key: str, pull_index: int, block_indices: Sequence[int]) -> list[PullerAction]:
        """Blocks that arrived are written, and what was written are the blocks: the next ones are due."""
        record = self._writing(key, pull_index)
        if record is not None and block_indices and block_indices[0] == record.next_block:
            record.next_block = min(record.next_block + len(block_indices), len(record.blocks))
        return []

    def end_arrived(
        self, key: str, pull_index: int, ticket: Ticket, num_tokens: int, first_token: SampledToken
    ) -> list[PullerAction]:
        """Everything was sent: `KvReady` if everything came, else `Refuse`."""
        record = self._writing(key, pull_index)
        if record is None:
            return [Refuse(key, RefusalReason.STALE_ATTEMPT)]
        whole = record.next_block == len(record.blocks)
        if ticket != record.ticket or num_tokens != ticket.num_tokens or not whole:
            return [Refuse(key, RefusalReason.CORRUPT)]
        record.state = PullerState.READY
        return [KvReady(key, first_token)]

    def pull_ended(
        self, key: str, pull_index: int, reason: RefusalReason | None, message: str, now_s: float
    ) -> list[PullerAction]:
        """The writer of this pull writes no more. `reason`: why it broke; None: it ended by itself."""
        record = self._records.get(key)
        if record is None or record.pull_index != pull_index:
            return []
        if record.state is PullerState.CANCELLING:
            return self._end(record, record.failing, "", now_s)
        if record.state is not PullerState.PULLING:
            return []
        reason = reason or RefusalReason.PEER_LOST
        if reason.pull_again and record.retries < self._max_pull_retries and now_s < record.deadline_s:
            delay_s = self._retry_delay_s * 2**record.retries
            record.retries += 1
            return [self._start_pull(record, delay_s)]
        return self._end(record, reason, message, now_s)

    def confirm_ended(self, key: str, now_s: float) -> list[PullerAction]:
        """The confirmation arrived, or was given up: the holder's lease bounds what that costs."""
        record = self._records.get(key)
        if record is not None and record.state is PullerState.RUNNING:
            self._bury(record, Outcome.CONFIRMED, now_s)
        return []

    # Time

    def tick(self, now_s: float) -> list[PullerAction]:
        """Lapses credits and ends sequences whose deadline passed; call a few times a second."""
        self._credits.expire(now_s)
        self._tombstones.expire(now_s)
        self._floors.expire(now_s)
        actions: list[PullerAction] = []
        for record in list(self._records.values()):
            if now_s < record.deadline_s:
                continue
            if record.state is PullerState.PULLING:
                record.state, record.failing = PullerState.CANCELLING, RefusalReason.DEADLINE
                actions.append(CancelPull(record.key))
            elif record.state is PullerState.WAITING_BLOCKS:
                actions += self._end(record, RefusalReason.DEADLINE, "no KV block came free in time", now_s)
        return actions

    # What it says about itself

    def state_of(self, key: str) -> PullerState:
        """Where the sequence stands; DONE only while its tombstone is remembered."""
        record = self._records.get(key)
        if record is not None:
            return record.state
        if key in self._tombstones:
            return PullerState.DONE
        return PullerState.CREDITED if self._credits.granted(key) else PullerState.ABSENT

    def targets_of(self, key: str) -> tuple[int, ...]:
        """Ids of the blocks that are not written yet, in order; none if the sequence is not pulling."""
        record = self._records.get(key)
        if record is None or record.state is not PullerState.PULLING:
            return ()
        return tuple(ref.block_id for ref in record.blocks[record.next_block :])

    def retries_of(self, key: str) -> int:
        """Pulls that were started anew for this sequence; 0 if it is not here."""
        record = self._records.get(key)
        return record.retries if record is not None else 0

    @property
    def credited_blocks(self) -> int:
        """As in `counts`, for who asks often."""
        return self._credits.blocks

    @property
    def waiting_blocks(self) -> int:
        """As in `counts`, for who asks often."""
        return self._waiting_blocks

    def counts(self) -> PullerCounts:
        """Sequences by state, credits, tombstones."""
        by_state = [record.state for record in self._records.values()]
        return PullerCounts(
            credits=len(self._credits),
            credited_blocks=self._credits.blocks,
            wants=self._credits.wants,
            waiting_blocks=by_state.count(PullerState.WAITING_BLOCKS),
            pulling=by_state.count(PullerState.PULLING),
            cancelling=by_state.count(PullerState.CANCELLING),
            ready=by_state.count(PullerState.READY),
            running=by_state.count(PullerState.RUNNING),
            tombstones=len(self._tombstones),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if a credit, a record or a count does not add up."""
        self._credits.check_integrity()
        assert len(self._tombstones) <= self._max_tombstones
        assert len(self._floors) <= self._max_tombstones
        assert len(self._records) <= self._max_sequences
        credited = set(self._credits.held_keys())
        for key, record in self._records.items():
            assert record.key == key == record.ticket.decode_key
            assert key not in self._tombstones
            assert (key in credited) == (record.state is PullerState.WAITING_BLOCKS)
            assert 0 <= record.next_block <= len(record.blocks)
            if record.state in (PullerState.READY, PullerState.RUNNING):
                assert record.next_block == len(record.blocks) == self._blocks_for(record.ticket.num_tokens)
        assert all(self._credits.granted(key) for key in credited - set(self._records))
        assert self._waiting_blocks == self.counts().waiting_blocks

    # Within

    def _is_over(self, key: str, request_id: str, choice: int, attempt: int) -> bool:
        if key in self._tombstones:
            return True
        return len(self._floors) > 0 and self._floors.covers(ChoiceKey(request_id, choice), attempt)

    def _redeem(
        self, key: str, request_id: str, choice: int, attempt: int, credit_id: int, now_s: float
    ) -> RefusalReason | None:
        if self._is_over(key, request_id, choice, attempt):
            return RefusalReason.ABORTED
        return RefusalReason.DUPLICATE if key in self._records else self._credits.redeem(credit_id, key, now_s)

    def _writing(self, key: str, pull_index: int) -> Record | None:
        """The record, if the pull is its newest and may still write."""
        record = self._records.get(key)
        if record is None or record.state is not PullerState.PULLING or record.pull_index != pull_index:
            return None
        return record

    def _start_pull(self, record: Record, delay_s: float) -> StartPull:
        record.pull_index += 1
        return StartPull(record.key, record.ticket, record.next_block, record.pull_index, delay_s)

    def _abort(self, record: Record, notify: bool, now_s: float) -> list[PullerAction]:
        record.notify = notify
        if record.state is PullerState.RUNNING:
            return []
        if record.state is PullerState.CANCELLING:
            record.failing = None
            return []
        if record.state is PullerState.PULLING:
            record.state, record.failing = PullerState.CANCELLING, None
            return [CancelPull(record.key)]
        return self._end(record, None, "", now_s)

    def _end(self, record: Record, failure: RefusalReason | None, message: str, now_s: float) -> list[PullerAction]:
        """No writer runs: frees the blocks, and tells whoever must know. `failure` None: an abort."""
        self._bury(record, Outcome.ABORTED if failure is None else Outcome.FAILED, now_s)
        actions: list[PullerAction] = []
        if record.notify and (failure is None or not failure.retryable):
            actions.append(SendAbort(record.ticket))
        actions.append(WriterDone(record.key))
        if failure is not None:
            actions.append(Failed(record.key, failure, message))
        return actions

    def _bury(self, record: Record, outcome: Outcome, now_s: float) -> None:
        del self._records[record.key]
        self._waiting_blocks -= record.state is PullerState.WAITING_BLOCKS
        self._credits.drop(record.key)
        self._tombstones.put(record.key, outcome, now_s)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
