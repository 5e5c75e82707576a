"""Attainment over rate from a few jumpy scores."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.planner.shape import LEAST_SLOPE, Shape

POINTS = st.lists(
    st.tuples(st.floats(0.5, 50.0), st.floats(0.0, 1.0)),
    min_size=1,
    max_size=9,
    unique_by=lambda point: round(point[0], 3),  # a shape between two neighbors of the same double has no slope
)


@given(points=POINTS, rates=st.lists(st.floats(0.1, 100.0), min_size=2, max_size=6))
def test_it_never_rises(points: list[tuple[float, float]], rates: list[float]) -> None:
    scores = [Shape(points).at(rate) for rate in sorted(rates)]
    assert all(after <= before + 1e-9 for before, after in pairwise(scores))


@given(points=POINTS, score=st.floats(0.5, 0.99))
def test_where_a_score_is_it_has_it(points: list[tuple[float, float]], score: float) -> None:
    shape = Shape(points)
    rate = shape.where(score)
    assert rate >= 0.0
    if rate > 0.0:
        assert shape.at(rate) == pytest.approx(score, abs=1e-6)


def test_falling_points_are_joined_by_straight_lines() -> None:
    shape = Shape([(10.0, 0.95), (12.0, 0.85), (8.0, 0.99)])
    assert shape.where(0.9) == pytest.approx(11.0)
    assert shape.at(9.0) == pytest.approx(0.97)


def test_neighbors_that_rise_are_one() -> None:
    assert Shape([(8.0, 0.98), (9.0, 0.90), (11.0, 0.92), (14.0, 0.7)]).at(10.0) == pytest.approx(0.91)


def test_beyond_its_ends_it_goes_on_falling() -> None:
    shape = Shape([(10.0, 0.8)])
    assert shape.at(20.0) == pytest.approx(0.8 - LEAST_SLOPE)
    assert shape.where(0.9) == pytest.approx(5.0)


def test_a_shape_that_begins_at_no_rate_is_higher_nowhere() -> None:
    """What an estimate keeps at no rate, and a simulation misses by more."""
    shape = Shape([(0.0, 0.9), (2.0, 0.0)])
    assert shape.where(0.95) == 0.0
    assert shape.where(0.9) == 0.0
    assert shape.where(0.45) == pytest.approx(1.0)
