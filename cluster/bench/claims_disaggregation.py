"""What disaggregation buys: attainment against rate of pools of prefill and decode workers, and of the same number of
mixed ones, with real processes, a real router and real sockets (DistServe, OSDI '24, §6.2).

Every system gets the same requests at the same times: Poisson arrivals whose rate climbs a staircase, so that a system
comes to each rate from the one below and not from empty (a short run from empty flatters). A request belongs to the
stair on which it arrived. The router refuses nobody, in no system. One run is judged under several promises.

On the paced device time may be stretched: steps, arrivals and promises alike take `time_scale` times as long, and what
is reported is scaled back. A result whose steps ran late, or whose client did, is void and says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .claims_cluster import RunningSystem, StepCount, System
from .datasets import BenchRequest
from .load import run_load
from .options import BenchOptions
from .report import RequestRecord, distortion, summarize
from .run import connect, warm_up
from .sweep import SweepPoint, SweepResult, sweep_run
from .traces import draw_rows, fit_trace, read_trace, trace_requests

MAX_LATE_STEPS = 0.02
"""Share of late steps above which a result is void."""
MAX_REQUESTS = 20_000
HEARTBEAT_S = 0.6
"""After which the router has heard what the workers counted."""
WARMUPS = 4
_WARMUP_SEED = 0x5EED


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """TTFT and TPOT, both to be kept."""

    ttft_s: float
    tpot_s: float

    @property
    def ms(self) -> dict[str, float]:
        """As the reports name them."""
        return {"ttft": self.ttft_s * 1e3, "tpot": self.tpot_s * 1e3}

    def __str__(self) -> str:
        return f"TTFT {self.ttft_s * 1e3:g} ms, TPOT {self.tpot_s * 1e3:g} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Staircase:
    """The load, in the time that is reported. ValueError naming the field."""

    dataset_path: str
    rates: tuple[float, ...]
    """Requests/s to the whole cluster, ascending."""
    stair_s: float
    promises: tuple[Promise, ...]
    time_scale: float = 1.0
    max_model_len: int = 2048
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise ValueError(f"rates: {self.rates} are not allowed; allowed: ascending, above 0")
        for name, low, high in (("stair_s", 1.0, 600.0), ("time_scale", 0.1, 100.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; allowed: {low:g} to {high:g}")
        if sum(self.counts) > MAX_REQUESTS:
            raise ValueError(f"rates: they make {sum(self.counts)} requests; allowed: at most {MAX_REQUESTS}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Requests of each stair."""
        return tuple(max(1, round(rate * self.stair_s)) for rate in self.rates)

    @property
    def stairs(self) -> tuple[int, ...]:
        """For every request, on which stair it comes."""
        return tuple(place for place, count in enumerate(self.counts) for _ in range(count))

    def arrivals_s(self) -> tuple[float, ...]:
        """When each is due on the real clock: a Poisson process, given its count on each stair."""
        draw = np.random.default_rng(self.seed)
        times = [sorted(self.stair_s * (place + draw.random(count))) for place, count in enumerate(self.counts)]
        return tuple(float(time_s) * self.time_scale for stair in times for time_s in stair)

    def requests(self, vocabulary: Sequence[int], *, warmups: int) -> tuple[tuple[BenchRequest, ...], ...]:
        """The warm-ups and the load, with prompts of exactly the trace's lengths. ValueError."""
        fitted = fit_trace(
            read_trace(self.dataset_path),
            max_model_len=self.max_model_len,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
        )
        if not fitted.rows:
            raise ValueError(f"dataset_path: nothing in it fits into a context of {self.max_model_len} tokens")
        rows = [replace(row, block_ids=()) for row in fitted.rows]
        warm = draw_rows(rows, warmups, self.seed ^ _WARMUP_SEED)
        load = draw_rows(rows, sum(self.counts), self.seed)
        return (
            trace_requests(warm, vocabulary, self.seed ^ _WARMUP_SEED),
            trace_requests(load, vocabulary, self.seed),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """One system under every promise, in the staircase's order of promises."""

    system: System
    sweeps: tuple[SweepResult, ...]
    steps: StepCount
    client: tuple[str, ...]
    """What the client itself distorted; empty: nothing."""
    failed: int

    @property
    def void(self) -> str:
        """Why the result says nothing; empty: it does."""
        reasons = list(self.client)
        if self.steps.late_share > MAX_LATE_STEPS:
            reasons.append(f"{self.steps.late} of {self.steps.steps} steps were late")
        if self.failed:
            reasons.append(f"{self.failed} requests failed")
        return "; ".join(reasons)

    def goodput(self, promise: int, target: float = 0.9) -> float:
        """Requests/s per GPU where attainment falls below the target, between two rates by interpolation."""
        return crossing([(p.rate, p.attainment) for p in self.sweeps[promise].points], target) / self.system.gpus


def crossing(points: Sequence[tuple[float, float]], target: float) -> float:
    """The rate at which attainment first falls below `target`, on the line between the two rates around it; the highest
    rate if it never does, 0 if it never is above.
    """
    before: tuple[float, float] | None = None
    for rate, attainment in points:
        if attainment < target:
            if before is None:
                return 0.0
            share = (before[1] - target) / (before[1] - attainment)
            return before[0] + share * (rate - before[0])
        before = (rate, attainment)
    return before[0] if before else 0.0


async def run_system(system: System, load: Staircase, say: Callable[[str], None]) -> SystemResult:
    """Starts the system, sends the load, ends the system. RuntimeError, ServerUnusable, ValueError."""
    with RunningSystem(system) as running:
        options = BenchOptions(
            base_url=running.url, dataset_name="trace", dataset_path=load.dataset_path, temperature=0.0, timeout_s=3600
        )
        async with connect(options) as served:
            warmups, requests = load.requests(served.vocabulary, warmups=WARMUPS * system.workers)
            await warm_up(warmups, served, options)
            say(f"{system.label}: {len(requests)} requests in {load.arrivals_s()[-1]:.0f} s")
            done = await run_load(served.send, requests, load.arrivals_s(), name="claim")
        await asyncio.sleep(HEARTBEAT_S)
        steps = running.steps()
    summary = summarize(done.records, {}, (99.0,), done.stalls_s)
    late = distortion(summary)
    return SystemResult(
        system=system,
        sweeps=tuple(judge(system.label, done.records, load, promise, bool(late)) for promise in load.promises),
        steps=steps,
        client=(late,) if late else (),
        failed=summary.failed,
    )


def judge(
    label: str, records: Sequence[RequestRecord], load: Staircase, promise: Promise, client_late: bool
) -> SweepResult:
    """What the records, in order of arrival, say under one promise; times are scaled back."""
    scaled = {name: value * load.time_scale for name, value in promise.ms.items()}
    points, first = [], 0
    for rate, count in zip(load.rates, load.counts, strict=True):
        own = records[first : first + count]
        first += count
        metrics = {
            name: {key: value / load.time_scale for key, value in values.items()}
            for name, values in summarize(own, scaled, (99.0,)).metrics_ms.items()
        }
        run = sweep_run(
            own,
            scaled,
            metrics,
            seed=load.seed,
            duration_s=load.stair_s,
            ended_early=False,
            client_late=client_late,
        )
        points.append(SweepPoint(rate=rate, runs=(run,)))
    return SweepResult(label=label, target=0.9, promises_ms=promise.ms, points=tuple(points))


def show(results: Sequence[SystemResult], load: Staircase) -> str:
    """A table for each promise: attainment by rate, goodput by GPU, and the ratio to the best that is colocated."""
    lines = []
    for place, promise in enumerate(load.promises):
        best = max((result.goodput(place) for result in results if result.system.mixed), default=0.0)
        lines.append(f"{promise}: attainment, %, by requests/s offered to all workers; goodput at 90 % per GPU")
        rates = "".join(f"{rate:>7g}" for rate in load.rates)
        lines.append(f"{'':<34}{rates}{'goodput':>9}{'ratio':>7}")
        for result in results:
            shares = "".join(f"{100 * point.attainment:>7.1f}" for point in result.sweeps[place].points)
            goodput = result.goodput(place)
            ratio = f"{goodput / best:.2f}x" if best else "-"
            lines.append(f"{result.system.label:<34}{shares}{goodput:>9.2f}{ratio:>7}")
        lines.append("")
    for result in results:
        late = f"{result.steps.late} of {result.steps.steps} steps late"
        lines.append(f"{result.system.label}: {late}" + (f"; VOID: {result.void}" if result.void else ""))
    if load.time_scale != 1.0:
        lines.append(f"time ran {load.time_scale:g} times slower and is scaled back")
    return "\n".join(lines)


def as_json(results: Sequence[SystemResult], load: Staircase, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, in plain values."""
    return {
        **facts,
        "load": asdict(load),
        "systems": [
            {
                "label": result.system.label,
                "workers": result.system.workers,
                "gpus": result.system.gpus,
                "steps": result.steps.steps,
                "late_steps": result.steps.late,
                "void": result.void,
                "goodput_per_gpu": [result.goodput(place) for place in range(len(load.promises))],
                "sweeps": [sweep.as_json() for sweep in result.sweeps],
            }
            for result in results
        ],
    }
