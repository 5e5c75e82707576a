"""From attainment at some rates to the highest rate that keeps the target, and from seeds to an interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

from .result import Interval

FLOOR = 64.0
"""How far below the start a rate is still tried."""
LEAST_STEP = 1.05
"""From one rate to the next, while all were kept or none was."""
OVERSHOT = 1.3
"""So much further than is expected, so that the other side is met."""
INSIDE = 0.15
"""Of a gap: how near to its ends the next rate may lie."""
CONFIDENCE = 0.95


class Scored(Protocol):
    """What one rate came to."""

    @property
    def rate(self) -> float:
        """Requests a second."""

    @property
    def score(self) -> float:
        """Held against the target."""

    @property
    def one_sided(self) -> bool:
        """The score says on which side of the target it is, not how far."""


S = TypeVar("S", bound=Scored)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """When a rate has been found well enough."""

    width: float
    """A kept rate and one that is not, this many times as high or less."""
    nearness: float = 0.0
    """Or one rate from which it is not further to the target than this share of it, as far as that is known."""
    noise: float = 0.0
    """Or one whose score is as near to the target as this: where it falls slowly, no run says more."""
    most: int
    """Runs."""
    step: float = 1.4
    """From one rate to the next at most, while all were kept or none was; the second time its square, and so on."""


def find_goodput(
    run: Callable[[float], S],
    *,
    start: float,
    target: float,
    lead: Callable[[float, float], float],
    precision: Precision,
    ceiling: float = math.inf,
) -> tuple[float, list[S]]:
    """(rate at which the score falls below `target`, what was run for it, in order).

    `lead`: from a rate and its score to where the target is then expected. Follows it from `start` until the precision
    is met; between a kept rate and one that is not the score is taken for straight. 0 where not even `start / 64` is
    kept. Above `ceiling`, which no answer may be, nothing is run.
    """
    runs: list[S] = []
    kept: S | None = None
    failed: S | None = None
    rate = start = min(start, ceiling)
    while len(runs) < precision.most:
        found = run(rate)
        runs.append(found)
        if found.score >= target:
            kept = found
            if rate >= ceiling:
                break
        else:
            failed = found
        off = lead(rate, found.score) / rate - 1.0
        near = abs(off) <= precision.nearness or abs(found.score - target) <= precision.noise
        if near and not found.one_sided:
            return rate * (1.0 + off), runs
        if kept is not None and failed is not None:
            if failed.rate <= kept.rate * precision.width:
                break
            share = min(1.0 - INSIDE, max(INSIDE, _share(kept, failed, target)))
            rate = kept.rate + share * (failed.rate - kept.rate)
        else:
            step = min(precision.step ** len(runs), max(LEAST_STEP, 1.0 + OVERSHOT * abs(off)))
            rate = min(ceiling, rate * step) if failed is None else rate / step
        if rate < start / FLOOR:
            break
    if kept is None:
        return 0.0, runs
    if failed is None:
        return kept.rate, runs
    return kept.rate + _share(kept, failed, target) * (failed.rate - kept.rate), runs


def straight(slope: float, target: float) -> Callable[[float, float], float]:
    """To where the target lies if a doubled rate costs about `slope` of the score."""
    return lambda rate, score: rate * (1.0 + (score - target) / slope)


def _share(kept: Scored, failed: Scored, target: float) -> float:
    """Of the way from one to the other: where a straight line meets the target, or the middle where there is none."""
    if failed.one_sided:
        return 0.5
    return min(1.0, (kept.score - target) / (kept.score - failed.score))


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by Student's t. One value says nothing of its spread: the interval is that value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean=mean, low=mean, high=mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = student_t(len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


@cache
def student_t(freedom: int) -> float:
    """What Student's t with so many degrees of freedom stays below, either way, at the confidence above; from its
    distribution's finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4), which needs no large library.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The probability of |t| <= sqrt(freedom) tan(angle)."""
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term, series = 1.0, 0.0
    for step in range(freedom // 2):
        series += term
        term *= square * (2 * step + 1 + odd) / (2 * step + 2 + odd)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * series)
    return math.sin(angle) * series
