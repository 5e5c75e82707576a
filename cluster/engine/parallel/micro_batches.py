"""How a step is cut into micro-batches, so that the stages of a pipeline work at the same time. Pure.

Stage s computes micro-batch i while stage s + 1 computes i - 1. Micro-batches go through every stage in order, so a
prompt's chunk may be cut: the later piece finds the KV of the earlier one. Each micro-batch reads all weights of a
stage, so one is worth it only where it is bound by arithmetic: `MIN_TOKENS`.
"""

from __future__ import annotations

from ..plan import StepPlan, StepRow

MIN_TOKENS = 32
"""Of a micro-batch: below it a step is bound by reading weights, and cutting it would read them once more."""
MOST_PER_STAGE = 2
"""With M micro-batches on S stages the stages are idle for (S - 1) / (M + S - 1) of a step."""


def micro_batches(plan: StepPlan, pipeline_stages: int) -> tuple[StepPlan, ...]:
    """The step in pieces of about as many tokens, rows in order. A row that samples does so in its last piece."""
    total = plan.num_tokens
    count = max(1, min(MOST_PER_STAGE * pipeline_stages, total // MIN_TOKENS)) if pipeline_stages > 1 else 1
    if count == 1:
        return (plan,)
    pieces: list[list[StepRow]] = [[] for _ in range(count)]
    index, before = 0, 0
    for row in plan.rows:
        done = 0
        while done < len(row.token_ids):
            end = total * (index + 1) // count
            take = min(len(row.token_ids) - done, end - before)
            if take:
                pieces[index].append(_stretch(row, done, take))
            done, before = done + take, before + take
            index += before == end
    return tuple(StepPlan(plan.plan_id, tuple(rows)) for rows in pieces)


def _stretch(row: StepRow, first: int, count: int) -> StepRow:
    last = first + count == len(row.token_ids)
    return row._replace(
        start=row.start + first,
        token_ids=row.token_ids[first : first + count],
        sample=row.sample if last else None,
    )
