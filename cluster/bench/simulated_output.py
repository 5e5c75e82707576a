"""What `tandem simulate` writes: results, tables of requests, pictures, traces; refused before the run where it could
not be written. The same scenario writes the same bytes: no date, no duration of the simulation stands in any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from ..sim.record import requests_csv
from ..workload.chrome_trace import save_trace
from .plots import check_plot, plot_sweeps
from .simulated_plots import plot_simulated, title_of
from .simulated_trace import simulated_events

if TYPE_CHECKING:
    from ..workload.sweep import SweepResult
    from .simulated import SimulatedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedOutput:
    """Where to write what."""

    save_result: bool
    detailed: bool
    result_dir: str | None
    result_filename: str | None
    requests: str | None
    plot: str | None
    trace: str | None
    sweep: bool
    label: str | None

    def check(self) -> None:
        """Raises ValueError before anything is simulated in vain."""
        if self.plot is not None:
            check_plot(self.plot)
        if self.result_dir is not None and not Path(self.result_dir).is_dir():
            raise ValueError(f"result_dir: {self.result_dir!r} is not allowed; allowed: a folder that exists")
        named = None if self.result_filename is None else str(Path(self.result_dir or ".") / self.result_filename)
        for name, path in (("result_filename", named), ("save_requests", self.requests), ("save_trace", self.trace)):
            if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
                raise ValueError(f"{name}: {path!r} is not allowed; allowed: a file in a folder that exists")
            if path is not None and self.sweep and name != "result_filename":
                raise ValueError(f"{name}: is not allowed with sweep; allowed: one run")

    @property
    def saves(self) -> bool:
        """Whether a result is written: asked for, or somewhere to write it is named."""
        return self.save_result or self.detailed or self.result_dir is not None or self.result_filename is not None

    @property
    def records_all(self) -> bool:
        """Whether samples and spans are needed."""
        return not self.sweep and (self.plot is not None or self.trace is not None)

    def write_run(self, result: SimulatedRun) -> Iterator[str]:
        """Writes what was asked for and says so. Raises OSError."""
        if self.saves:
            rate = result.facts["request_rate"]
            pace = f"{rate:g}qps" if isinstance(rate, float) else "recorded"
            path = self._path(f"{self.label or result.facts['model_id']}-{pace}")
            result.save(path, label=self.label, detailed=self.detailed)
            yield f"saved       {path}"
        if self.requests is not None:
            Path(self.requests).write_text(requests_csv(result.outcomes, result.promises), encoding="utf-8")
            yield f"listed      {self.requests}"
        if self.plot is not None:
            name = self.label or result.facts["model_id"]
            title = title_of(name, result.facts["request_rate"], result.summary.request_throughput)
            plot_simulated(result, self.plot, title=title)
            yield f"drawn       {self.plot}"
        if self.trace is not None:
            save_trace(self.trace, simulated_events(result))
            yield f"traced      {self.trace}"

    def write_sweep(self, result: SweepResult) -> Iterator[str]:
        """Writes what was asked for and says so. Raises OSError."""
        if self.saves:
            path = self._path(f"{result.label}-sweep")
            path.write_bytes(orjson.dumps(result.as_json(), option=orjson.OPT_INDENT_2) + b"\n")
            yield f"saved       {path}"
        if self.plot is not None:
            plot_sweeps([result], self.plot)
            yield f"drawn       {self.plot}"

    def _path(self, stem: str) -> Path:
        name = self.result_filename or re.sub(r"[^\w.+-]", "_", f"simulated-{stem}.json")
        return Path(self.result_dir or ".") / name
