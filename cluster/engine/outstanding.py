"""Plans that a scheduler has made and that the device has not given back, oldest first, and the rows they are made of:
a row counts in its sequence (`scheduled`, `plans`, `drawing`) from the moment at which it is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from .block_pool import BlockPool
from .plan import DRAWN, RowOutput, StepOutput, StepPlan, StepRow
from .sequence import Sequence


class _Outstanding(NamedTuple):
    """A plan, with the sequence of each of its rows."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]


class OutstandingPlans:
    """A scheduler's part: at most `limit` plans, numbered as they are made."""

    def __init__(self, pool: BlockPool, eos_token_ids: tuple[int, ...], limit: int) -> None:
        self.limit = limit
        self._pool = pool
        self._eos_token_ids = eos_token_ids
        self._plans: deque[_Outstanding] = deque()
        self._next_plan_id = 0

    def __len__(self) -> int:
        return len(self._plans)

    def row(self, seq: Sequence, count: int) -> StepRow:
        """Schedules the next `count` tokens of `seq`; the last one of its context draws a token."""
        start, end = seq.scheduled, seq.scheduled + count
        seq.scheduled = end
        seq.plans += 1
        sample = None
        if end == len(seq.tokens) + seq.drawing:
            sample = seq.sample_spec(self._eos_token_ids)
            seq.drawing += 1
        token_ids = seq.tokens[start:end] or [DRAWN]
        return StepRow(seq.seq_id, start, token_ids, self._pool.table(seq.seq_id), sample)

    def make(self, work: list[tuple[Sequence, int]]) -> StepPlan:
        """A plan of the next tokens of those sequences, so many of each."""
        plan = StepPlan(self._next_plan_id, tuple([self.row(seq, count) for seq, count in work]))
        self._next_plan_id += 1
        self._plans.append(_Outstanding(plan, tuple([seq for seq, _ in work])))
        return plan

    def skip(self, steps: int) -> None:
        """So many numbers are taken by steps that were never plans (`quiet_run`)."""
        self._next_plan_id += steps

    def take(self, output: StepOutput) -> Iterator[tuple[Sequence, StepRow, RowOutput]]:
        """The oldest plan's rows with what became of each; they stand in no plan any more. AssertionError, and nothing
        changed, if it is not what that plan asked for.
        """
        assert self._plans, f"output of plan {output.plan_id}, but no plan is outstanding"
        plan, sequences = self._plans[0]
        output.check_answers(plan)
        self._plans.popleft()
        return zip(sequences, plan.rows, output.rows, strict=True)

    def sequences(self) -> Iterator[Sequence]:
        """Of all rows of all plans."""
        return (seq for outstanding in self._plans for seq in outstanding.sequences)
