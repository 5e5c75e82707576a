"""The seam between the scheduler and a device: what one step computes, and what came of it.

`Scheduler.schedule() -> StepPlan`, `Device.launch(plan)`, `Device.collect() -> StepOutput`,
`Scheduler.complete(output)`. Several plans may be outstanding; outputs come back in plan order. What there is one of
for each row is a named tuple: made three times as fast as a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..types import SampledToken, SamplingParams

DRAWN = -1
"""Stands for a token id in a row that decodes: the token that this sequence's row of the plan before draws, which is
outstanding. Such a row has `token_ids == [DRAWN]` and only a device with `looks_ahead` is given it: it takes what it
drew itself. Where that draw failed, this row may draw anything or fail, too: nobody looks at it any more.
"""


class SampleSpec(NamedTuple):
    """Draw the next token of a row from the logits of its last position.

    The token sequences are the scheduler's own lists, not copies: read-only for the device, valid until `complete`. In
    a row of a `DRAWN` token the outputs lack that one, until it has been collected; nothing that the row asks for
    depends on it.
    """

    params: SamplingParams
    output_index: int
    """Index of the token to be drawn among the choice's output tokens."""
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    banned_token_ids: tuple[int, ...] = ()
    """Never drawn now: end-of-sequence and stop tokens while min_tokens is not reached."""


class StepRow(NamedTuple):
    """A stretch of one sequence: compute `token_ids` at positions start … start+len-1, writing their KV. `[DRAWN]` for
    one token that is not known yet.

    `block_ids` is the sequence's block table, possibly longer than needed: position p lives in
    block_ids[p // block_size], slot p % block_size. KV of positions < start is already there.
    """

    seq_id: str
    start: int
    token_ids: Sequence[int]
    block_ids: Sequence[int]
    sample: SampleSpec | None = None
    """None: a prefill chunk that is not the prompt's last."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One model iteration. Rows that decode come first, then prefill stretches."""

    plan_id: int
    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(row.token_ids) for row in self.rows)


class RowOutput(NamedTuple):
    """0…k tokens drawn for one row (k > 1 with speculation, 0 where the plan asked for none)."""

    seq_id: str
    tokens: tuple[SampledToken, ...] = ()
    error: str = ""
    """Not empty: this row failed alone (logits that are not numbers, KV that is not its own); the scheduler fails the
    sequence with this message and the rest of the batch goes on."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a device gives back for one plan: an entry for each of its rows, in order."""

    plan_id: int
    rows: tuple[RowOutput, ...]
    duration_s: float = 0.0
    """Time the device took, seconds; feeds the on-line step-time fit."""

    def check_answers(self, plan: StepPlan) -> None:
        """Raises AssertionError if this is not the output of `plan`, row by row."""
        assert self.plan_id == plan.plan_id, f"output of plan {self.plan_id}, but {plan.plan_id} is the oldest"
        for row, result in zip(plan.rows, self.rows, strict=True):
            fits = result.error or len(result.tokens) == (row.sample is not None)
            if not fits or row.seq_id != result.seq_id:
                wants, has = int(row.sample is not None), len(result.tokens)
                raise AssertionError(
                    f"plan {plan.plan_id} wants {wants} tokens of {row.seq_id!r}, its output has {has} of "
                    f"{result.seq_id!r}"
                )
