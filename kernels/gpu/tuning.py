"""Which of a kernel's configurations is the quickest for a shape on the device at hand: measured once, kept on disk.

One small JSON file a kernel and shape, in a folder a device and triton version; written to a temporary file and
renamed, so that a reader sees a whole file or none, and processes that tune the same at the same time leave one of
their answers. What is damaged, foreign or cannot be written costs the measurement again, never an error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from .gemm import Cut

_MAX_FILE_BYTES = 4096


def tuning_folder(device_name: str, triton_version: str) -> Path:
    """Where results are kept: below TANDEM_CACHE, else below XDG_CACHE_HOME or ~/.cache."""
    configured = os.environ.get("TANDEM_CACHE")
    root = Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tandem"
    return root.expanduser() / "tuning" / f"{_slug(device_name)}-triton-{_slug(triton_version)}"


def bucket(m: int, n: int, k: int) -> str:
    """Products that share a result: of the same weights, and of up to the same power of two of rows."""
    return f"m{triton.next_power_of_2(m)}-n{n}-k{k}"


def measure_s(run: Callable[[], None]) -> float:
    """Median seconds of one call on the device, warm; about 10 ms are spent. Must not run while a graph is captured."""
    return float(triton.testing.do_bench(run, warmup=5, rep=10, return_mode="median")) / 1000


class Tuner:
    """Remembers the quickest configuration of each kernel and shape. One thread; one a process and device."""

    def __init__(self, folder: Path, measure: Callable[[Callable[[], None]], float] = measure_s) -> None:
        self._folder = folder
        self._measure = measure
        self._known: dict[tuple[str, str], Cut] = {}

    @classmethod
    def of_device(cls, device: torch.device) -> Tuner:
        """For the GPU at hand."""
        return cls(tuning_folder(torch.cuda.get_device_name(device), triton.__version__))

    def best(self, kernel: str, shape: str, candidates: Sequence[Cut], run: Callable[[Cut], None]) -> Cut:
        """The quickest of `candidates`, which `run` computes with: as known, as read, or as measured now.

        Candidates that fail (too much shared memory, too few registers) are left out. Where all do, the first one is
        returned, so that its error shows to whoever uses it.
        """
        key = kernel, shape
        if key not in self._known:
            path = self._folder / f"{_slug(kernel)}-{_slug(shape)}.json"
            best = _read(path)
            if best is None or best not in candidates:
                best = self._measured(candidates, run)
                _write(path, best)
            self._known[key] = best
        return self._known[key]

    def _measured(self, candidates: Sequence[Cut], run: Callable[[Cut], None]) -> Cut:
        best, least_s = candidates[0], math.inf
        for cut in candidates:
            try:
                taken_s = self._measure(lambda cut=cut: run(cut))  # type: ignore[misc]
            except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, torch.OutOfMemoryError):
                continue
            if taken_s < least_s:
                best, least_s = cut, taken_s
        return best


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"


def _read(path: Path) -> Cut | None:
    """What a file says, if it says anything."""
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(_MAX_FILE_BYTES))
        cut = Cut(**told)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return cut if all(type(value) is int and value > 0 for value in asdict(cut).values()) else None


def _write(path: Path, cut: Cut) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(asdict(cut), file)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
