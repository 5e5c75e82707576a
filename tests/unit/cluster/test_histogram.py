"""The histogram without locks says what the library's says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from tandem.cluster.histogram import LoopHistogram

BOUNDS = (0.001, 0.1, 1.0, 50.0)


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 1e6)), max_size=20))
def test_it_shows_what_the_library_shows(values: list[float]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("tandem:x", "about", ["model_name"], buckets=BOUNDS, registry=theirs).labels("m")
    mine = LoopHistogram("tandem:x", "about", {"model_name": "m"}, BOUNDS)
    ours.register(mine)
    for value in values:
        histogram.observe(value)
        mine.observe(value)
    lines = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == lines


def test_several_at_once_count_as_several() -> None:
    once, thrice = (LoopHistogram("x", "about", {}, BOUNDS) for _ in range(2))
    once.observe(0.5, 3)
    for _ in range(3):
        thrice.observe(0.5)
    assert list(once.collect()) == list(thrice.collect())
