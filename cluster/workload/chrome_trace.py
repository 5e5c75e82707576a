"""Events as a Chrome trace: a JSON file that chrome://tracing and ui.perfetto.dev draw. Pure but for `save_trace`.

    events = [TraceEvent(name="prefill", start_s=1.0, end_s=1.2, process="engine", track="steps", args={"tokens": 512}),
              TraceCounter(name="batch", at_s=1.0, process="engine", values={"running": 8})]
    save_trace("steps.json", events)

Times are seconds on any one clock; the earliest becomes 0. Events on one track must nest or follow each other: what
overlaps is laid out on lanes (`lanes`). Format: "Trace Event Format" (Google, 2016), phases X, i, C and M.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEvent:
    """A stretch of time on one track of one process, or a moment, where `end_s` is None."""

    name: str
    start_s: float
    end_s: float | None = None
    process: str
    """The group of tracks it is drawn in."""
    track: str
    """The line it is drawn on. Tracks stand in the order in which they first occur."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Shown when the event is clicked; JSON values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceCounter:
    """Values from a moment on, drawn as stacked areas until the next one of the same name and process."""

    name: str
    at_s: float
    process: str
    values: Mapping[str, float]


def lanes(spans_s: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """For each (start, end), the lowest lane on which it overlaps no other; `n` at once need `n` lanes."""
    busy: list[tuple[float, int]] = []  # (end, lane)
    free: list[int] = []
    found = [0] * len(spans_s)
    for index in sorted(range(len(spans_s)), key=lambda place: spans_s[place]):
        start_s, end_s = spans_s[index]
        while busy and busy[0][0] <= start_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        found[index] = lane
        heapq.heappush(busy, (end_s, lane))
    return tuple(found)


def trace_json(events: Iterable[TraceEvent | TraceCounter]) -> bytes:
    """The trace as JSON. Raises ValueError where an event ends before it starts."""
    items = list(events)
    origin_s = min((_start(item) for item in items), default=0.0)
    processes: dict[str, int] = {}
    tracks: dict[tuple[str, str], int] = {}
    rows: list[dict[str, Any]] = []
    for item in items:
        pid = processes.setdefault(item.process, len(processes) + 1)
        row: dict[str, Any] = {"name": item.name, "pid": pid, "ts": (_start(item) - origin_s) * 1e6}
        if isinstance(item, TraceCounter):
            row |= {"ph": "C", "args": dict(item.values)}
        else:
            row |= {"tid": tracks.setdefault((item.process, item.track), len(tracks) + 1), "args": dict(item.args)}
            row |= _shape(item)
        rows.append(row)
    return orjson.dumps({"displayTimeUnit": "ms", "traceEvents": _names(processes, tracks) + rows})


def save_trace(path: str | Path, events: Iterable[TraceEvent | TraceCounter]) -> None:
    """Writes the trace. Raises OSError."""
    Path(path).write_bytes(trace_json(events))


def _start(item: TraceEvent | TraceCounter) -> float:
    return item.at_s if isinstance(item, TraceCounter) else item.start_s


def _shape(event: TraceEvent) -> dict[str, Any]:
    if event.end_s is None:
        return {"ph": "i", "s": "t"}
    if event.end_s < event.start_s:
        raise ValueError(f"end_s: {event.end_s} is not allowed; allowed: at least start_s, {event.start_s}")
    return {"ph": "X", "dur": (event.end_s - event.start_s) * 1e6}


def _names(processes: Mapping[str, int], tracks: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Metadata events: what processes and tracks are called, and in which order they stand."""
    rows: list[dict[str, Any]] = []
    for name, pid in processes.items():
        rows.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        rows.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
    for (process, name), tid in tracks.items():
        place = {"pid": processes[process], "tid": tid}
        rows.append({"ph": "M", "name": "thread_name", **place, "args": {"name": name}})
        rows.append({"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": tid}})
    return rows
