"""The highest rate that a cluster in virtual time bears: points of several seeds each, the same seeds at every rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..config_schema import ConfigError
from ..sim.cluster import SimCluster
from ..sim.record import ended, record
from ..sim.request import Outcome
from ..types import SLO
from ..workload.report import summarize
from ..workload.sweep import RateSearch, SweepPoint, SweepResult, SweepRun
from .simulated import LOOKS, OnProgress, Simulation, promises_ms
from .sweep_load import MAX_REQUESTS, MIN_REQUESTS, SweepPlan

_NOT_A_SWEEPS = ("num_prompts", "request_rate", "max_concurrency")


def sweep(
    simulation: Simulation,
    plan: SweepPlan,
    *,
    label: str = "",
    on_point: Callable[[SweepPoint], None] | None = None,
    on_progress: OnProgress | None = None,
) -> SweepResult:
    """Simulates points until the knee is found, a bound is met or it is stopped: the point under way then is left out.
    Of several classes a run counts as that which kept its promises least.
    """
    if not simulation.promised:
        raise ConfigError("goodput", None, "with sweep: e.g. ttft:1000 tpot:100, or slo_classes of the workload")
    search = RateSearch(start=plan.start_rate, resolution=plan.resolution, max_points=plan.max_points)
    named, points = list(plan.rates), []
    stopped = False
    while (rate := (named.pop(0) if named else None) if plan.rates else search.next_rate()) is not None:
        point = _point(simulation, rate, plan, on_progress)
        if point is None:
            stopped = True
            break
        points.append(point)
        if not plan.rates:
            search.add(rate, point.keeps(plan.target))
        if on_point is not None:
            on_point(point)
    facts = {name: value for name, value in simulation.facts(0).items() if name not in _NOT_A_SWEEPS}
    return SweepResult(
        label=label or simulation.device.facts.name,
        target=plan.target,
        promises_ms=promises_ms(simulation.promises),
        points=tuple(sorted(points, key=lambda point: point.rate)),
        complete=not stopped and (not named if plan.rates else search.settled),
        exit_code=130 if stopped else 0,
        facts=facts | {"sweep_duration": plan.duration_s},
    )


def _point(simulation: Simulation, rate: float, plan: SweepPlan, on_progress: OnProgress | None) -> SweepPoint | None:
    """None: it was stopped."""
    count = min(max(math.ceil(rate * plan.duration_s), MIN_REQUESTS), MAX_REQUESTS)
    forgiven = math.inf if plan.rates else (1.0 - plan.target) * count * plan.seeds
    watch = _Watch(simulation.promises, forgiven, on_progress)
    runs: list[SweepRun] = []
    first = simulation.scenario.seed
    for seed in range(first, first + plan.seeds):
        rows = simulation.workload.draw(rate=rate, seconds=None, num_requests=count, seed=seed)
        period_s = max(rows[-1].arrival_s, 1.0) / LOOKS
        cluster = SimCluster(simulation.spec)
        outcomes = cluster.run(simulation.asked_of(rows), decided=watch.look, decided_period_s=period_s)
        if watch.stopped:
            return None
        runs.append(_judge(outcomes, simulation.promises, seed, cluster.timeline.now_s() if watch.lost else None))
        if watch.lost:
            break
        watch.settle(outcomes)
    return SweepPoint(rate=rate, runs=tuple(runs))


def _judge(
    outcomes: Sequence[Outcome], promises: Mapping[str, SLO], seed: int, ended_s: float | None = None
) -> SweepRun:
    """Of several classes, the one that kept its promises least; of a run that was ended early, at `ended_s`, what was
    decided by then.
    """
    judged = [one for one in outcomes if ended_s is None or ended(one) or _missed(one, promises, ended_s)]
    groups = [[one for one in judged if one.asked.slo_class == name] for name in promises]
    group = min((one for one in groups if one), key=lambda one: sum(_kept(one, promises)) / len(one))
    kept = _kept(group, promises)
    late = kept[len(kept) // 2 :]
    summary = summarize([record(one) for one in judged], {}, (99.0,))
    return SweepRun(
        seed=seed,
        requests=len(kept),
        attained=sum(kept),
        late_requests=len(late),
        late_attained=sum(late),
        duration_s=summary.duration_s,
        median_ttft_ms=summary.metrics_ms["ttft"]["median"],
        p99_ttft_ms=summary.metrics_ms["ttft"]["p99"],
        median_tpot_ms=summary.metrics_ms["tpot"]["median"],
        p99_tpot_ms=summary.metrics_ms["tpot"]["p99"],
        p99_lateness_ms=0.0,
        failed=sum(not one.done for one in judged),
        ended_early=ended_s is not None,
    )


class _Watch:
    """Looks at a run now and then: ends it when it is told to stop, or when its point is lost, because more requests
    have missed than the target forgives all its runs together.
    """

    def __init__(self, promises: Mapping[str, SLO], forgiven: float, on_progress: OnProgress | None) -> None:
        self._promises = promises
        self._forgiven = forgiven
        self._on_progress = on_progress
        self._before = 0
        """Misses of the runs before."""
        self.lost = False
        self.stopped = False

    def look(self, now_s: float, outcomes: Sequence[Outcome]) -> bool:
        """See `SimCluster.run`."""
        if self._on_progress is not None:
            self.stopped = self._on_progress(now_s, sum(map(ended, outcomes)), len(outcomes))
        missed = sum(_missed(one, self._promises, now_s) for one in outcomes if one.asked.arrival_s <= now_s)
        self.lost = self._before + missed > self._forgiven
        return self.stopped or self.lost

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """A run has come to its end."""
        self._before += sum(_missed(one, self._promises) for one in outcomes)


def _missed(outcome: Outcome, promises: Mapping[str, SLO], now_s: float = math.inf) -> bool:
    """Whether by `now_s` it has missed its promises for sure."""
    slo = promises[outcome.asked.slo_class]
    if ended(outcome):
        return not outcome.attains(slo)
    ttft_s = now_s - outcome.asked.arrival_s if outcome.ttft_s is None else outcome.ttft_s
    return slo.ttft_s is not None and ttft_s > slo.ttft_s


def _kept(outcomes: Sequence[Outcome], promises: Mapping[str, SLO]) -> list[bool]:
    return [one.attains(promises[one.asked.slo_class]) for one in outcomes]
