"""What `tandem bench serve` writes: results, pictures, traces; refused before the run where it could not be written."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from .bench.plots import check_plot, plot_run, plot_sweeps
from .bench.request_trace import read_waterfalls, request_events
from .workload.chrome_trace import save_trace

if TYPE_CHECKING:
    from .bench.options import BenchOptions
    from .bench.run import BenchResult
    from .workload.sweep import SweepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where to write what."""

    save_result: bool
    detailed: bool
    result_dir: str | None
    result_filename: str | None
    plot: str | None
    trace: str | None
    server_events: str | None
    sweep: bool

    def check(self) -> None:
        """Raises ValueError before anything is measured in vain."""
        if self.plot is not None:
            check_plot(self.plot)
        for name, path in (("result_dir", self.result_dir), ("server_events", self.server_events)):
            if path is not None and not Path(path).exists():
                raise ValueError(f"{name}: {path!r} is not allowed; allowed: what exists")
        for name, path in (("save_trace", self.trace), ("result_filename", self.result_filename)):
            base = Path(self.result_dir or ".") if name == "result_filename" else Path()
            if path is not None and not (base / path).absolute().parent.is_dir():
                raise ValueError(f"{name}: {path!r} is not allowed; allowed: a file in a folder that exists")
        if self.server_events is not None and self.trace is None:
            raise ValueError("server_events: is not allowed without save_trace")
        if self.sweep and self.trace is not None:
            raise ValueError("save_trace: is not allowed with sweep; allowed: one run")

    @property
    def saves(self) -> bool:
        """Whether a result is written: asked for, or somewhere to write it is named."""
        return self.save_result or self.detailed or self.result_dir is not None or self.result_filename is not None

    def write_run(self, result: BenchResult, options: BenchOptions) -> Iterator[str]:
        """Writes what was asked for and says so. Raises OSError."""
        if self.saves:
            path = self._path(options.label or options.chosen_backend, options.request_rate, options.max_concurrency)
            result.save(path, detailed=self.detailed)
            yield f"saved       {path}"
        if self.plot is not None:
            title = f"{options.label or result.facts['model_id']}: {result.summary.request_throughput:.2f} requests/s"
            plot_run(result.records, self.plot, title=title, promises_ms=options.goodput_ms)
            yield f"drawn       {self.plot}"
        if self.trace is not None:
            waterfalls = {} if self.server_events is None else read_waterfalls(self.server_events, result.name)
            save_trace(self.trace, request_events(result.records, result.name, waterfalls))
            known = sum(bool(record.timings) for record in result.records) or len(waterfalls)
            yield f"traced      {self.trace}, {known} of {len(result.records)} requests with the server's own times"

    def write_sweep(self, result: SweepResult) -> Iterator[str]:
        """Writes what was asked for and says so. Raises OSError."""
        if self.saves:
            path = self._path(f"{result.label}-sweep", math.inf, None)
            path.write_bytes(orjson.dumps(result.as_json(), option=orjson.OPT_INDENT_2) + b"\n")
            yield f"saved       {path}"
        if self.plot is not None:
            plot_sweeps([result], self.plot)
            yield f"drawn       {self.plot}"

    def _path(self, label: str, rate: float, concurrency: int | None) -> Path:
        """As `vllm bench serve` names its files, where no name was given."""
        folder = Path(self.result_dir or ".")
        if self.result_filename is not None:
            return folder / self.result_filename
        held = f"-concurrency{concurrency}" if concurrency else ""
        when = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        return folder / re.sub(r"[^\w.+-]", "_", f"{label}-{rate:g}qps{held}-{when}.json")
