"""Waterfalls as JSON lines: one line for each finished choice and one for the end of each request, for `tandem bench`,
the demo and whoever debugs a slow or a lost request.

`{"event": "choice", "unix_s", "request_id", "choice", "prompt_tokens", "finish_reason", "timings": {…, "tpot_s"}}`:
durations in seconds (`cluster.types.Timings`). `{"event": "request", "unix_s", "request_id", "outcome", "reason"}`:
every request that came past the checks at the door ends in exactly one of `RequestOutcome`. `{"event": "plan",
"unix_s", "state", "slo_class", "requests", "attainment", "predicted_attainment", "rate", "planned_rate"}`: what the
cluster's plan predicted and what is seen have parted, or met again (`router.attainment`).

The event loop only appends to a bounded buffer; a thread of its own writes and flushes. When the disk cannot keep up,
lines are dropped and counted, and the file says so: `{"event": "dropped", "lines": n}`. Several router processes may
write one file: a batch is appended in one call, so that no line is torn.
"""

from __future__ import annotations

import enum
import json
import logging
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from .config_schema import ConfigError
from .types import Timings

_log = logging.getLogger(__name__)

MAX_BUFFERED_LINES = 8192
CLOSE_TIMEOUT_S = 5.0


class RequestOutcome(enum.StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """Before anything was done for it: no room, or its promise could not be kept."""
    CANCELED = "canceled"
    """Its client went away."""
    FAILED = "failed"


def check_path(path: str | Path) -> None:
    """Raises ConfigError naming `events_path` where the file's folder does not exist: it may be mistyped."""
    if not Path(path).expanduser().parent.is_dir():
        raise ConfigError("events_path", str(path), "a file in a folder that exists")


class WaterfallLog:
    """Appends to the file at `path`, which is made if need be; with `path=None` nothing is kept and nothing written.

    Thread-safe. Raises ConfigError at once where the file's folder is missing, OSError where it cannot be opened; after
    that, never because of the disk.
    """

    def __init__(self, path: str | Path | None, *, max_buffered_lines: int = MAX_BUFFERED_LINES) -> None:
        self.dropped_lines = 0
        self._max_buffered_lines = max_buffered_lines
        self._buffer: deque[dict[str, Any]] = deque()
        self._unreported = 0
        self._writing = False
        self._closed = path is None
        self._changed = threading.Condition()
        self._file: BinaryIO | None = None
        self._thread: threading.Thread | None = None
        if path is not None:
            check_path(path)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by the writer thread)
            self._thread = threading.Thread(target=self._write_until_closed, name="waterfall-log", daemon=True)
            self._thread.start()

    def record(
        self,
        *,
        request_id: str,
        choice: int,
        timings: Timings,
        prompt_tokens: int,
        finish_reason: str,
        client_request_id: str = "",
        attempts: int = 1,
    ) -> None:
        """Called by the router core once for each choice that ended; does not wait for the disk."""
        if self._closed:
            return
        self._append(
            {
                "event": "choice",
                "unix_s": time.time(),
                "request_id": request_id,
                "client_request_id": client_request_id,
                "choice": choice,
                "prompt_tokens": prompt_tokens,
                "finish_reason": str(finish_reason),
                "attempts": attempts,
                "timings": {**asdict(timings), "tpot_s": timings.tpot_s},
            }
        )

    def record_end(
        self, *, request_id: str, outcome: RequestOutcome, reason: str = "", client_request_id: str = ""
    ) -> None:
        """Called by the router core once for each request; `reason` is the error's code. Does not wait for the disk."""
        if self._closed:
            return
        self._append(
            {
                "event": "request",
                "unix_s": time.time(),
                "request_id": request_id,
                "client_request_id": client_request_id,
                "outcome": outcome.value,
                "reason": reason,
            }
        )

    def record_plan(
        self,
        *,
        state: str,
        slo_class: str,
        requests: int,
        attainment: float,
        predicted_attainment: float,
        rate: float,
        planned_rate: float | None,
    ) -> None:
        """Called by the router where prediction and sight have parted or met. Does not wait for the disk."""
        if self._closed:
            return
        self._append(
            {
                "event": "plan",
                "unix_s": time.time(),
                "state": state,
                "slo_class": slo_class,
                "requests": requests,
                "attainment": attainment,
                "predicted_attainment": predicted_attainment,
                "rate": rate,
                "planned_rate": planned_rate,
            }
        )

    def _append(self, line: dict[str, Any]) -> None:
        with self._changed:
            if self._closed:
                return
            if len(self._buffer) >= self._max_buffered_lines:
                self.dropped_lines += 1
                self._unreported += 1
                return
            self._buffer.append(line)
            self._changed.notify_all()

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Waits until all that was recorded is in the file; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._thread is None or not (self._buffer or self._writing), timeout_s
            )

    def close(self) -> None:
        """Writes what is buffered and closes the file; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(CLOSE_TIMEOUT_S)

    def _write_until_closed(self) -> None:
        assert self._file is not None
        with self._file:
            while True:
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._buffer or self._closed)
                    if not self._buffer and not self._unreported:
                        return
                    batch = list(self._buffer)
                    self._buffer.clear()
                    if self._unreported:
                        batch.append({"event": "dropped", "unix_s": time.time(), "lines": self._unreported})
                        self._unreported = 0
                    self._writing = True
                self._write(batch)

    def _write(self, batch: list[dict[str, Any]]) -> None:
        assert self._file is not None
        try:
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in batch).encode()
            while written := self._file.write(text):
                text = text[written:]
        except OSError as error:
            _log.warning("waterfall log: lost %d lines: %s", len(batch), error)
            with self._changed:
                self.dropped_lines += len(batch)
