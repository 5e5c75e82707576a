"""The trace file: microseconds from the earliest event, named tracks, lanes for what overlaps."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.workload.chrome_trace import TraceCounter, TraceEvent, lanes, save_trace, trace_json


def test_times_are_microseconds_from_the_earliest_event(tmp_path: Path) -> None:
    events = [
        TraceEvent(name="step", start_s=100.5, end_s=100.75, process="engine", track="steps", args={"tokens": 8}),
        TraceEvent(name="first token", start_s=100.75, process="engine", track="requests"),
        TraceCounter(name="batch", at_s=100.0, process="engine", values={"running": 3}),
    ]
    path = tmp_path / "trace.json"
    save_trace(path, events)
    rows = {row["ph"]: row for row in json.loads(path.read_text())["traceEvents"]}
    assert (rows["X"]["ts"], rows["X"]["dur"], rows["X"]["args"]) == (500_000.0, 250_000.0, {"tokens": 8})
    assert (rows["i"]["ts"], rows["i"]["s"]) == (750_000.0, "t")
    assert (rows["C"]["ts"], rows["C"]["args"]) == (0.0, {"running": 3})


def test_tracks_are_named_and_kept_apart_between_processes() -> None:
    events = [
        TraceEvent(name="a", start_s=0, end_s=1, process=process, track="lane 0") for process in ("client", "router")
    ]
    rows = json.loads(trace_json(events))["traceEvents"]
    names = {(row["pid"], row.get("tid")): row["args"]["name"] for row in rows if row["name"].endswith("_name")}
    assert names == {(1, None): "client", (2, None): "router", (1, 1): "lane 0", (2, 2): "lane 0"}
    assert [(row["pid"], row["tid"]) for row in rows if row["ph"] == "X"] == [(1, 1), (2, 2)]


def test_an_event_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"end_s: 1.0 is not allowed; allowed: at least start_s, 2.0"):
        trace_json([TraceEvent(name="a", start_s=2.0, end_s=1.0, process="p", track="t")])


def test_nothing_is_an_empty_trace() -> None:
    assert json.loads(trace_json([]))["traceEvents"] == []


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=30))
def test_lanes_hold_no_overlap_and_are_as_few_as_can_be(drawn: list[tuple[int, int]]) -> None:
    spans = [(float(start), float(start + length)) for start, length in drawn]
    found = lanes(spans)
    for (one, one_lane), (other, other_lane) in combinations(zip(spans, found, strict=True), 2):
        if one_lane == other_lane:
            assert one[1] <= other[0] or other[1] <= one[0]
    most = max((sum(start <= moment < end for start, end in spans) for moment, _ in spans), default=0)
    assert len(set(found)) == most
