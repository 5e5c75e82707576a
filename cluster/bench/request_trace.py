"""A run's requests as Chrome-trace events: what the client saw, and the waterfalls of a server that is ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..workload.chrome_trace import TraceCounter, TraceEvent, lanes
from ..workload.report import RequestRecord
from ..workload.text_file import numbered_lines, parse_json
from .waterfall import spans

CLIENT, SERVER = "client", "server (its own clocks, laid out from each sending)"
_DURATIONS = ("queue_s", "prefill_s", "ttft_s", "transfer_s", "exposed_transfer_s", "decode_s", "e2e_s")
_TRANSFER = "KV transfer"

Timings = Mapping[str, Any]


def read_waterfalls(path: str | Path, name: str) -> dict[int, Timings]:
    """The server's timings by the place of a run's request, from the router's event log. Raises ValueError.

    The run's requests were called `<name>-<place>`.
    """
    found: dict[int, Timings] = {}
    for number, text in numbered_lines(path):
        if name not in text:
            continue
        row = parse_json(text, f"{path}:{number}")
        if not isinstance(row, dict) or row.get("event") != "choice":
            continue
        head, _, place = str(row.get("client_request_id", "")).rpartition("-")
        if head == name and place.isdigit() and isinstance(row.get("timings"), dict):
            found[int(place)] = row["timings"]
    return found


def request_events(
    records: Sequence[RequestRecord], name: str, waterfalls: Mapping[int, Timings]
) -> Iterator[TraceEvent | TraceCounter]:
    """Each request as `waiting for the first token` and `streaming`, and a counter of those under way.

    Where the server's own timings are known (`waterfalls`, else the record's), its waterfall stands in a second group
    on the same lane, laid out from the moment of sending: what the way there and the door took is not in it.
    """
    ends = [_end(record) for record in records]
    found = lanes([(min(record.due_s, record.sent_s), end) for record, end in zip(records, ends, strict=True)])
    for place, record in enumerate(records):
        lane = f"lane {found[place]}"
        yield from _client_events(record, ends[place], lane, f"{name}-{place}")
        if timings := waterfalls.get(place) or record.timings:
            yield from _server_events(record, timings, lane)
    under_way = 0
    edges = [(record.sent_s, 1) for record in records] + [(end, -1) for end in ends]
    for at_s, change in sorted(edges):
        under_way += change
        yield TraceCounter(name="requests under way", at_s=at_s, process=CLIENT, values={"requests": under_way})


def _end(record: RequestRecord) -> float:
    return record.sent_s if record.last_token_s is None else record.last_token_s


def _client_events(record: RequestRecord, end_s: float, lane: str, request_id: str) -> Iterator[TraceEvent]:
    facts = {
        "request": request_id,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "error": record.error,
    }
    if record.lateness_s > 0:
        yield TraceEvent(name="sent late", start_s=record.due_s, end_s=record.sent_s, process=CLIENT, track=lane)
    if record.first_token_s is None:
        yield TraceEvent(name="failed", start_s=record.sent_s, process=CLIENT, track=lane, args=facts)
        return
    first_s = record.first_token_s
    yield TraceEvent(
        name="waiting for the first token", start_s=record.sent_s, end_s=first_s, process=CLIENT, track=lane, args=facts
    )
    yield TraceEvent(name="streaming", start_s=first_s, end_s=max(first_s, end_s), process=CLIENT, track=lane)
    for when_s in record.chunk_times_s:
        yield TraceEvent(name="piece", start_s=when_s, process=CLIENT, track=lane)


def _server_events(record: RequestRecord, timings: Timings, lane: str) -> Iterator[TraceEvent]:
    durations = {name: _seconds(timings.get(name)) for name in _DURATIONS}
    parts = spans(
        **durations,
        transferred_bytes=int(_seconds(timings.get("transferred_bytes"))),
        path=str(timings.get("path", "")),
    )
    workers = {name: timings[name] for name in ("prefill_worker", "decode_worker", "path") if timings.get(name)}
    for part in parts:
        yield TraceEvent(
            name=part.name,
            start_s=record.sent_s + part.start_s,
            end_s=record.sent_s + max(part.start_s, part.end_s),
            process=SERVER,
            track=f"{lane}, KV" if part.name == _TRANSFER else lane,  # it runs beside prefill
            args={**workers, **({"note": part.note} if part.note else {})},
        )


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else 0.0
