"""`tandem bench handoff --engine-pace`: what it says of steps, and one short run with all its conditions."""

from __future__ import annotations

import asyncio

import pytest
from tandem.cluster.bench.handoff_pace import CONDITIONS, Pace, PaceOptions, pace_table, run_pace


def test_step_times_stand_beside_those_of_an_engine_alone() -> None:
    alone = Pace("alone", periods_s=[0.010] * 99)
    pulling = Pace("pull grpc", periods_s=[0.015] * 99, moved_bytes=3_000_000_000, moving_s=2.0)
    last = pace_table([alone, pulling]).splitlines()[-1].split()
    assert last == ["pull", "grpc", "99", "15.00", "15.00", "15.00", "15.00", "1.50", "1.50", "1.50"]


@pytest.mark.parametrize(("field", "value"), [("rows", 0), ("steps", 0), ("rounds", 0), ("rows", 4096)])
def test_what_cannot_be_measured_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        PaceOptions(**{field: value})  # type: ignore[arg-type]


def test_an_engine_steps_while_kv_moves() -> None:
    paces = asyncio.run(run_pace(PaceOptions(rows=2, steps=12, rounds=1, step_s=0.002)))
    assert [pace.condition for pace in paces] == list(CONDITIONS)
    assert all(pace.periods_s for pace in paces)
    assert all((pace.moved_bytes > 0) == (pace.condition not in ("alone", "tokens")) for pace in paces)
