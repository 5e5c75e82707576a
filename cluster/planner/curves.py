"""Attainment against rate of the alternatives, for the report's picture.

A search runs as few rates as it needs and ends a run as soon as the answer is clear; a curve wants rates from light
load to overload, each run to its end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

from ..sim.cluster import SimCluster
from .crew import Crew, Means
from .result import Candidate, Evaluation, PlanResult, RatePoint
from .setting import Setting
from .show import alternatives
from .trial import cluster_of

SHARES = (0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""Of goodput: the rates."""
SEEDS = 2


@dataclass(frozen=True, slots=True)
class Load:
    """A `crew.Task`: what is run for one point."""

    candidate: Candidate
    rate: float
    seed: int

    def do(self, means: Means) -> RatePoint:
        """One run, to its end. ValueError where the candidate cannot run."""
        return point_at(means.setting, self)


def with_curves(
    setting: Setting,
    result: PlanResult,
    *,
    processes: int,
    time_limit_s: float,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> PlanResult:
    """The same result; the best plans and the next of their kind have points over all rates, as far as time allows."""
    loads = [
        Load(one.candidate, one.goodput.mean * share, seed)
        for seed in result.seeds[:SEEDS]
        for one in alternatives(result)
        for share in SHARES
    ]
    points: dict[Candidate, list[RatePoint]] = {}
    with Crew(setting, processes, time.monotonic() + time_limit_s) as crew:
        done = count(1)
        found = crew.do(loads, lambda place, point: progress("attainment against rate", next(done) / len(loads)))
    for load, point in zip(loads, found, strict=True):
        if point is not None:
            points.setdefault(load.candidate, []).append(point)

    def longer(one: Evaluation) -> Evaluation:
        found = points.get(one.candidate, [])
        whole = len(found) // len(SHARES) * len(SHARES)  # a seed that time cut short would bend the mean
        return replace(one, points=tuple(found[:whole])) if whole else one

    return replace(
        result,
        disaggregated=None if result.disaggregated is None else longer(result.disaggregated),
        colocated=None if result.colocated is None else longer(result.colocated),
        explored=tuple(longer(one) for one in result.explored),
    )


def point_at(setting: Setting, load: Load) -> RatePoint:
    """One run, to its end. ValueError where the candidate cannot run."""
    requests = setting.lasting_requests(load.rate / load.candidate.cells)
    spec, workload = cluster_of(setting, load.candidate, load.rate, load.seed, requests)
    asked, kept = Counter[str](), Counter[str]()
    late: list[bool] = []
    for place, outcome in enumerate(SimCluster(spec).run(workload)):
        name = outcome.asked.slo_class
        attained = outcome.attains(setting.promises[name].slo)
        asked[name] += 1
        kept[name] += attained
        if place >= len(workload) // 2:
            late.append(attained)
    return RatePoint(
        rate=load.rate,
        seed=load.seed,
        attainment=min(kept[name] / count for name, count in asked.items()),
        late_attainment=sum(late) / len(late),
        requests=len(workload),
    )
