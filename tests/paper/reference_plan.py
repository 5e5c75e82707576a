"""The planner's quick search against a slow one: `python tests/paper/reference_plan.py PROBLEM [SEEDS] [REQUESTS]`.

The quick search prunes by estimates and simulates few, short runs. Here the best placements of both sides by its
estimates, and what it chose, are simulated under other seeds, each by plain bisection to 2 %, with runs several times
as long (short runs flatter). Printed: goodput of each with its 95 % interval, and what the quick search said.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tandem.cluster.planner.goodput import interval
from tandem.cluster.planner.place import why_not
from tandem.cluster.planner.problem import load_problem
from tandem.cluster.planner.result import Candidate, Evaluation, PlanResult
from tandem.cluster.planner.search import plan
from tandem.cluster.planner.setting import Setting, setting_of
from tandem.cluster.planner.trial import run_candidate

FIRST_SEED = 1000
WIDTH = 1.02
OF_A_SIDE = 3
NEAR = 0.85
"""Of the best estimate for each GPU: who is simulated here."""


def goodput(setting: Setting, candidate: Candidate, seed: int, requests: int, start: float) -> float:
    """By bisection, each run as long as it is asked to be."""

    def kept(rate: float) -> bool:
        return run_candidate(setting, candidate, rate, seed, requests).score >= setting.target

    low, high = start, start
    while not kept(low):
        low, high = low / 1.15, low
    while high == low or kept(high):
        low, high = high, high * 1.15
    while high > low * WIDTH:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) else (low, middle)
    return (low * high) ** 0.5


def chosen(setting: Setting, result: PlanResult) -> list[Evaluation]:
    """The quick search's best of both sides, and the next by estimate of each, one of each placement."""
    found = [one for one in (result.disaggregated, result.colocated) if one is not None]
    for side in (True, False):
        own = [one for one in result.explored if one.candidate.disaggregated is side and one.estimate > 0.0]
        own.sort(key=lambda one: -one.estimate / one.candidate.gpus)
        best = own[0].estimate / own[0].candidate.gpus if own else 0.0
        labels = {one.candidate.label for one in found}
        for one in own:
            near = one.estimate / one.candidate.gpus >= NEAR * best
            if near and one.candidate.label not in labels and not why_not(setting, one.candidate):
                if sum(other.candidate.disaggregated is side for other in found) < OF_A_SIDE:
                    found.append(one)
                labels.add(one.candidate.label)
    return found


def main() -> None:
    path, seeds, requests = sys.argv[1], int((sys.argv[2:] or ["8"])[0]), int((sys.argv[3:] or ["3000"])[0])
    problem = load_problem(path)
    setting, begun_s = setting_of(problem), time.monotonic()
    result = plan(problem)
    print(
        f"{path}: quick search {time.monotonic() - begun_s:.1f} s, {result.simulated_requests:,} requests", flush=True
    )
    with ProcessPoolExecutor() as pool:
        for one in chosen(setting, result):
            start, gpus, quick = one.goodput.mean or one.estimate, one.candidate.gpus, one.goodput
            drawn = range(FIRST_SEED, FIRST_SEED + seeds)
            jobs = [pool.submit(goodput, setting, one.candidate, seed, requests, start) for seed in drawn]
            slow = interval([job.result() for job in jobs])
            said = f"quick {quick.mean / gpus:.3f} ({quick.low / gpus:.3f} to {quick.high / gpus:.3f})"
            said = said if one.seeds else f"estimate {one.estimate / gpus:.3f}"
            print(
                f"{one.candidate.label:55s} {gpus:2d} GPUs, requests/s per GPU: {slow.mean / gpus:.3f} "
                f"({slow.low / gpus:.3f} to {slow.high / gpus:.3f}); {said}, {one.fate}",
                flush=True,
            )


if __name__ == "__main__":
    main()
