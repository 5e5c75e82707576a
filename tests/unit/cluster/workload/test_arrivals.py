import itertools
import math

import numpy as np
import pytest
from tandem.cluster.workload.arrivals import arrival_times, ramp_times


def test_infinite_rate_sends_everything_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == (0.0, 0.0, 0.0)


def test_times_ascend_from_zero_and_follow_the_seed() -> None:
    times = arrival_times(500, 10.0, 1.0, 7)
    assert times[0] == 0.0
    assert all(later >= earlier for earlier, later in itertools.pairwise(times))
    assert times == arrival_times(500, 10.0, 1.0, 7)
    assert times != arrival_times(500, 10.0, 1.0, 8)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_mean_and_variation(burstiness: float) -> None:
    # A gamma of shape k has a coefficient of variation of 1/sqrt(k), whatever its mean.
    gaps = np.diff(arrival_times(40_001, 20.0, burstiness, 1))
    assert gaps.mean() == pytest.approx(1 / 20.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_infinitely_even_arrivals_are_a_clock() -> None:
    assert arrival_times(4, 2.0, math.inf, 0) == (0.0, 0.5, 1.0, 1.5)


@pytest.mark.parametrize(
    ("count", "rate", "burstiness", "field"),
    [
        (0, 1.0, 1.0, "num_prompts"),
        (1, 0.0, 1.0, "request_rate"),
        (1, math.nan, 1.0, "request_rate"),
        (1, -1.0, 1.0, "request_rate"),
        (1, 1.0, 0.0, "burstiness"),
        (1, 1.0, math.nan, "burstiness"),
    ],
)
def test_ranges(count: int, rate: float, burstiness: float, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .* allowed: "):
        arrival_times(count, rate, burstiness, 0)


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 50.5), ("exponential", 10.0)])
def test_a_ramp_goes_from_rate_to_rate(strategy: str, middle: float) -> None:
    times = ramp_times(2001, strategy, 1.0, 100.0, 1e6, 0)  # so even that the gaps are the rates
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert 1 / gaps[0] == pytest.approx(1.0, rel=0.06)
    assert 1 / gaps[999] == pytest.approx(middle, rel=0.02)
    assert 1 / gaps[-1] == pytest.approx(100.0, rel=0.02)


def test_a_ramp_of_one_request_is_at_once() -> None:
    assert ramp_times(1, "linear", 1.0, 2.0, 1.0, 0) == (0.0,)
