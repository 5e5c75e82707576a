"""The GPU kernels and the engine against the libraries people use and the device's own bounds, on the GPU at hand.

Each `bench_*.py` beside this file has one or both of

- `cases(device) -> Iterator[Callable[[], list[Case]]]`: what makes the implementations of one thing, ours first. They
  are made only when their turn comes, so that one shape's memory is free before the next one's, and held against torch.
  Those that are `late` are made anew when all else of the file has been measured;
- `lines(device, bounds) -> Iterator[Callable[[Tell], None]]`: what measures something in another way, and tells lines.

What is measured is told at once. What fails is told and the next one goes on, unless the device itself is beyond use.
Libraries that are not installed are left out. `make bench-gpu` runs every file in a process of its own (`run.py`).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Report:
    """Prints what is measured, and keeps it in a file of JSON lines as it comes."""

    def __init__(self, name: str, path: Path | None) -> None:
        self.name = name
        self.failures = 0
        self._path = path
        self._title = ""

    def line(self, title: str, heads: tuple[str, ...], cells: tuple[str, ...]) -> None:
        """One measured line of a table."""
        if title != self._title:
            print(f"\n{title}\n{' | '.join(heads)}")
            self._title = title
        print(" | ".join(cells), flush=True)
        self._keep({"title": title, "heads": heads, "cells": cells})

    def failure(self, error: BaseException) -> None:
        """One thing that could not be measured."""
        self.failures += 1
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        print(f"{self.name}: FAILED at {Path(last.filename).name}:{last.lineno}: {told}", flush=True)
        self._keep({"failure": f"{Path(last.filename).name}:{last.lineno}: {told[:1000]}"})

    def left_out(self) -> None:
        """There was no time for the rest."""
        print(f"{self.name}: out of time, the rest is left out")
        self._keep({"cut": "out of time, the rest is left out"})

    def _keep(self, entry: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"file": self.name, **entry}) + "\n")


def steps(module: Any, name: str, device: Any, bounds: Any, report: Report) -> Iterator[Callable[[], None]]:
    """What a file has to measure, one thing at a time."""
    import measure

    ours: dict[str, float] = {}
    later: dict[int, list[Callable[[], list[measure.Case]]]] = {}

    def measured(make: Callable[[], list[measure.Case]], late: int) -> None:
        made = make()
        for turn in {case.late for case in made} if not late else ():
            later.setdefault(turn, []).append(make)
        for cells in measure.rows((case for case in made if case.late == late), bounds, ours):
            report.line(name, measure.HEADS, cells)

    if hasattr(module, "cases"):
        for make in module.cases(device):
            yield partial(measured, make, 0)
    if hasattr(module, "lines"):
        for step in module.lines(device, bounds):
            yield partial(step, lambda line: report.line(line.title, line.heads, line.cells))
    for turn in sorted(set(later) - {0}):
        for make in later[turn]:
            yield partial(measured, make, turn)


def run_file(module: Any, name: str, device: Any, bounds: Any, report: Report, until_s: float) -> None:
    """Measures what one file has, until a time."""
    import torch

    pending = steps(module, name, device, bounds, report)
    while True:
        try:
            step = next(pending)
        except StopIteration:
            return
        except Exception as error:  # whatever a benchmark finds wrong: told, and other files go on
            report.failure(error)
            return
        if time.monotonic() > until_s:
            report.left_out()
            return
        try:
            step()
        except Exception as error:  # likewise; the next thing is measured
            report.failure(error)
        gc.collect()  # a failure's frames, and other circles, hold memory of the device
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:  # a fault on the device stays: nothing more can be measured by this process
                report.failure(error)
                return


def bounds_of(path: Path | None) -> Any:
    """What the device reaches: as another process measured it, or as measured now."""
    import measure

    if path is not None and path.exists():
        return measure.Bounds(**json.loads(path.read_text()))
    bounds = measure.measure_bounds()
    if path is not None:
        path.write_text(json.dumps(asdict(bounds)))
    return bounds


def tune(names: list[str], until_s: float) -> None:
    """Times other tilings, where a file has them."""
    import torch

    for name in names:
        for line in getattr(importlib.import_module(f"bench_{name}"), "tune", lambda device: iter(()))(
            torch.device("cuda")
        ):
            print(line, flush=True)
            if time.monotonic() > until_s:
                return


def main() -> int:
    """The command. Returns its exit status: 0 also where there is no GPU, and nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "only", nargs="*", help="files to run: attention for bench_attention.py; all of them by default"
    )
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing new after this long")
    parser.add_argument("--tune", action="store_true", help="time other tilings instead, where a file has them")
    parser.add_argument("--json", type=Path, help="append what is measured to this file, a line each")
    parser.add_argument("--bounds", type=Path, help="the device's bounds: read from here, or measured and written")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the files are")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: everything once, on the host")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print("no GPU here: nothing measured")
        return 0
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # ahead of triton's first import
    sys.path[:0] = [str(HERE), str(options.folder)]
    import measure

    until_s = time.monotonic() + 60 * options.minutes
    names = options.only or sorted(path.stem.removeprefix("bench_") for path in options.folder.glob("bench_*.py"))
    if options.tune:
        tune(names, until_s)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(measure.machine())
    bounds = measure.Bounds(copy_bytes_per_s=1e9, products_per_s=1e9)
    if device.type == "cuda":
        bounds = bounds_of(options.bounds)
        print(
            f"copy {bounds.copy_bytes_per_s / 1e9:.0f} GB/s (read + written), "
            f"bf16 product {bounds.products_per_s / 1e12:.0f} TFLOP/s"
        )
    failures = 0
    for name in names:
        report = Report(name, options.json)
        try:
            module = importlib.import_module(f"bench_{name}")
        except Exception as error:  # what it needs is not installed, or worse: told, and other files go on
            report.failure(error)
        else:
            run_file(module, name, device, bounds, report, until_s)
        failures += report.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
