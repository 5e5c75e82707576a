"""Virtual time: order, ties, cancelling."""

from __future__ import annotations

from tandem.cluster.sim.timeline import Timeline


def test_things_happen_in_the_order_of_their_times_and_then_of_their_planning() -> None:
    timeline, seen = Timeline(), []
    for name, at_s in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("d", 2.0)):
        timeline.at(at_s, lambda name=name: seen.append((timeline.now_s(), name)))  # type: ignore[misc]
    timeline.run()
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c"), (2.0, "d")]


def test_what_happens_may_plan_more_and_cancel() -> None:
    timeline, seen = Timeline(), []
    later = timeline.at(3.0, lambda: seen.append("never"))
    timeline.at(1.0, later.cancel)
    timeline.at(1.0, lambda: timeline.after(1.0, lambda: seen.append("then")) and None)
    timeline.run()
    later.cancel()
    assert (seen, timeline.now_s(), timeline.events_total) == (["then"], 2.0, 3)


def test_a_run_may_stop_on_the_way() -> None:
    timeline, seen = Timeline(), []
    timeline.at(1.0, lambda: seen.append(1))
    timeline.at(2.0, lambda: seen.append(2))
    timeline.run(until_s=1.5)
    assert (seen, timeline.now_s()) == ([1], 1.5)
    timeline.run()
    assert seen == [1, 2]
