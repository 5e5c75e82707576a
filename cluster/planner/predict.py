"""What clients would see of the best plans: latencies and attainment at one rate, simulated to the end.

A search only asks whether a rate is kept, and stops a run as soon as it knows; what is reported, and what a running
cluster is later compared with, is run in full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..sim.cluster import SimCluster
from ..sim.request import Outcome
from .crew import Means
from .outlook import Outlook
from .result import Candidate, Evaluation, Prediction, Quantiles
from .setting import Setting
from .trial import Saw, cluster_of, saw_of

SEEDS = 2
"""The first ones: quantiles move less between seeds than goodput does."""


@dataclass(frozen=True, slots=True)
class Watch:
    """A `crew.Task`: all requests of one run, to its end."""

    candidate: Candidate
    rate: float
    seed: int

    def do(self, means: Means) -> list[Saw] | None:
        """None: it got too late."""
        setting = means.setting
        requests = setting.lasting_requests(self.rate / self.candidate.cells)
        spec, workload = cluster_of(setting, self.candidate, self.rate, self.seed, requests)
        late = False

        def look(now_s: float, outcomes: Sequence[Outcome]) -> bool:
            nonlocal late
            late = means.late()
            return late

        outcomes = SimCluster(spec).run(workload, decided=look, decided_period_s=max(workload[-1].arrival_s / 32, 1e-3))
        return None if late else [saw_of(setting, outcome) for outcome in outcomes]


def rate_of(one: Evaluation, target_rate: float | None) -> float:
    """At which it is predicted: the one that was asked for, where it is kept, else goodput."""
    return target_rate if target_rate is not None and one.keeps_target_rate else one.goodput.mean


def predict(setting: Setting, candidate: Candidate, rate: float) -> Prediction:
    """Under the first seeds, all requests together, in this process. ValueError where the candidate cannot run."""
    means = Means(Outlook(setting), lambda: False)
    runs = [Watch(candidate, rate, seed).do(means) or [] for seed in setting.seeds[:SEEDS]]
    return prediction_of(setting, [saw for run in runs for saw in settled(run)], rate)


def settled(run: Sequence[Saw]) -> Sequence[Saw]:
    """The second half of a run, which begins with empty workers: near goodput their batches grow for long."""
    return run[len(run) // 2 :]


def prediction_of(setting: Setting, saw: Sequence[Saw], rate: float) -> Prediction:
    """Of requests that came at `rate`. Classes without a promise are in the latencies only."""
    asked, kept = Counter[str](), Counter[str]()
    for one in saw:
        promise = setting.promises[one.slo_class]
        if promise.ttft_s is not None or promise.tpot_s is not None:
            asked[one.slo_class] += 1
            kept[one.slo_class] += one.kept
    ttft = _quantiles([one.ttft_s for one in saw])
    assert ttft is not None  # everybody is answered in virtual time
    return Prediction(
        rate=rate,
        attainment=sum(kept.values()) / sum(asked.values()),
        by_class={name: kept[name] / asked[name] for name in setting.promises if asked[name]},
        ttft=ttft,
        tpot=_quantiles([one.tpot_s for one in saw]),
    )


def _quantiles(values: Sequence[float | None]) -> Quantiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    p50, p90, p99 = (float(value) for value in np.quantile(known, (0.5, 0.9, 0.99)))
    return Quantiles(p50=p50, p90=p90, p99=p99)
