"""Serves prompts in the queue's order: blocks and a place in the batch to those that wait, the rest of a step's budget
to those that have theirs.
"""

from __future__ import annotations

from ..clock import Clock
from ..types import Handoff
from .policies import BatchPolicy
from .residents import Residents
from .scheduler_events import BlocksGranted, SchedulerEvent
from .sequence import Sequence, State
from .sequence_kv import SequenceKV
from .service_queue import ServiceQueue


class PromptService:
    """A scheduler's part that admits: sequences become residents here."""

    def __init__(
        self,
        queue: ServiceQueue,
        kv: SequenceKV,
        clock: Clock,
        residents: Residents,
        max_running: int,
        max_model_len: int,
    ) -> None:
        self._queue = queue
        self._kv = kv
        self._clock = clock
        self._residents = residents
        self._running = residents.running
        self._pulling = residents.pulling
        self._max_running = max_running
        self._max_model_len = max_model_len

    def serve(
        self, policy: BatchPolicy, budget: int, events: list[SchedulerEvent], *, may_admit: bool
    ) -> list[tuple[Sequence, int]]:
        """Gives blocks and up to `budget` tokens to prompts in the queue's order; returns who got any, with the tokens
        to compute at once, 0 for a context that is pulled. Grants are told in `events`.

        Who lacks blocks or a place in the batch stops everybody behind it that waits for one, so that nobody overtakes
        it for ever. Who only lacks budget does not stop sequences that need blocks but no computing. Where the policy
        takes whole batches, sequences are let in only when none is resident, then as many as have room until their
        end, budget or not.
        """
        whole, reserved = policy.whole_batches, 0
        served: list[tuple[Sequence, int]] = []
        places = self._places
        may_admit = may_admit and places > 0 and self._queue.waiting > 0
        may_admit = may_admit and not (whole and (self._running or self._pulling))
        growing = self._growing() if may_admit else 0
        unseen = len(self._queue) - self._queue.waiting  # of those that have their blocks
        for seq in self._queue:
            may_admit = may_admit and places > 0 and (budget > 0 or self._queue.pulls > 0 or whole)
            if not may_admit and (unseen == 0 or budget == 0):
                break
            count, granted = 0, False
            if seq.state is State.RUNNING:
                unseen -= 1
                if seq.can_prefill:
                    count = min(seq.remaining_prefill, budget)
            elif may_admit and budget == 0 and not (seq.needs_pull or seq.swapped or whole):
                places -= 1  # which is kept for it
            elif may_admit:
                reserved += self._kv.growth_blocks(seq, self._max_model_len) if whole else 0
                granted = may_admit = self._grant(seq, max(reserved, policy.headroom_blocks(growing)), events)
                if granted:
                    places -= 1
                    growing += seq.spec.handoff is not Handoff.OUT
                    count = min(seq.remaining_prefill, budget)
            if count or granted:
                served.append((seq, count))
                budget -= count
        return served

    def may_admit(self, policy: BatchPolicy) -> bool:
        """Whether `serve` might let somebody in now. The first in line stops all behind it, so it is the one to ask
        about; while nobody ends, what it lacks only grows.
        """
        if not self._queue.waiting or self._places <= 0:
            return False
        if policy.whole_batches and (self._running or self._pulling):
            return False
        first = next(iter(self._queue))
        return first.state is not State.WAITING or self._kv.has_room(first, policy.headroom_blocks(self._growing()))

    @property
    def _places(self) -> int:
        return self._max_running - len(self._running) - len(self._pulling)

    def _growing(self) -> int:
        return len(self._running) + len(self._pulling) - self._residents.running_out

    def _grant(self, seq: Sequence, headroom_blocks: int, events: list[SchedulerEvent]) -> bool:
        """Takes `seq` into the running batch, or to wait for its KV; False if blocks are lacking."""
        blocks = self._kv.grant(seq, headroom_blocks)
        if blocks is None:
            return False
        if seq.needs_pull:
            seq.state = State.PULLING
            self._pulling[seq.seq_id] = seq
        else:
            seq.state = State.RUNNING
            self._running[seq.seq_id] = seq
            self._residents.running_out += seq.spec.handoff is Handoff.OUT
        if seq.needs_pull or seq.spec.handoff is Handoff.OUT:
            events.append(BlocksGranted(seq_id=seq.seq_id, blocks=blocks, cached_tokens=seq.cached_tokens))
        if seq.admitted_s is None:
            seq.admitted_s = self._clock.now_s()
        return True
