"""From what was simulated to what is said of a candidate. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from .crew import Found
from .goodput import interval
from .result import Binding, Candidate, Evaluation, Fate, Interval, Marginal, RatePoint
from .trial import Trial

NOTHING = Interval(mean=0.0, low=0.0, high=0.0)


def evaluation(
    candidate: Candidate,
    founds: Sequence[Found],
    *,
    bound: float,
    estimate: float,
    target: float,
    target_rate: float | None,
    seeds: int,
) -> Evaluation:
    """Of one candidate, of which `founds` are by seed; `seeds`: how many make it a whole answer."""
    whole = [found for found in founds if found.complete]
    values = [min(found.goodput, bound) for found in whole or founds]  # a run that is short flatters
    goodput = interval(values)
    above = [_nearest_above(found, target) for found in founds if found.trials]
    return Evaluation(
        candidate=candidate,
        fate=Fate.SIMULATED if len(whole) >= seeds else Fate.SCREENED,
        decided=len(whole) == len(founds),
        why="" if goodput.mean > 0.0 else "no rate that was tried keeps the promises of enough requests",
        bound=bound,
        estimate=estimate,
        goodput=Interval(mean=goodput.mean, low=max(0.0, goodput.low), high=goodput.high),
        seeds=tuple(values),
        points=tuple(_point(trial) for found in founds for trial in sorted(found.trials, key=lambda one: one.rate)),
        binding=binding(above),
        piles_up=2 * sum(trial.piles_up for trial in above) > len(above),
        keeps_target_rate=None if target_rate is None else goodput.mean >= target_rate,
        simulated_requests=sum(found.requests for found in founds),
        simulated_s=sum(found.cpu_s for found in founds),
    )


def _point(trial: Trial) -> RatePoint:
    return RatePoint(
        rate=trial.rate,
        seed=trial.seed,
        attainment=trial.attainment,
        late_attainment=trial.late_attainment,
        requests=trial.requests,
        decided_early=trial.decided_early,
    )


def _nearest_above(found: Found, target: float) -> Trial:
    """The run at the lowest rate that was not kept; where none was run, at the highest: what breaks there breaks more
    above.
    """
    failed = [trial for trial in found.trials if trial.score < target]
    return min(failed, key=lambda trial: trial.rate) if failed else max(found.trials, key=lambda trial: trial.rate)


def binding(trials: Sequence[Trial]) -> Binding | None:
    """The promise that is broken most in these runs; None: none is."""
    misses = Counter[tuple[str, str]]()
    for trial in trials:
        misses.update(trial.misses)
    if not misses:
        return None
    (promise, slo_class), count = max(sorted(misses.items()), key=lambda item: item[1])
    return Binding(promise=promise, slo_class=slo_class, share=count / sum(misses.values()))


def difference(one: Evaluation, other: Evaluation) -> Interval:
    """Goodput a GPU of one less that of the other, paired by seed: both saw the same requests."""
    pairs = zip(one.seeds, other.seeds, strict=False)
    return interval([mine / one.candidate.gpus - theirs / other.candidate.gpus for mine, theirs in pairs])


def marginal(more: Candidate, found: Found, base: Evaluation, without: float) -> Marginal:
    """`more` is `base`'s candidate with a worker more; `without`: goodput of `base`."""
    grown = next(
        pool for pool, before in zip(more.pools, base.candidate.pools, strict=True) if pool.count > before.count
    )
    return Marginal(
        role=grown.role,
        gpus=more.gpus - base.candidate.gpus,
        goodput=found.goodput,
        gain=found.goodput - without,
    )


def worth(candidate: Candidate, goodput: float, target_rate: float | None) -> tuple[float, ...]:
    """More is better. Without a rate that is wanted: goodput for each GPU. With one: that it is kept, then fewer GPUs,
    then more goodput; where it is not kept, more goodput.
    """
    if not math.isfinite(goodput) or goodput <= 0.0:
        return (0.0, 0.0, 0.0)
    if target_rate is None:
        return (1.0, goodput / candidate.gpus, goodput)
    if goodput >= target_rate:
        return (2.0, -float(candidate.gpus), goodput)
    return (1.0, goodput, -float(candidate.gpus))
