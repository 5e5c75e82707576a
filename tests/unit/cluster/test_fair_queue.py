"""The order of service: shares between classes, deadlines inside one, and what somebody who came now would wait for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.fair_queue import PATIENCE_S, FairQueue
from tandem.cluster.types import Urgency


def of(slo_class: str, share: float = 1.0, deadline_s: float = math.inf) -> Urgency:
    return Urgency(slo_class=slo_class, share=share, deadline_s=deadline_s)


def queue_of(*waiters: tuple[str, Urgency, float]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for key, urgency, cost in waiters:
        queue.push(key, urgency, cost=cost, now_s=0.0)
    return queue


def test_earliest_deadline_first_and_first_come_among_equals() -> None:
    queue = queue_of(("c", of("x", deadline_s=3), 1), ("a", of("x", deadline_s=1), 9), ("b", of("x", deadline_s=1), 1))
    assert list(queue) == ["a", "b", "c"]
    assert queue.peek() == "a"
    assert (len(queue), "b" in queue, "z" in queue) == (3, True, False)


def test_no_deadline_is_patience_not_eternity() -> None:
    queue = queue_of(("patient", of("x"), 1), ("later", of("x", deadline_s=PATIENCE_S + 1), 1))
    queue.push("sooner", of("x", deadline_s=PATIENCE_S + 9), cost=1, now_s=10.0)
    queue.push("soonest", of("x", deadline_s=PATIENCE_S - 1), cost=1, now_s=10.0)
    assert list(queue) == ["soonest", "patient", "later", "sooner"]


def test_nine_of_interactive_to_one_of_batch() -> None:
    waiters = [(f"i{n}", of("interactive", 0.9), 10.0) for n in range(27)]
    waiters += [(f"b{n}", of("batch", 0.1), 10.0) for n in range(9)]
    queue = queue_of(*waiters)
    assert "".join(key[0] for key in queue) == "ib" + "i" * 8 + "b" + ("i" * 9 + "b") * 2 + "b" * 5


def test_an_absent_class_saves_nothing_up() -> None:
    queue = queue_of(*((f"a{n}", of("a"), 10.0) for n in range(20)))
    for n in range(10):
        queue.take(f"a{n}")
    for n in range(5):
        queue.push(f"late{n}", of("late"), cost=10.0, now_s=0.0)
    first = list(queue)[:10]
    assert sum(key.startswith("late") for key in first) == 5, "half of what comes, not what it has missed"


def test_serving_out_of_turn_costs_nobody_else_his_share() -> None:
    """Several ask at once and are granted in any order; what the class that should have been first is owed stays."""
    queue = queue_of(
        *((f"i{n}", of("i", 0.9), 10.0) for n in range(40)), *((f"b{n}", of("b", 0.1), 10.0) for n in range(9))
    )
    for n in range(4):  # each time out of turn
        queue.take(f"b{n}")
    assert [key[0] for key in queue][:36].count("b") == 0, "batch has had its tenth of forty in advance"


def test_leaving_unserved_is_not_paid_for() -> None:
    queue = queue_of(("a", of("a"), 100.0), ("b", of("b"), 1.0), ("a2", of("a"), 1.0))
    assert queue.remove("a")
    assert not queue.remove("a")
    assert sorted(queue) == ["a2", "b"]
    queue.take("a2")
    queue.take("b")
    assert (len(queue), queue.peek()) == (0, None)


def test_a_key_waits_once() -> None:
    queue = queue_of(("a", of("a"), 1.0))
    with pytest.raises(AssertionError, match="waits already"):
        queue.push("a", of("b"), cost=1.0, now_s=0.0)


def test_what_stands_ahead_of_a_newcomer() -> None:
    queue = queue_of(
        *((f"i{n}", of("i", 0.9, 5.0), 10.0) for n in range(4)), *((f"b{n}", of("b", 0.1), 10.0) for n in range(4))
    )
    assert queue.cost_ahead(of("i", 0.9, 9.0), 0.0) == pytest.approx(50.0), "its class, and one of the other"
    assert queue.cost_ahead(of("i", 0.9, 1.0), 0.0) == pytest.approx(0.0)
    assert queue.cost_ahead(of("b", 0.1), 0.0) == pytest.approx(80.0)
    assert len(queue) == 8


@given(
    waiters=st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(1, 100), st.sampled_from([math.inf, 1.0, 7.0])), max_size=25
    ),
    served=st.lists(st.integers(0, 24), max_size=12),
    newcomer=st.tuples(st.sampled_from("abc"), st.sampled_from([math.inf, 0.5, 7.0])),
)
def test_cost_ahead_is_what_would_be_served_before(
    waiters: list[tuple[str, float, float]], served: list[int], newcomer: tuple[str, float]
) -> None:
    shares = {"a": 5.0, "b": 1.0, "c": 0.1}
    queue: FairQueue[int] = FairQueue()
    costs = {key: cost for key, (_, cost, _) in enumerate(waiters)}
    for key, (name, cost, deadline_s) in enumerate(waiters):
        queue.push(key, of(name, shares[name], deadline_s), cost=cost, now_s=0.0)
    for key in served:
        if key in queue:
            queue.take(key)
    before = list(queue)
    urgency = of(newcomer[0], shares[newcomer[0]], newcomer[1])
    ahead = queue.cost_ahead(urgency, 0.0)
    assert list(queue) == before, "asking changes nothing"
    queue.push(-1, urgency, cost=1.0, now_s=0.0)
    order = list(queue)
    assert ahead == pytest.approx(sum(costs[key] for key in order[: order.index(-1)]))
