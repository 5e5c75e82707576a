"""Times what runs on a GPU, and measures what it could reach at most: copy bandwidth and matrix products.

Needs torch and triton only. Times are medians over repetitions, between device events, after a warm-up, of a captured
graph where the call can be captured (else of the call, which then includes what launching costs the host); a buffer
larger than the last-level cache is written between two repetitions, so that inputs come from memory, as in a model.
"""

from __future__ import annotations

import contextlib
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

LATE, LAST = 1, 2
_FLUSHED_BYTES = 256 * 2**20
"""More than the last-level cache of any GPU here (H100: 50 MB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the benchmark: who computes what, and what it must move and compute at least."""

    what: str
    """Operation and shape; the implementations of one shape share it and stand one after another."""
    who: str
    """`tandem`, or the library it is held against."""
    run: Callable[[], object]
    moved_bytes: int
    """Every input read once and every output written once."""
    operations: int = 0
    """Floating-point (or integer) multiplications and additions of the matrix units; 0: bound by memory."""
    note: str = ""
    late: int = 0
    """Its turn among all of its file. `LATE`: what a library compiles at its first use, for a minute at worst. `LAST`:
    what is compiled for this line and few others.
    """
    beside_bytes: int = 0
    """Moved by what this is a small part of: its share of that is told."""


class LeftOutError(Exception):
    """A library cannot be measured at this; says why."""


def library(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """What `make` makes at the first call; where it, or that call, fails, each call raises LeftOutError: another's
    refusal costs its own line, not ours.
    """
    made: list[Callable[[], object]] = []
    reasons: list[str] = []

    def run() -> object:
        if reasons:
            raise LeftOutError(reasons[0])
        if made:
            return made[0]()
        try:
            theirs = make()
            result = theirs()
        except Exception as error:  # whatever a library finds wrong, or is found wrong with it
            told = (str(error).strip().splitlines() or ["no message"])[0][:100]
            reasons.append(f"{type(error).__name__}: {told}")
            raise LeftOutError(reasons[0]) from None
        made.append(theirs)
        return result

    return run


def compiled(run: Callable[[], object]) -> Callable[[], object]:
    """What torch makes of plain operations: the rival where no library has a kernel."""

    def make() -> Callable[[], object]:
        torch.compiler.reset()  # of one line of code it compiles a few shapes only
        theirs: Callable[[], object] = torch.compile(run, dynamic=False, fullgraph=True)
        return theirs

    return library(make)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a table of its own."""

    title: str
    """What the table's lines share: they stand one after another."""
    heads: tuple[str, ...]
    cells: tuple[str, ...]


Tell = Callable[[Line], None]
"""Hears of a line as soon as it is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What this device reaches, measured."""

    copy_bytes_per_s: float
    """Read plus written, device to device."""
    products_per_s: float
    """Floating-point operations of a large bf16 matrix product, a second."""


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a graph's replay, or itself where it waits for the device or cannot be captured for another reason. What
    fails leaves the stream, the current stream and the allocator as they were: `torch.cuda.graph` would not.
    """
    if _waits(run):
        return run
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    complete = True
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        except RuntimeError:
            complete = False
        finally:
            complete = _ended(graph, stream, pool) and complete
    torch.cuda.synchronize()
    return graph.replay if complete else run


def _waits(run: Callable[[], object]) -> bool:
    """Whether a call waits for the device: it would break a capture. Or fails anyway, for want of memory."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _ended(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> bool:
    """Ends a capture; False: it was broken, and the allocator, which has not heard of it, has been told."""
    try:
        graph.capture_end()
    except RuntimeError:
        for tell in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(RuntimeError, AttributeError):
                getattr(torch._C, tell)(stream.device_index, pool)
        return False
    return True


def time_s(run: Callable[[], object], repetitions: int = 20, warm_up: int = 3) -> float:
    """Median seconds of one call on the device; without a GPU, of one call on the host, for a dry run."""
    if not torch.cuda.is_available():
        return _host_time_s(run)
    for _ in range(warm_up):
        run()
    run = _captured(run)
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    taken = []
    for _ in range(repetitions):
        flushed.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken)


def _host_time_s(run: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    run()
    return time.perf_counter() - begin_s


def measure_bounds() -> Bounds:
    """A copy of 2 GiB and a product of 8192 x 8192 matrices of random numbers (zeros would run faster)."""
    return Bounds(copy_bytes_per_s=_copied_per_s(), products_per_s=_computed_per_s())


def _copied_per_s() -> float:
    source, target = torch.randn(2, 2**29, device="cuda")
    return 2 * source.nbytes / time_s(lambda: target.copy_(source))


def _computed_per_s() -> float:
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / time_s(lambda: a @ b)


def machine() -> str:
    """Device and versions, for the head of a report."""
    if not torch.cuda.is_available():
        return f"no GPU, torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    driver = torch.version.cuda
    return (
        f"{torch.cuda.get_device_name()}, CUDA {driver}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}"
    )


HEADS = ("what", "who", "µs", "GB/s", "of copy", "TFLOP/s", "of peak", "against tandem", "")


def rows(cases: Iterable[Case], bounds: Bounds, ours: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """One row a case; `against tandem`: how many times as long as ours this one takes at the same thing. `ours`: our
    seconds by `what`, known or found here.
    """
    for case in cases:
        try:
            taken_s = time_s(case.run)
        except torch.OutOfMemoryError:
            yield (case.what, case.who, "out of memory", *[""] * 6)
            continue
        except LeftOutError as error:
            yield (case.what, case.who, "left out", *[""] * 5, str(error))
            continue
        if case.who == "tandem":
            ours[case.what] = taken_s
        moved, computed = case.moved_bytes / taken_s, case.operations / taken_s
        ratio = f"{taken_s / ours[case.what]:.2f}x" if case.what in ours else ""
        share = f"{moved / bounds.copy_bytes_per_s:.0%}"
        arithmetic = (f"{computed / 1e12:.0f}", f"{computed / bounds.products_per_s:.0%}") if computed else ("", "")
        figures = (f"{taken_s * 1e6:.1f}", f"{moved / 1e9:.0f}", share, *arithmetic, ratio)
        yield (case.what, case.who, *figures, _note(case, taken_s, bounds))


def _note(case: Case, taken_s: float, bounds: Bounds) -> str:
    if not case.beside_bytes:
        return case.note
    share = f"{taken_s * bounds.copy_bytes_per_s / case.beside_bytes:.1%} of a decode step"
    return f"{case.note}; {share}" if case.note else share


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    whole = [heads, *lines]
    widths = [max(len(line[column]) for line in whole) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in whole
    )
