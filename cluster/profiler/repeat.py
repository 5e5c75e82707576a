"""When each point is measured and how often, within a budget of time; and whether its times agree. Pure: time and the
measuring itself are passed in.

1. Every point once, small ones first, short ones twice; these times count only as an estimate. What a quarter of the
   budget does not reach is left out, and then what costs most, until MIN_ROUNDS of all fit into the rest.
2. Rounds: each visits every point, in an order of its own, so that a drift of the machine meets all points alike. A
   visit repeats a short step for `visit_s` and takes the median: one time.
3. Points whose times disagree are visited again while there is time. All times count.

The spread of a point is the distance of its times' quartiles over their median: a few interrupted visits do not show in
it, two machines (a neighbor that comes and goes) do.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .points import Point

MIN_ROUNDS = 4
"""That must fit into the budget, by the estimate …"""
MIN_TIMES = 3
"""… and times of a point at the end, where the machine turned out slower; with fewer it is left out."""
MAX_VISIT_STEPS = 8
_ESTIMATE_SHARE = 0.25
"""Of the budget: for the first time of each point."""
_SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatOptions:
    """How often, how long. ValueError names what is out of range."""

    rounds: int = 7
    visit_s: float = 0.1
    budget_s: float = 180.0
    max_spread: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not MIN_ROUNDS <= self.rounds <= 1000:
            raise ValueError(f"rounds: {self.rounds} is not allowed; allowed: {MIN_ROUNDS} to 1000")
        if not 0.0 < self.budget_s <= 86400.0:
            raise ValueError(f"budget_s: {self.budget_s:g} is not allowed; allowed: above 0 to 86400")
        if not 0.0 < self.max_spread <= 10.0:
            raise ValueError(f"max_spread: {self.max_spread:g} is not allowed; allowed: above 0 to 10")
        if not 0.0 <= self.visit_s <= 10.0:
            raise ValueError(f"visit_s: {self.visit_s:g} is not allowed; allowed: 0 to 10")


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of each point, seconds, in the order in which they were taken; and the names of those left out."""

    times_s: dict[Point, list[float]]
    left_out: tuple[str, ...]


class Disagreement(RuntimeError):
    """Repeated measurements of some points lie too far apart to mean anything."""


class TooSlow(RuntimeError):
    """The machine is too slow for the budget: what can be measured in it is too little."""


def spread(times_s: Sequence[float], least_s: float = 0.0) -> float:
    """Distance of the quartiles over the median, which counts as `least_s` at least; 0 of a single time."""
    if len(times_s) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times_s, n=4, method="inclusive")
    return (high - low) / max(middle, least_s)


def check_agreement(
    times_s: Mapping[str, Sequence[float]],
    max_spread: float,
    *,
    least_s: float = 0.0,
    option: str = "max_spread",
    why: str = "",
) -> None:
    """Disagreement naming the points whose times spread by more than `max_spread` (see `spread`), the worst first, and
    `why` that may be.
    """
    spreads = {name: spread(times, least_s) for name, times in times_s.items()}
    bad = sorted(((value, name) for name, value in spreads.items() if value > max_spread), reverse=True)
    if not bad:
        return
    shown = ", ".join(f"{name} ({value:.0%})" for value, name in bad[:_SHOWN_NAMES])
    more = f" and {len(bad) - _SHOWN_NAMES} more" if len(bad) > _SHOWN_NAMES else ""
    told = f"{more}; {why}" if why else more
    raise Disagreement(
        f"repeated times of {len(bad)} of {len(times_s)} points disagree by more than {max_spread:.0%}: "
        f"{shown}{told}; measure on a quieter machine, or allow a larger --{option.replace('_', '-')}"
    )


def unsteady(times_s: Mapping[Point, Sequence[float]], max_spread: float) -> str:
    """What to say, after a few rounds, of a machine on which most points disagree; empty: nothing yet."""
    if min(map(len, times_s.values()), default=0) < MIN_ROUNDS:
        return ""
    bad = sum(spread(times) > max_spread for times in times_s.values())
    if 2 * bad <= len(times_s):
        return ""
    return (
        f"so far repeated times of {bad} of {len(times_s)} steps disagree by more than {max_spread:.0%}: something "
        "else is running here; they are measured on, Ctrl-C ends it"
    )


