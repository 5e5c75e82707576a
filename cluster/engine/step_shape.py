"""What a step's time depends on, read off its plan: what the models of `cluster.latency` take. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .plan import StepPlan, StepRow


class StepShape(NamedTuple):
    """Sizes of one step, tokens and rows."""

    prefill_tokens: int
    decode_rows: int
    context_tokens: int
    """Context of the decode rows, each with the token it computes."""
    prefill_squares: int = 0
    """Sum of `end² - start²` over the prompt chunks: what their attention costs, and what adds up to the square of a
    prompt over its chunks."""


def is_decode(row: StepRow) -> bool:
    """Whether the row computes one token on top of KV that is there: what decode is, whichever queue it came from."""
    return row.start > 0 and len(row.token_ids) == 1


def step_shape(plan: StepPlan) -> StepShape:
    """The shape of one step, from all of its rows."""
    return shape_beside(plan.rows, 0, 0)


def padded_shape(plan: StepPlan) -> StepShape:
    """The same where each of its prompts is padded to the longest one."""
    shape = step_shape(plan)
    prompts = [row for row in plan.rows if not is_decode(row)]
    if len(prompts) < 2:
        return shape
    tokens = max(len(row.token_ids) for row in prompts)
    squares = max((row.start + len(row.token_ids)) ** 2 - row.start**2 for row in prompts)
    return shape._replace(prefill_tokens=len(prompts) * tokens, prefill_squares=len(prompts) * squares)


def shape_beside(rows: Sequence[StepRow], decode_rows: int, context_tokens: int) -> StepShape:
    """The shape of `rows` with so many more decode rows beside them, of so much context in all."""
    prefill_tokens = prefill_squares = 0
    for row in rows:
        tokens = len(row.token_ids)
        if tokens == 1 and row.start > 0:  # `is_decode`
            decode_rows += 1
            context_tokens += row.start + 1
        else:
            end = row.start + tokens
            prefill_tokens += tokens
            prefill_squares += end * end - row.start * row.start
    return StepShape(prefill_tokens, decode_rows, context_tokens, prefill_squares)
