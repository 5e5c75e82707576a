"""Iteration-level against request-level batching: the same scheduler, engine and step times, one switch between them
(`EngineConfig.batching`), in virtual time.

Orca (OSDI '22), §6.2: Poisson arrivals, median end-to-end latency by output token (normalized latency) against
throughput, compared at one latency: twice the normalized latency of an engine with nothing else to do. The paper's
ratio there is 36.9 for GPT-3 175B against FasterTransformer (0.185 against 6.81 requests/s). Request level is searched
over batch sizes and the best is taken, because larger batches answer more and wait longer. It is better here than what
Orca measured in two points: nothing is padded, and with `streamed` answers leave when they are drawn, not with their
batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..latency.profile import StepProfile
from ..workload.arrivals import arrival_times
from ..workload.sweep import RateSearch
from .claims_virtual import EngineShape, Job, Served, VirtualEngine

PAPER_RATIO = 36.9
BOUND_FACTOR = 2.0
BATCH_SIZES = (4, 8, 16, 32, 64)
_RESOLUTION = 0.08
_MAX_POINTS = 14
_START_RATE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingRow:
    """One way of batching at the rate where its median normalized latency reaches the bound."""

    system: str
    max_running: int
    rate: float
    """Requests/s offered, within a resolution of 8 %; 0: not even a tiny rate keeps the bound."""
    normalized_s: float
    """Median at that rate."""
    median_ttft_s: float
    saturated: float
    """Requests/s when all of them wait from the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingResult:
    """The comparison. `rows`: iteration level, then the best of request level with answers by batch and streamed."""

    bound_s: float
    idle_s: float
    """Median normalized latency of one request alone."""
    rows: tuple[BatchingRow, ...]
    complete: bool
    """False: the time was up before every batch size was searched."""

    def ratio(self, index: int) -> float:
        """Throughput of iteration level over that of `rows[index]`, at the bound."""
        return self.rows[0].rate / self.rows[index].rate if self.rows[index].rate else float("inf")


def compare(
    lengths: Sequence[tuple[int, int]],
    profile: StepProfile,
    shape: EngineShape,
    *,
    seed: int = 0,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    time_limit_s: float = 300.0,
    progress: Callable[[str], None] = lambda text: None,
) -> BatchingResult:
    """`lengths`: (prompt, output) tokens of the requests, in order."""
    deadline_s = time.monotonic() + time_limit_s
    idle = [_alone(prompt, output, profile, shape) for prompt, output in lengths[:64]]
    idle_s = statistics.median(idle)
    bound_s = BOUND_FACTOR * idle_s
    progress(f"alone, a request takes {idle_s * 1e3:.1f} ms by output token; the bound is {bound_s * 1e3:.1f} ms")
    iteration = _search("iteration level", _Runs(lengths, profile, replace(shape, batching="iteration"), seed), bound_s)
    progress(_line(iteration))
    found: dict[bool, BatchingRow] = {}
    complete = True
    for size in batch_sizes:
        if found and time.monotonic() > deadline_s:
            complete = False
            break
        runs = _Runs(lengths, profile, replace(shape, batching="request", max_running=size), seed)
        for streamed in (False, True):
            name = "request level, streamed" if streamed else "request level"
            row = _search(name, runs, bound_s, with_batch=not streamed)
            progress(_line(row))
            if streamed not in found or row.rate > found[streamed].rate:
                found[streamed] = row
    rows = (iteration, found[False], found[True])
    return BatchingResult(bound_s=bound_s, idle_s=idle_s, rows=rows, complete=complete)


def run_at(
    lengths: Sequence[tuple[int, int]], rate: float, profile: StepProfile, shape: EngineShape, seed: int
) -> list[Served]:
    """All requests through one engine, arriving as a Poisson process of `rate` (inf: at once)."""
    arrivals = arrival_times(len(lengths), rate, 1.0, seed)
    jobs = [
        Job(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        for arrival_s, (prompt, output) in zip(arrivals, lengths, strict=True)
    ]
    return VirtualEngine(shape, profile).run(jobs)


def show(result: BatchingResult) -> str:
    """The table."""
    lines = [
        f"median latency by output token <= {result.bound_s * 1e3:.1f} ms, twice that of a request alone",
        f"{'batching':<26}{'batch':>6}{'req/s':>8}{'ratio':>7}{'ms/token':>10}{'TTFT ms':>9}{'saturated req/s':>17}",
    ]
    for index, row in enumerate(result.rows):
        ratio = f"{result.ratio(index):.1f}x" if index else ""
        lines.append(
            f"{row.system:<26}{row.max_running:>6}{row.rate:>8.2f}{ratio:>7}{row.normalized_s * 1e3:>10.1f}"
            f"{row.median_ttft_s * 1e3:>9.0f}{row.saturated:>17.2f}"
        )
    lines.append(f"Orca §6.2 reports {PAPER_RATIO:g}x for GPT-3 175B on its own lengths, against FasterTransformer")
    if not result.complete:
        lines.append("the time was up: not every batch size was searched")
    return "\n".join(lines)


def _line(row: BatchingRow) -> str:
    return f"{row.system}, batches of up to {row.max_running}: {row.rate:.2f} requests/s"


def _alone(prompt_tokens: int, output_tokens: int, profile: StepProfile, shape: EngineShape) -> float:
    [served] = run_at([(prompt_tokens, output_tokens)], float("inf"), profile, replace(shape, batching="iteration"), 0)
    return served.normalized_s()


class _Runs:
    """One engine's runs by rate, each made once."""

    def __init__(self, lengths: Sequence[tuple[int, int]], profile: StepProfile, shape: EngineShape, seed: int) -> None:
        self.shape = shape
        self._lengths, self._profile, self._seed = lengths, profile, seed
        self._done: dict[float, list[Served]] = {}

    def at(self, rate: float) -> list[Served]:
        """Whoever was served, in order of their end."""
        if rate not in self._done:
            self._done[rate] = run_at(self._lengths, rate, self._profile, self.shape, self._seed)
        return self._done[rate]


def _search(system: str, runs: _Runs, bound_s: float, *, with_batch: bool = False) -> BatchingRow:
    """The highest rate whose median normalized latency is within the bound."""
    search = RateSearch(start=_START_RATE, resolution=_RESOLUTION, max_points=_MAX_POINTS)
    best_rate, best = 0.0, (float("nan"), float("nan"))
    while (rate := search.next_rate()) is not None:
        served = runs.at(rate)
        normalized_s = statistics.median(one.normalized_s(with_batch=with_batch) for one in served)
        kept = normalized_s <= bound_s
        search.add(rate, kept)
        if kept and rate > best_rate:
            ends = [one.batch_end_s if with_batch else one.first_token_s for one in served]
            waits = [end_s - one.job.arrival_s for end_s, one in zip(ends, served, strict=True)]
            best_rate, best = rate, (normalized_s, statistics.median(waits))
    saturated = runs.at(float("inf"))
    return BatchingRow(
        system=system,
        max_running=runs.shape.max_running,
        rate=best_rate,
        normalized_s=best[0],
        median_ttft_s=best[1],
        saturated=len(saturated) / max(one.last_token_s for one in saturated),
    )