def measure_points(
    run: Callable[[Point], float],
    points: Iterable[Point],
    options: RepeatOptions,
    now_s: Callable[[], float],
    on_progress: Callable[[str, float], None] = lambda what, share: None,
    on_round: Callable[[Mapping[Point, Sequence[float]]], None] = lambda times_s: None,
) -> Timings:
    """Times of all points for which there is time; see the module. `run` runs one step and returns its seconds;
    `on_progress` hears what is measured and the share of the expected time that is over; `on_round` hears the times so
    far, first none of those points that the budget has room for, then again after each round. What it raises ends it.
    """
    begin_s = now_s()
    deadline_s = begin_s + options.budget_s
    costs, left_out = _estimates(run, points, options, now_s, on_progress)
    visits = {point: _steps_of_visit(cost, options.visit_s) for point, cost in costs.items()}
    left_out += _drop_costly(costs, visits, deadline_s - now_s())
    expected_s = now_s() - begin_s + options.rounds * sum(costs[point] * visits[point] for point in costs)
    end_s = begin_s + min(options.budget_s, expected_s)
    times: dict[Point, list[float]] = {point: [] for point in costs}
    draw = random.Random(options.seed)
    on_round(times)

    def visit(point: Point) -> None:
        on_progress(point.name, min(1.0, (now_s() - begin_s) / max(end_s - begin_s, 1e-9)))
        times[point].append(statistics.median([run(point) for _ in range(visits[point])]))

    def there_is_time_for(point: Point) -> bool:
        step_s = max([costs[point], *times[point][-1:]])
        return now_s() + step_s * visits[point] <= deadline_s

    for _ in range(options.rounds):
        for point in draw.sample(list(times), len(times)):
            if there_is_time_for(point):
                visit(point)
        on_round(times)
    for _ in range(options.rounds):
        again = [point for point in times if spread(times[point]) > options.max_spread and there_is_time_for(point)]
        for point in again:
            if there_is_time_for(point):
                visit(point)
    left_out += [point.name for point in times if len(times[point]) < MIN_TIMES]
    return Timings({point: taken for point, taken in times.items() if len(taken) >= MIN_TIMES}, tuple(left_out))


def _estimates(
    run: Callable[[Point], float],
    points: Iterable[Point],
    options: RepeatOptions,
    now_s: Callable[[], float],
    on_progress: Callable[[str, float], None],
) -> tuple[dict[Point, float], list[str]]:
    until_s = now_s() + options.budget_s * _ESTIMATE_SHARE
    costs: dict[Point, float] = {}
    left_out = []
    token_s = 0.0  # of the point before
    for point in sorted(points, key=lambda point: (point.tokens, point.longest)):
        if now_s() + token_s * point.tokens >= until_s:
            left_out.append(point.name)
            continue
        on_progress(point.name, 0.0)
        first_s = run(point)  # may touch pages for the first time
        costs[point] = run(point) if first_s < options.visit_s else first_s
        token_s = costs[point] / point.tokens
    return costs, left_out


def _drop_costly(costs: dict[Point, float], visits: Mapping[Point, int], seconds: float) -> list[str]:
    """Takes the costliest points out of `costs` until MIN_ROUNDS of the rest fit into the time; their names."""
    dropped = []
    for point in sorted(costs, key=lambda point: costs[point] * visits[point], reverse=True):
        if MIN_ROUNDS * sum(costs[other] * visits[other] for other in costs) <= seconds:
            break
        del costs[point]
        dropped.append(point.name)
    return dropped


def _steps_of_visit(cost_s: float, visit_s: float) -> int:
    return max(1, min(MAX_VISIT_STEPS, int(visit_s / max(cost_s, 1e-9))))
