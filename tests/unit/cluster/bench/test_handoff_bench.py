"""`tandem bench handoff`: what it takes for which stage, and one real handoff of each transport."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tandem.cluster.bench.handoff import HandoffOptions, run_handoffs
from tandem.cluster.bench.handoff_copies import MemoryCopies
from tandem.cluster.bench.handoff_report import Cell, Handoff, stages_of, table

MARKS: dict[str, Any] = {
    "prefill": {"steps": [{"seq_id": "r/0/p1", "launched_s": 10.003, "done_s": 10.013}]},
    "decode": {
        "steps": [{"seq_id": "r/0/d1", "launched_s": 10.022, "done_s": 10.032}],
        "pulls": [
            {
                "seq_id": "r/0/d1",
                "opened_s": 10.004,
                "first_s": 10.014,
                "last_s": 10.021,
                "bytes": 8_000_000,
                "cpu_s": 0.005,
            }
        ],
        "confirms": [{"seq_id": "r/0/d1", "sent_s": 10.033, "answered_s": 10.037}],
    },
}


def handoff() -> Handoff:
    return stages_of("r", 10.0, 10.001, 10.033, MARKS, 0.004)


def test_stages_are_cut_where_the_marks_are() -> None:
    stages = handoff().stages_s
    expected = {"reserve": 1, "dispatch": 2, "open": 1, "transfer": 7, "join": 1, "reply": 1, "confirm": 4}
    assert {name: round(value * 1000) for name, value in stages.items()} == expected
    assert handoff().orchestration_s == pytest.approx(0.006)
    assert handoff().exposed_s == pytest.approx(0.008)


def test_bandwidth_is_that_of_the_transfer_and_of_all_that_is_waited_for() -> None:
    row = Cell(transport="grpc", size_mib=8, handoffs=(handoff(),)).row()
    assert row["gb_per_s"] == pytest.approx(8 / 7)
    assert row["exposed_gb_per_s"] == pytest.approx(1.0)
    assert row["memcpy_gb_per_s"] == pytest.approx(2.0)
    assert row["of_memcpy"] == pytest.approx(4 / 7)
    assert "grpc 8 MiB" in table([Cell(transport="grpc", size_mib=8, handoffs=(handoff(),))])


@pytest.mark.parametrize(
    ("field", "value"),
    [("transports", ("carrier-pigeon",)), ("sizes_mib", (0.0,)), ("repeats", 0), ("token_bytes", 100)],
)
def test_what_cannot_be_measured_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        HandoffOptions(**{field: value})  # type: ignore[arg-type]


def test_two_real_workers_hand_off() -> None:
    options = HandoffOptions(transports=("mapped",), sizes_mib=(0.75,), repeats=1, warmups=0, step_s=0.001)
    (cell,) = asyncio.run(run_handoffs(options))
    (measured,) = cell.handoffs
    assert measured.bytes == options.tokens_of(0.75) * options.token_bytes
    assert all(value > 0 for value in measured.stages_s.values())


def test_the_machines_own_copies_take_blocks_of_the_pool_in_turn() -> None:
    copies = MemoryCopies(token_bytes=1024, block_size=4, pool_blocks=5)
    assert (copies._into == copies._from).all()
    copies._into[:] = 0
    assert copies.seconds(1) > 0
    copied = copies._into.any(axis=1)
    assert copied.sum() == 3, "three copies of one block, each of another"
    copies.seconds(2)
    assert copies._into.any(axis=1).all()
    assert (copies._into == copies._from).all()
