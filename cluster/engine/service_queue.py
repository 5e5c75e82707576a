"""The order in which an engine serves prompts: those that wait for blocks or a place, and those that have theirs and
wait for the rest of their tokens to be computed.

One order for both, or a long prompt under way would hold up an urgent one for its whole length. It is that of
`cluster.fair_queue`: shares between classes, earliest deadline first inside one. A class pays for tokens as they are
computed here, and for a context that is pulled when its blocks are granted. Preempted sequences come before all others,
oldest first, and nobody pays for them twice.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from ..fair_queue import FairQueue
from .block_pool import IntegrityError
from .sequence import Sequence, State

_ORDER = attrgetter("order")


class _Counted(NamedTuple):
    """What one sequence adds to the queue's counts."""

    prefill_tokens: int
    patient_tokens: int
    waits: bool
    pulls: bool


class ServiceQueue:
    """Every sequence that is WAITING, and every RUNNING one with prefill left. The first few of an iteration are cheap
    however many wait.
    """

    def __init__(self) -> None:
        self._fair: FairQueue[Sequence] = FairQueue()
        self._preempted: list[Sequence] = []
        self._counted: dict[Sequence, _Counted] = {}
        self.prefill_tokens = 0
        """Context tokens to be computed here and not scheduled yet, over all."""
        self.patient_tokens = 0
        """Those of them that let others go first: of prompts that are due at no time, unless they were preempted."""
        self.waiting = 0
        """Sequences that have no blocks yet."""
        self.pulls = 0
        """Those of them that need no computing."""

    def __len__(self) -> int:
        return len(self._counted)

    def __contains__(self, seq: object) -> bool:
        return seq in self._counted

    def __iter__(self) -> Iterator[Sequence]:
        """First is served first. The queue must not change before the last one that is looked at."""
        return chain(self._preempted, self._fair)

    def push(self, seq: Sequence, now_s: float) -> None:
        """Queues a new sequence."""
        self._fair.push(seq, seq.spec.urgency, cost=seq.spec.context_tokens, now_s=now_s)
        self._count(seq)

    def push_preempted(self, seq: Sequence) -> None:
        """Queues a sequence that has just lost its blocks, wherever it stood before."""
        self.remove(seq)
        insort(self._preempted, seq, key=_ORDER)
        self._count(seq)

    def served(self, seq: Sequence, tokens: int) -> None:
        """`seq` was given blocks, a part of its prompt in a plan, or both: its class pays for `tokens`, and it leaves
        when it needs neither any more.
        """
        self._uncount(seq)
        if seq in self._fair:
            self._fair.serve(seq, tokens, left=seq.remaining_prefill)
        if seq.remaining_prefill:
            self._count(seq)
        else:
            self._leave(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes `seq` out, wherever it stands; idempotent."""
        if seq in self._counted:
            self._uncount(seq)
            self._leave(seq)

    def check_integrity(self) -> None:
        """Proves that the counts are the sums. Raises IntegrityError. O(sequences)."""
        want = {seq: self._counts_of(seq) for seq in self}
        prefill_tokens = sum(counted.prefill_tokens for counted in want.values())
        patient_tokens = sum(counted.patient_tokens for counted in want.values())
        waiting = sum(counted.waits for counted in want.values())
        pulls = sum(counted.pulls for counted in want.values())
        sums = (prefill_tokens, patient_tokens, waiting, pulls)
        if want != self._counted or (self.prefill_tokens, self.patient_tokens, self.waiting, self.pulls) != sums:
            raise IntegrityError("scheduler: the queue miscounts its sequences or tokens")

    def _counts_of(self, seq: Sequence) -> _Counted:
        waits, left = seq.state is State.WAITING, seq.remaining_prefill
        patient = left > 0 and seq.spec.urgency.deadline_s == math.inf and seq in self._fair
        return _Counted(left, left if patient else 0, waits, waits and (seq.needs_pull or seq.swapped))

    def _count(self, seq: Sequence) -> None:
        counted = self._counted[seq] = self._counts_of(seq)
        self.prefill_tokens += counted.prefill_tokens
        self.patient_tokens += counted.patient_tokens
        self.waiting += counted.waits
        self.pulls += counted.pulls

    def _uncount(self, seq: Sequence) -> None:
        counted = self._counted.pop(seq)
        self.prefill_tokens -= counted.prefill_tokens
        self.patient_tokens -= counted.patient_tokens
        self.waiting -= counted.waits
        self.pulls -= counted.pulls

    def _leave(self, seq: Sequence) -> None:
        if not self._fair.remove(seq):
            del self._preempted[bisect_left(self._preempted, seq.order, key=_ORDER)]
