"""Runs a sweep: points of several seeds each, at the rates that `RateSearch` or the user names."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from ..workload.report import distortion
from ..workload.sweep import RateSearch, SweepPoint, SweepResult, Watch, sweep_run
from .interrupt import Stop, stops
from .options import BenchOptions
from .run import OnDone, Served, connect, run_once

MIN_REQUESTS = 20
MAX_REQUESTS = 20_000
"""Of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """How to look for the highest rate. Raises ValueError."""

    target: float = 0.9
    """Share of requests that must keep every promise."""
    seeds: int = 3
    duration_s: float = 60.0
    """How long each run sends: an overload must have the time to show."""
    start_rate: float = 1.0
    rates: tuple[float, ...] = ()
    """Measure these, each to its end, and search for none."""
    resolution: float = 0.05
    max_points: int = 12
    timeout_s: float = 3600.0
    """After this no further run starts."""

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"attainment_target: {self.target} is not allowed; allowed: above 0, at most 1")
        if not 1 <= self.seeds <= 100:
            raise ValueError(f"sweep_seeds: {self.seeds} is not allowed; allowed: 1 to 100")
        for name in ("duration_s", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                field = f"sweep_{name.removesuffix('_s')}"
                raise ValueError(f"{field}: {getattr(self, name)} is not allowed; allowed: seconds above 0")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise ValueError(f"sweep_rates: {rate} is not allowed; allowed: requests per second above 0")
        RateSearch(start=self.start_rate, resolution=self.resolution, max_points=self.max_points)


def check_sweep(options: BenchOptions) -> None:
    """Raises ValueError where no sweep can be made of them."""
    if not options.goodput_ms:
        raise ValueError("goodput: is missing; allowed with sweep: e.g. ttft:1000 tpot:100")
    if options.ramp_up_strategy is not None or options.max_concurrency is not None:
        given = "max_concurrency" if options.ramp_up_strategy is None else "ramp_up_strategy"
        raise ValueError(f"{given}: is not allowed with sweep: its load is open, at one rate after another")


OnPoint = Callable[[SweepPoint], None]


async def run_sweep(
    options: BenchOptions, plan: SweepPlan, on_point: OnPoint | None = None, on_done: OnDone | None = None
) -> SweepResult:
    """Measures points until the knee is found, a bound is met or a signal comes: the point under way then is left out.
    Raises ServerUnusable, ValueError.

    Every run has a seed of its own, counted up from the options': a prompt sent twice would measure the prefix cache.
    """
    check_sweep(options)
    points: list[SweepPoint] = []
    search = RateSearch(start=plan.start_rate, resolution=plan.resolution, max_points=plan.max_points)
    async with connect(options) as served:
        with stops() as stop:
            async with aclosing(_points(options, plan, search, served, on_done, stop)) as measured:
                async for point in measured:
                    points.append(point)
                    if on_point is not None:
                        on_point(point)
    return SweepResult(
        label=options.label or served.model,
        target=plan.target,
        promises_ms=options.goodput_ms,
        points=tuple(sorted(points, key=lambda point: point.rate)),
        complete=len(points) == len(plan.rates) if plan.rates else search.settled,
        exit_code=stop.exit_code if stop.is_set() else 0,
        facts={
            "backend": options.chosen_backend,
            "base_url": options.url,
            "model_id": served.model,
            "dataset_name": options.dataset_name,
            "dataset_path": options.dataset_path,
            "seed": options.seed,
            "sweep_duration": plan.duration_s,
            **dict(options.metadata),
        },
    )


async def _points(
    options: BenchOptions, plan: SweepPlan, search: RateSearch, served: Served, on_done: OnDone | None, stop: Stop
) -> AsyncGenerator[SweepPoint]:
    end_s = time.monotonic() + plan.timeout_s
    seed = options.seed
    named = list(plan.rates)
    while (rate := (named.pop(0) if named else None) if plan.rates else search.next_rate()) is not None:
        count = min(max(math.ceil(rate * plan.duration_s), MIN_REQUESTS), MAX_REQUESTS)
        watch = None if plan.rates else Watch(options.goodput_ms, (1 - plan.target) * count * plan.seeds)
        runs = []
        for _ in range(plan.seeds):
            if time.monotonic() > end_s:
                return  # a point of fewer seeds than the others would be none
            result = await run_once(
                replace(options, num_prompts=count, request_rate=rate, seed=seed), served, on_done, watch, stop
            )
            if result.interrupted:
                return
            late = bool(distortion(result.summary))
            runs.append(
                sweep_run(
                    result.records,
                    options.goodput_ms,
                    result.summary.metrics_ms,
                    seed=seed,
                    duration_s=result.summary.duration_s,
                    ended_early=result.ended_early,
                    overdue=result.overdue,
                    client_late=late,
                )
            )
            seed += 1
            if result.ended_early:
                break
        point = SweepPoint(rate=rate, runs=tuple(runs))
        if not plan.rates:
            search.add(rate, point.keeps(plan.target))
        yield point
