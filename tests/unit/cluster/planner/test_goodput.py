"""From scores at some rates to goodput, and from seeds to an interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit
from tandem.cluster.planner.goodput import Precision, find_goodput, interval, straight, student_t

FINE = Precision(width=1.05, most=60)


@dataclass(frozen=True)
class Seen:
    rate: float
    score: float
    one_sided: bool = False


def knee(at: float, slope: float = 1.0) -> Callable[[float], Seen]:
    """Attains 0.9 at `at` and loses `slope` with every doubling."""
    return lambda rate: Seen(rate, min(1.0, max(0.0, 0.9 - slope * (rate - at) / at)))


@given(at=st.floats(0.05, 500.0), start=st.floats(0.1, 10.0), slope=st.floats(0.2, 5.0), told=st.floats(0.2, 5.0))
def test_the_knee_is_found_wherever_the_search_begins(at: float, start: float, slope: float, told: float) -> None:
    found, runs = find_goodput(knee(at, slope), start=at * start, target=0.9, lead=straight(told, 0.9), precision=FINE)
    assert found == pytest.approx(at, rel=0.05)
    assert len(runs) < 60


def test_one_run_that_is_near_enough_suffices() -> None:
    precision = Precision(width=1.05, nearness=0.04, most=9)
    found, runs = find_goodput(knee(10.0), start=10.3, target=0.9, lead=straight(1.0, 0.9), precision=precision)
    assert (len(runs), found) == (1, pytest.approx(10.0, rel=0.01))


def test_a_score_that_falls_slowly_is_not_followed_into_its_noise() -> None:
    precision = Precision(width=1.02, noise=0.015, most=9)
    _, runs = find_goodput(knee(10.0, 0.1), start=11.0, target=0.9, lead=straight(0.1, 0.9), precision=precision)
    assert len(runs) == 1


def test_what_never_keeps_the_target_has_no_goodput() -> None:
    found, runs = find_goodput(
        lambda rate: Seen(rate, 0.5), start=8.0, target=0.9, lead=straight(1.0, 0.9), precision=FINE
    )
    assert found == 0.0
    assert 8.0 / 64 <= min(run.rate for run in runs) < 8.0 / 32


def test_a_search_that_runs_out_answers_with_what_was_kept() -> None:
    precision = Precision(width=1.05, most=3)
    found, runs = find_goodput(knee(100.0), start=1.0, target=0.9, lead=straight(1.0, 0.9), precision=precision)
    assert found == max(run.rate for run in runs) < 100.0


def test_a_run_that_was_given_up_only_says_on_which_side_it_is() -> None:
    def given_up(rate: float) -> Seen:
        return Seen(rate, 1.0) if rate <= 5.0 else Seen(rate, 0.0, one_sided=True)

    found, _ = find_goodput(given_up, start=4.0, target=0.9, lead=straight(1.0, 0.9), precision=FINE)
    assert found == pytest.approx(5.0, rel=0.05)


def test_the_interval_is_students() -> None:
    seen = interval([1.0, 2.0, 3.0])
    assert (seen.mean, seen.high - seen.mean) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
    alone = interval([2.0])
    assert (alone.low, alone.high) == (2.0, 2.0)


@pytest.mark.parametrize("freedom", range(1, 40))
def test_students_t_is_that_of_a_large_library(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(float(stdtrit(freedom, 0.975)), rel=1e-9)


def test_nothing_is_run_above_a_ceiling() -> None:
    lead = straight(1.0, 0.9)
    found, runs = find_goodput(knee(10.0), start=7.0, target=0.9, lead=lead, precision=FINE, ceiling=8.0)
    assert found == max(run.rate for run in runs) == 8.0
    below, _ = find_goodput(knee(6.0), start=9.0, target=0.9, lead=lead, precision=FINE, ceiling=8.0)
    assert below == pytest.approx(6.0, rel=0.05)
