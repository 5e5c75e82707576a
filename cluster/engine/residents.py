"""Where a scheduler's sequences are: waiting, pulling, running, held until their reader has come, or ended and still in
an outstanding plan.

Sequences are queued by `add`, get their blocks through `prompt_service`, and leave here: whoever ends, is preempted or
is held, gives back what it must, at once or when the last outstanding plan that names it has come back. A late write of
a device never meets another sequence's block.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..types import EngineLoad, Handoff
from .block_pool import IntegrityError
from .integrity import check_sequences
from .quiet_run import Lockstep
from .sequence import Sequence, State
from .sequence_kv import SequenceKV
from .service_queue import ServiceQueue


class Residents:
    """A scheduler's part: its sequences. The dictionaries are read by the others, by name, in no order."""

    def __init__(self, queue: ServiceQueue, kv: SequenceKV, lockstep: Lockstep) -> None:
        self._queue = queue
        self._kv = kv
        self._lockstep = lockstep
        self.known: dict[str, Sequence] = {}
        """All that have not ended, and ended ones in an outstanding plan."""
        self.pulling: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.held: dict[str, Sequence] = {}
        self.running_out = 0
        """Of those that run, how many are handed off after their prompt, and never grow."""
        self.preemptions = 0

    def alive(self, seq_id: str) -> Sequence | None:
        """That sequence, if it has not ended."""
        seq = self.known.get(seq_id)
        return None if seq is None or seq.state is State.ENDED else seq

    def hold(self, seq: Sequence) -> None:
        """Its prompt is done: its blocks wait for their reader."""
        del self.running[seq.seq_id]
        self.running_out -= 1
        self.held[seq.seq_id] = seq
        seq.state = State.HELD

    def preempt(self, seq: Sequence, *, swaps: bool) -> None:
        """It gives its blocks back and waits again; `swaps`: its KV is kept elsewhere."""
        assert (seq.state, seq.plans) == (State.RUNNING, 0), f"{seq.seq_id} cannot be preempted now"
        del self.running[seq.seq_id]
        self._kv.release(seq)
        if swaps:
            seq.swap_out()
        else:
            seq.restart()
        self._queue.push_preempted(seq)
        self.preemptions += 1

    def end(self, seq: Sequence) -> None:
        """It says nothing any more."""
        self._queue.remove(seq)
        if seq.joined is not None:
            self._lockstep.leave(seq)
        if seq.state is State.RUNNING:
            del self.running[seq.seq_id]
            self.running_out -= seq.spec.handoff is Handoff.OUT
        elif seq.state is State.PULLING:
            del self.pulling[seq.seq_id]
        elif seq.state is State.HELD:
            del self.held[seq.seq_id]
        seq.state = State.ENDED
        self.forget_if_idle(seq)

    def forget_if_idle(self, seq: Sequence) -> None:
        """An ended sequence gives its blocks back as soon as no outstanding plan writes into them."""
        if seq.plans == 0:
            self._kv.release(seq)
            del self.known[seq.seq_id]

    def load(self) -> EngineLoad:
        """Counts for heartbeats and metrics. O(running)."""
        context_tokens = self._lockstep.known_tokens
        if len(self.running) > len(self._lockstep.rows):
            context_tokens += sum([len(seq.tokens) for seq in self.running.values() if seq.joined is None])
        return EngineLoad(
            waiting=self._queue.waiting,
            running=len(self.running) + len(self.pulling),
            held=len(self.held),
            queued_prefill_tokens=self._queue.prefill_tokens,
            patient_prefill_tokens=self._queue.patient_tokens,
            context_tokens=context_tokens,
            num_blocks=self._kv.pool.num_blocks,
            free_blocks=self._kv.pool.num_free,
            cached_blocks=self._kv.pool.num_cached,
            preemptions_total=self.preemptions,
            prefix_queries_tokens_total=self._kv.queries_tokens,
            prefix_hits_tokens_total=self._kv.hits_tokens,
        )

    def check_integrity(self, in_plans: Iterable[Sequence]) -> None:
        """Proves that every block is accounted for and every sequence in exactly one place. `in_plans`: the sequences
        of all rows of outstanding plans. Raises IntegrityError.
        """
        places = {State.PULLING: self.pulling, State.RUNNING: self.running, State.HELD: self.held}
        out = sum(seq.spec.handoff is Handoff.OUT for seq in self.running.values())
        if out != self.running_out:
            raise IntegrityError(f"scheduler: {out} that run are handed off, {self.running_out} counted")
        self._lockstep.check_integrity(seq for seq in self.running.values() if seq.can_decode)
        check_sequences(self.known, self._queue, places, in_plans)
        self._kv.check_integrity([seq for seq in self.known.values() if seq.state is not State.WAITING])
