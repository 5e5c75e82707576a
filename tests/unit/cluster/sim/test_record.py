"""What a simulation leaves behind: records for reports, a table that can be replayed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.sim.record import COLUMNS, UNFINISHED, attained_by_class, record, requests_csv
from tandem.cluster.sim.request import Asked, Outcome
from tandem.cluster.types import SLO
from tandem.cluster.workload.traces import read_trace

PROMISES = {"chat": SLO(ttft_s=1.0, tpot_s=0.1), "bulk": SLO(ttft_s=None, tpot_s=None)}


def outcome(slo_class: str = "chat", **fields: Any) -> Outcome:
    asked = Asked(request_id="r0", arrival_s=2.0, prompt_token_ids=(0,) * 30, output_tokens=5, slo_class=slo_class)
    return Outcome(asked=asked, **fields)


def done(slo_class: str = "chat", first_s: float = 2.5, last_s: float = 2.9) -> Outcome:
    return outcome(
        slo_class,
        dispatched_s=2.1,
        first_token_s=first_s,
        last_token_s=last_s,
        output_tokens=5,
        queue_s=0.1,
        prefill_s=0.2,
        path="split",
        prefill_worker="p0",
        decode_worker="d0",
        exposed_transfer_s=0.01,
        transferred_bytes=1000,
        tries=1,
    )


def test_a_record_is_what_a_client_would_have_seen() -> None:
    seen = record(done())
    assert (seen.ttft_s, seen.tpot_s, seen.e2e_s) == pytest.approx((0.5, 0.1, 0.9))
    assert (seen.ok, seen.prompt_tokens, seen.output_tokens, seen.lateness_s) == (True, 30, 5, 0.0)
    assert seen.timings["path"] == "split"
    assert seen.timings["exposed_transfer_s"] == 0.01


def test_who_was_refused_or_never_ended_has_failed() -> None:
    refused, cut = record(outcome(refused="slo_unattainable")), record(outcome(first_token_s=2.5, last_token_s=2.6))
    assert (refused.ok, refused.error, refused.ended_s) == (False, "refused: slo_unattainable", 2.0)
    assert (cut.ok, cut.error) == (False, UNFINISHED)


def test_promises_are_counted_by_class() -> None:
    outcomes = [done(), done(first_s=3.5, last_s=3.6), outcome(refused="queue_full"), done("bulk", 60.0, 90.0)]
    assert attained_by_class(outcomes, PROMISES) == {"chat": (1, 3), "bulk": (1, 1)}


def test_the_table_of_requests_can_be_replayed(tmp_path: Path) -> None:
    text = requests_csv([done(), outcome(refused="queue_full"), done("bulk", 60.0, 90.0)], PROMISES)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["outcome"], rows[0]["attained"], rows[0]["ttft_ms"], rows[0]["dispatch_ms"]) == (
        "done",
        "1",
        "500.000",
        "100.000",
    )
    assert (rows[1]["outcome"], rows[1]["attained"], rows[1]["ttft_ms"]) == ("refused: queue_full", "0", "")
    path = tmp_path / "requests.csv"
    path.write_text(text)
    assert [(row.input_tokens, row.output_tokens) for row in read_trace(path)] == [(30, 5)] * 3
