"""The waterfall log: one JSON line a choice, bounded, honest about what it dropped."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.config import ConfigError
from tandem.cluster.events import WaterfallLog
from tandem.cluster.types import Timings

TIMINGS = Timings(ttft_s=0.5, e2e_s=1.5, output_tokens=11, prefill_worker="p0", cached_tokens=3)


def record(log: WaterfallLog, request_id: str = "r", **changes: Any) -> None:
    values: dict[str, Any] = {"choice": 0, "timings": TIMINGS, "prompt_tokens": 7, "finish_reason": "stop", **changes}
    log.record(request_id=request_id, **values)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_choice(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = WaterfallLog(path)
    record(log, "a", client_request_id="mine", attempts=2)
    record(log, "b", choice=1, timings=Timings(output_tokens=1))
    assert log.flush()
    first, second = lines(path)
    assert {**first, "unix_s": 0} == {
        "event": "choice",
        "unix_s": 0,
        "request_id": "a",
        "client_request_id": "mine",
        "choice": 0,
        "prompt_tokens": 7,
        "finish_reason": "stop",
        "attempts": 2,
        "timings": {
            **{name: getattr(TIMINGS, name) for name in Timings.__slots__},
            "tpot_s": 0.1,
        },
    }
    assert (second["choice"], second["timings"]["tpot_s"]) == (1, None)
    log.close()


def test_close_writes_what_is_buffered_and_may_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = WaterfallLog(path)
    for index in range(1000):
        record(log, str(index))
    log.close()
    log.close()
    assert [line["request_id"] for line in lines(path)] == [str(index) for index in range(1000)]
    record(log, "late")
    assert len(lines(path)) == 1000
    assert log.flush()


def test_a_file_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for name in ("a", "b"):
        log = WaterfallLog(path)
        record(log, name)
        log.close()
    assert [line["request_id"] for line in lines(path)] == ["a", "b"]


def test_without_a_path_nothing_is_kept() -> None:
    before = threading.active_count()
    log = WaterfallLog(None)
    record(log)
    assert log.flush()
    log.close()
    assert threading.active_count() == before


def test_a_path_that_cannot_be_opened_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        WaterfallLog(tmp_path)
    with pytest.raises(ConfigError, match=r"^events_path: '.*mistyped/e.jsonl' .*; allowed: a file in a folder that e"):
        WaterfallLog(tmp_path / "mistyped" / "e.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_keep_up_costs_lines_not_memory(tmp_path: Path) -> None:
    """The file is a pipe that nobody reads at first: the writer blocks, the loop does not."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = WaterfallLog(pipe, max_buffered_lines=50)
    for index in range(5000):
        record(log, str(index))
    assert log.dropped_lines > 0
    os.set_blocking(reader, True)
    with os.fdopen(reader, encoding="utf-8") as file:
        closer = threading.Thread(target=log.close)
        closer.start()
        found = [json.loads(line) for line in file]
        closer.join()
    dropped = sum(line["lines"] for line in found if line["event"] == "dropped")
    assert dropped == log.dropped_lines
    assert sum(line["event"] == "choice" for line in found) + dropped == 5000


def test_several_processes_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    logs = [WaterfallLog(path) for _ in range(2)]
    for number in range(400):
        for log in logs:
            record(log, f"{'long' * 200}-{number}")  # batches beyond any buffer
    for log in logs:
        log.close()
    assert len(lines(path)) == 800
