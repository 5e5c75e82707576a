"""How often points are measured, in what time, and whether their times agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from tandem.cluster.profiler.points import Point
from tandem.cluster.profiler.repeat import (
    MIN_ROUNDS,
    MIN_TIMES,
    Disagreement,
    RepeatOptions,
    check_agreement,
    measure_points,
    spread,
)

SHORT, MIDDLE, LONG = Point(length=10), Point(length=100), Point(length=1000)


class Machine:
    """Steps take what they are told, on a clock of its own."""

    def __init__(self, seconds: Callable[[Point, int], float]) -> None:
        self._seconds = seconds
        self.time_s = 0.0
        self.order: list[Point] = []

    def run(self, point: Point) -> float:
        seconds = self._seconds(point, self.order.count(point))
        self.order.append(point)
        self.time_s += seconds
        return seconds

    def now_s(self) -> float:
        return self.time_s


def proportional(point: Point, _: int) -> float:
    return point.length * 1e-3


def test_points_take_turns_and_short_steps_are_repeated_within_one() -> None:
    machine = Machine(proportional)
    options = RepeatOptions(rounds=5, visit_s=0.1, budget_s=1000)
    timings = measure_points(machine.run, (LONG, SHORT, MIDDLE), options, machine.now_s)
    assert timings.left_out == ()
    assert {point: len(times) for point, times in timings.times_s.items()} == {SHORT: 5, MIDDLE: 5, LONG: 5}
    assert Counter(machine.order) == {SHORT: 2 + 5 * 8, MIDDLE: 1 + 5, LONG: 1 + 5}
    rounds = [point for point in machine.order[4:] if point is not SHORT]
    assert all({rounds[i], rounds[i + 1]} == {MIDDLE, LONG} for i in range(0, 10, 2)), "each round visits all"
    assert timings.times_s[LONG] == [1.0] * 5


def test_a_budget_is_kept_and_what_has_no_time_is_named() -> None:
    machine = Machine(proportional)
    timings = measure_points(
        machine.run, (SHORT, MIDDLE, LONG), RepeatOptions(visit_s=0.0, budget_s=4.9), machine.now_s
    )
    assert timings.left_out == ("prefill 1000",), "four rounds of it do not fit"
    assert len(timings.times_s[MIDDLE]) == 7
    assert machine.time_s <= 4.9
    slow = Machine(lambda point, _: point.length * 1e-2)
    timings = measure_points(slow.run, (SHORT, MIDDLE, LONG), RepeatOptions(visit_s=0.0, budget_s=4.5), slow.now_s)
    assert timings.left_out == ("prefill 1000", "prefill 100"), "one was not even begun"
    assert slow.time_s <= 4.5


def test_rounds_beyond_the_least_end_with_the_time() -> None:
    machine = Machine(proportional)
    options = RepeatOptions(rounds=1000, visit_s=0.0, budget_s=10.0)
    timings = measure_points(machine.run, (SHORT, LONG), options, machine.now_s)
    assert MIN_ROUNDS <= len(timings.times_s[LONG]) <= 9
    assert machine.time_s <= 10.0


def test_a_machine_that_gets_slower_keeps_the_budget() -> None:
    """Points that were estimated at a second take ten: the budget ends it, and whoever has too few times is named."""
    machine = Machine(lambda point, number: proportional(point, 0) * (1 if number < 2 else 10))
    options = RepeatOptions(visit_s=0.0, budget_s=20.0)
    timings = measure_points(machine.run, (SHORT, MIDDLE, LONG), options, machine.now_s)
    assert machine.time_s <= 20.0 + 10.0, "by no more than a visit"
    assert timings.left_out == ("prefill 1000",)
    assert all(len(times) >= MIN_TIMES for times in timings.times_s.values())


def test_points_that_disagree_are_measured_again_and_every_time_counts() -> None:
    def restless(point: Point, number: int) -> float:
        return 1.0 if point is MIDDLE and number in (1, 2) else 0.5

    machine = Machine(restless)
    options = RepeatOptions(rounds=6, visit_s=0.0, budget_s=1000)
    times_s = measure_points(machine.run, (SHORT, MIDDLE), options, machine.now_s).times_s
    assert len(times_s[SHORT]) == 6
    assert len(times_s[MIDDLE]) > 6
    assert times_s[MIDDLE][:6].count(1.0) == 2
    assert spread(times_s[MIDDLE]) == 0.0, "the slow ones are a quarter and less now"


def test_progress_grows_to_the_end() -> None:
    machine, told = Machine(proportional), []
    measure_points(
        machine.run,
        (SHORT, MIDDLE),
        RepeatOptions(),
        machine.now_s,
        lambda what, share: told.append((what, share)),
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0.8 < shares[-1] <= 1.0
    assert {what for what, _ in told} == {"prefill 10", "prefill 100"}


def test_a_spread_is_that_of_the_middle_half() -> None:
    assert spread([3.0]) == 0.0
    assert spread([1.0, 1.0, 1.0, 1.0, 9.0]) == 0.0, "one disturbed visit does not count"
    assert spread([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]) == pytest.approx(1.0 / 1.5), "two machines do"


def test_times_that_disagree_are_refused_by_name() -> None:
    times = {"decode 8 x 64": [1.0, 1.0, 2.0, 2.0], "prefill 16": [1.0, 1.01, 1.02], "prefill 64": [1.0, 1.2, 1.4]}
    check_agreement(times, 1.0)
    check_agreement({"short": (0.002, 0.004, 0.006)}, 0.25, least_s=0.01)  # two milliseconds of what counts as ten
    with pytest.raises(Disagreement, match=r"repeated times of 2 of 3 points .* 15%: decode 8 x 64 \(67%\), prefi"):
        check_agreement(times, 0.15)
    many = {str(number): [1.0, 1.0, 2.0, 2.0] for number in range(9)}
    with pytest.raises(
        Disagreement, match=r"and 4 more; measure on a quieter machine, or allow a larger --max-transfer"
    ):
        check_agreement(many, 0.15, option="max_transfer_spread")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rounds": 3}, "rounds: 3 is not allowed; allowed: 4 to 1000"),
        ({"budget_s": 0.0}, "budget_s: 0 is not"),
        ({"budget_s": float("nan")}, "budget_s: nan"),
        ({"max_spread": 0.0}, "max_spread"),
        ({"visit_s": -1.0}, "visit_s"),
    ],
)
def test_a_wrong_option_is_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RepeatOptions(**options)
