"""A step in micro-batches is the same step: every token once, in order, and each row samples at its end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_steps import sample
from tandem.cluster.engine.parallel.micro_batches import MIN_TOKENS, MOST_PER_STAGE, micro_batches
from tandem.cluster.engine.plan import StepPlan, StepRow

ROWS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 200), st.booleans()), min_size=1, max_size=12)


def plan_of(rows: list[tuple[int, int, bool]]) -> StepPlan:
    return StepPlan(
        5,
        tuple(
            StepRow(str(index), start, list(range(start, start + length)), [index], sample() if samples else None)
            for index, (start, length, samples) in enumerate(rows)
        ),
    )


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, stages=st.integers(1, 4))
def test_the_pieces_are_the_step(rows: list[tuple[int, int, bool]], stages: int) -> None:
    plan = plan_of(rows)
    parts = micro_batches(plan, stages)
    assert {part.plan_id for part in parts} == {5}
    computed: dict[str, list[int]] = {row.seq_id: [] for row in plan.rows}
    sampled = []
    for row in (row for part in parts for row in part.rows):
        whole = plan.rows[int(row.seq_id)]
        assert row.block_ids == whole.block_ids
        assert row.start == whole.start + len(computed[row.seq_id])
        computed[row.seq_id] += row.token_ids
        if row.sample is not None:
            assert len(computed[row.seq_id]) == len(whole.token_ids), "it samples before its end"
            sampled.append(row.seq_id)
    assert computed == {row.seq_id: list(row.token_ids) for row in plan.rows}
    assert sampled == [row.seq_id for row in plan.rows if row.sample is not None]
    sizes = [part.num_tokens for part in parts]
    assert len(sizes) <= MOST_PER_STAGE * stages
    assert max(sizes) - min(sizes) <= 1
    if len(sizes) > 1:
        assert stages > 1
        assert min(sizes) >= MIN_TOKENS


@pytest.mark.parametrize(("tokens", "parts"), [(63, 1), (64, 2), (96, 3), (128, 4), (512, 4)])
def test_only_as_many_as_are_worth_it(tokens: int, parts: int) -> None:
    assert len(micro_batches(plan_of([(0, tokens, True)]), 2)) == parts
