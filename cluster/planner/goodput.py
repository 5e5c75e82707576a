"""From attainment at some rates to the highest rate that keeps the target, and from seeds to an interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from scipy import stats

from .result import Interval

FIRST_STEP = 1.06
MOST_STEP = 2.0
FLOOR = 64.0
"""How far below the start a rate is still tried."""
CONFIDENCE = 0.95


class Scored(Protocol):
    """What one rate came to."""

    @property
    def rate(self) -> float:
        """Requests a second."""

    @property
    def score(self) -> float:
        """Held against the target."""


S = TypeVar("S", bound=Scored)


def find_goodput(
    run: Callable[[float], S], *, start: float, target: float, width: float, most: int, go_on: Callable[[], bool]
) -> tuple[float, list[S]]:
    """(rate at which the score falls below `target`, what was run for it, in order).

    Steps away from `start`, each wider than the one before, until a rate is kept and one `width` times as high is not,
    or narrower; between those two the score is taken for straight. 0 where not even `start / 64` is kept. Ends after
    `most` runs, or when `go_on` says no, with the highest rate that was kept.
    """
    runs: list[S] = []
    kept: S | None = None
    failed: S | None = None
    rate, step = start, FIRST_STEP
    while len(runs) < most and (not runs or go_on()):
        found = run(rate)
        runs.append(found)
        if found.score >= target:
            kept = found
        else:
            failed = found
        if kept is not None and failed is not None:
            if failed.rate <= kept.rate * width:
                break
            rate = math.sqrt(kept.rate * failed.rate)
            continue
        rate = rate * step if kept is not None else rate / step
        if rate < start / FLOOR:
            break
        step = min(MOST_STEP, step**2)
    if kept is None:
        return 0.0, runs
    if failed is None:
        return kept.rate, runs
    fall = kept.score - failed.score
    share = (kept.score - target) / fall if fall > 0.0 else 0.0
    return kept.rate + min(1.0, share) * (failed.rate - kept.rate), runs


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by Student's t. One value says nothing of its spread: from -inf to inf."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)
