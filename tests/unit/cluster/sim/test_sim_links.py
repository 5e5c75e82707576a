"""KV on its way: links that share their bandwidth."""

from __future__ import annotations

import pytest
from tandem.cluster.sim.links import Flow, Medium
from tandem.cluster.sim.timeline import Timeline


@pytest.fixture
def timeline() -> Timeline:
    return Timeline()


def test_a_flow_alone_takes_its_bytes_over_the_bandwidth_and_the_latency(timeline: Timeline) -> None:
    done: list[float] = []
    Flow(timeline, [Medium(name="a", bytes_per_s=100.0, latency_s=0.5)], 200, lambda: done.append(timeline.now_s()))
    timeline.run()
    assert done == [2.5]


def test_flows_that_cross_the_same_medium_share_it_evenly(timeline: Timeline) -> None:
    medium, done = Medium(name="a", bytes_per_s=100.0), {}
    for name, start_s, size in (("x", 0.0, 300), ("y", 1.0, 100)):
        timeline.at(
            start_s,
            lambda name=name, size=size: (
                Flow(  # type: ignore[misc]
                    timeline, [medium], size, lambda: done.__setitem__(name, timeline.now_s())
                )
                and None
            ),
        )
    timeline.run()
    # x alone for 1 s, both at 50 B/s for 2 s, x alone with its last 100 bytes
    assert done == pytest.approx({"y": 3.0, "x": 4.0})
    assert medium.bytes_total == 400


def test_a_flow_goes_at_the_pace_of_its_slowest_share(timeline: Timeline) -> None:
    wide, narrow = Medium(name="w", bytes_per_s=100.0), Medium(name="n", bytes_per_s=10.0)
    done: dict[str, float] = {}
    Flow(timeline, [wide, narrow], 100, lambda: done.__setitem__("both", timeline.now_s()))
    Flow(timeline, [wide], 100, lambda: done.__setitem__("wide", timeline.now_s()))
    timeline.run()
    assert done == pytest.approx({"both": 10.0, "wide": 2.0})


def test_a_canceled_flow_leaves_its_share_to_others(timeline: Timeline) -> None:
    medium, done = Medium(name="a", bytes_per_s=100.0), []
    first = Flow(timeline, [medium], 1000, lambda: done.append("first"))
    Flow(timeline, [medium], 100, lambda: done.append(timeline.now_s()))
    timeline.at(1.0, first.cancel)
    timeline.run()
    first.cancel()
    assert done == [1.5]


def test_nothing_to_cross_takes_no_time(timeline: Timeline) -> None:
    done: list[float] = []
    Flow(timeline, [], 100, lambda: done.append(timeline.now_s()))
    timeline.run()
    assert done == [0.0]
