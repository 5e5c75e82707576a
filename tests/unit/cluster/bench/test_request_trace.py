"""A run as a trace: lanes of the client, the server's own waterfalls beside them, by id from its event log."""

from __future__ import annotations

import json
from pathlib import Path

from tandem.cluster.bench.request_trace import CLIENT, SERVER, read_waterfalls, request_events
from tandem.cluster.workload.chrome_trace import TraceCounter, TraceEvent, trace_json
from tandem.cluster.workload.report import RequestRecord

TIMINGS = {
    "queue_s": 0.1,
    "prefill_s": 0.2,
    "ttft_s": 0.35,
    "transfer_s": 0.15,
    "exposed_transfer_s": 0.05,
    "decode_s": 0.5,
    "e2e_s": 1.0,
    "path": "split",
    "transferred_bytes": 2**20,
    "decode_worker": "decode-0",
}
OVERLAPPING = (
    RequestRecord(
        due_s=10.0,
        sent_s=10.1,
        first_token_s=10.5,
        last_token_s=11.1,
        chunk_times_s=(10.5, 11.1),
        prompt_tokens=7,
        output_tokens=2,
    ),
    RequestRecord(due_s=10.4, sent_s=10.4, error="refused"),
)


def slices(waterfalls: dict[int, dict[str, object]]) -> list[TraceEvent]:
    events = list(request_events(OVERLAPPING, "run", waterfalls))
    trace_json(events)  # they can be written
    return [event for event in events if isinstance(event, TraceEvent)]


def test_the_client_sees_waiting_streaming_and_failures_on_lanes_of_their_own() -> None:
    shown = {event.name: event for event in slices({}) if event.name != "piece"}
    assert list(shown) == ["sent late", "waiting for the first token", "streaming", "failed"]
    assert (shown["sent late"].start_s, shown["sent late"].end_s) == (10.0, 10.1)
    assert (shown["streaming"].start_s, shown["streaming"].end_s) == (10.5, 11.1)
    assert shown["waiting for the first token"].args["request"] == "run-0"
    assert (shown["streaming"].track, shown["failed"].track) == ("lane 0", "lane 1")
    assert shown["failed"].args["error"] == "refused"
    events = list(request_events(OVERLAPPING, "run", {}))
    counts = [event.values["requests"] for event in events if isinstance(event, TraceCounter)]
    assert counts == [1, 0, 1, 0]


def test_the_servers_waterfall_stands_beside_from_the_moment_of_sending() -> None:
    server = {event.name: event for event in slices({0: TIMINGS}) if event.process == SERVER}
    assert list(server) == ["queue", "prefill", "first token", "KV transfer", "decode"]
    assert server["queue"].start_s == 10.1
    assert abs(server["decode"].end_s - 11.1) < 1e-9
    assert server["KV transfer"].track == "lane 0, KV"
    assert server["KV transfer"].args["decode_worker"] == "decode-0"


def test_timings_that_came_with_the_answer_need_no_log() -> None:
    record = RequestRecord(due_s=1.0, sent_s=1.0, first_token_s=1.3, last_token_s=2.0, timings=TIMINGS)
    processes = {event.process for event in request_events([record], "run", {})}
    assert processes == {CLIENT, SERVER}


def test_waterfalls_are_found_by_the_runs_ids(tmp_path: Path) -> None:
    lines = [
        {"event": "choice", "client_request_id": "run-0", "timings": TIMINGS},
        {"event": "choice", "client_request_id": "other-1", "timings": TIMINGS},
        {"event": "request", "client_request_id": "run-2", "outcome": "answered"},
        {"event": "choice", "client_request_id": "run-x", "timings": TIMINGS},
        {"event": "choice", "client_request_id": "run-11", "timings": {**TIMINGS, "path": "mixed"}},
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_waterfalls(path, "run")
    assert sorted(found) == [0, 11]
    assert found[11]["path"] == "mixed"
