"""What clients would see of the best plans: latencies and attainment at one rate, simulated to the end.

A search only asks whether a rate is kept, and stops a run as soon as it knows; what is reported, and what a running
cluster is later compared with, is run in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..sim.cluster import SimCluster
from ..sim.request import Outcome
from .result import Candidate, Evaluation, PlanResult, Prediction, Quantiles
from .setting import Setting
from .trial import cluster_of

SEEDS = 2
"""The first ones: quantiles move less between seeds than goodput does."""


def with_predictions(
    setting: Setting, result: PlanResult, progress: Callable[[str, float], None] = lambda what, share: None
) -> PlanResult:
    """The same result, its best disaggregated and its best colocated plan with what clients would see of them."""
    best = [one for one in (result.disaggregated, result.colocated) if one is not None and one.goodput.mean > 0.0]
    found: dict[Candidate, Evaluation] = {}
    for number, one in enumerate(best):
        progress("latencies", number / len(best))
        found[one.candidate] = replace(one, prediction=predict(setting, one.candidate, rate_of(one, result)))
    progress("latencies", 1.0)

    def better(one: Evaluation | None) -> Evaluation | None:
        return None if one is None else found.get(one.candidate, one)

    return replace(
        result,
        disaggregated=better(result.disaggregated),
        colocated=better(result.colocated),
        explored=tuple(found.get(one.candidate, one) for one in result.explored),
    )


def rate_of(one: Evaluation, result: PlanResult) -> float:
    """At which it is predicted: the one that was asked for, where it is kept, else goodput."""
    kept = result.target_rate is not None and one.keeps_target_rate
    return result.target_rate if kept and result.target_rate is not None else one.goodput.mean


def predict(setting: Setting, candidate: Candidate, rate: float) -> Prediction:
    """Under the first seeds, all requests together. ValueError where the candidate cannot run."""
    requests = setting.run_requests(rate / candidate.cells)
    outcomes: list[Outcome] = []
    for seed in setting.seeds[:SEEDS]:
        spec, workload = cluster_of(setting, candidate, rate, seed, requests)
        outcomes += SimCluster(spec).run(workload)
    return prediction_of(setting, outcomes, rate)


def prediction_of(setting: Setting, outcomes: Sequence[Outcome], rate: float) -> Prediction:
    """What these requests, which came at `rate`, saw. Classes without a promise are in the latencies only."""
    asked, kept = Counter[str](), Counter[str]()
    for outcome in outcomes:
        promise = setting.promises[outcome.asked.slo_class]
        if promise.ttft_s is not None or promise.tpot_s is not None:
            asked[outcome.asked.slo_class] += 1
            kept[outcome.asked.slo_class] += outcome.attains(promise.slo)
    ttft = _quantiles([outcome.ttft_s for outcome in outcomes])
    assert ttft is not None  # everybody is answered in virtual time
    return Prediction(
        rate=rate,
        attainment=sum(kept.values()) / sum(asked.values()),
        by_class={name: kept[name] / asked[name] for name in setting.promises if asked[name]},
        ttft=ttft,
        tpot=_quantiles([outcome.tpot_s for outcome in outcomes]),
    )


def _quantiles(values: Sequence[float | None]) -> Quantiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    p50, p90, p99 = (float(value) for value in np.quantile(known, (0.5, 0.9, 0.99)))
    return Quantiles(p50=p50, p90=p90, p99=p99)
