"""Who may ask the workers now, step by step: read a test as the day of one router."""

from __future__ import annotations

import math

import pytest
from tandem.cluster.types import Role, Urgency
from tandem.router.dispatch_policy import DRAIN_LEARNED_S, RETRY_CHANGED_S, RETRY_S, DispatchPolicy
from tandem.router.placement import WorkerView
from tandem.router.turns import Spot, Turns
from views import view


def due(deadline_s: float) -> Urgency:
    return Urgency(slo_class="interactive", share=0.9, deadline_s=deadline_s)


BATCH = Urgency(slo_class="batch", share=0.1)


class Day:
    """A policy and its clock; every event is one line."""

    def __init__(self, max_asking: int = 32) -> None:
        self.policy: DispatchPolicy[str] = DispatchPolicy(max_asking=max_asking)
        self.now_s = 0.0

    def comes(self, key: str, urgency: Urgency, cost: float = 100.0) -> None:
        self.policy.enter(key, urgency, cost=cost, now_s=self.now_s)
        self.policy.ready(key)

    def asks(self) -> list[str]:
        """Everybody who may ask now, asking."""
        asking = []
        while (key := self.policy.candidate(self.now_s)) is not None:
            self.policy.ask(key)
            asking.append(key)
        return asking

    def refused(self, key: str) -> None:
        self.policy.refused(key, self.now_s)

    def granted(self, key: str) -> None:
        self.policy.granted(key, self.now_s)

    def later(self, seconds: float) -> None:
        self.now_s += seconds


def test_while_nobody_is_refused_several_ask_at_once_in_order() -> None:
    day = Day(max_asking=3)
    for key, deadline_s in (("late", 9.0), ("soon", 1.0), ("mid", 5.0), ("last", 10.0)):
        day.comes(key, due(deadline_s))
    assert day.asks() == ["soon", "mid", "late"]
    assert day.policy.asking_cost == 300.0
    day.granted("mid")
    assert day.asks() == ["last"]
    for key in ("soon", "late", "last"):
        day.granted(key)
    assert (len(day.policy), day.policy.asking_cost) == (0, 0.0)


def test_who_is_refused_is_not_overtaken_by_who_stands_behind() -> None:
    day = Day()
    day.comes("large", due(1.0), cost=5000.0)
    assert day.asks() == ["large"]
    day.refused("large")
    day.comes("small", due(2.0), cost=1.0)
    assert day.asks() == []
    day.later(RETRY_S)
    assert day.asks() == ["large"], "the head asks again after a while, and nobody else"
    day.refused("large")
    day.later(RETRY_CHANGED_S)
    assert day.asks() == []
    day.policy.changed()
    assert day.asks() == ["large"], "or sooner when something has changed"
    day.granted("large")
    assert day.asks() == ["small"]


def test_who_is_more_urgent_goes_before_the_one_that_is_held_and_does_not_let_others_past_it() -> None:
    day = Day()
    day.comes("held", due(5.0))
    assert day.asks() == ["held"]
    day.refused("held")
    day.comes("behind", due(6.0))
    day.comes("urgent", due(1.0))
    assert day.asks() == ["urgent"], "it was not refused yet"
    day.granted("urgent")
    assert day.asks() == []
    day.later(RETRY_S)
    assert day.asks() == ["held"]


def test_a_change_brings_the_next_try_forward_and_who_asks_is_not_waited_for_by_the_clock() -> None:
    day = Day()
    day.comes("held", due(5.0))
    day.asks()
    assert day.policy.retry_s() is None, "nobody was refused"
    day.refused("held")
    assert day.policy.retry_s() == RETRY_S
    day.policy.changed()
    assert day.policy.retry_s() == RETRY_CHANGED_S
    day.later(RETRY_CHANGED_S)
    assert day.asks() == ["held"]
    assert (day.policy.holds, day.policy.retry_s()) == (True, None), "the answer brings news of itself"
    day.refused("held")
    day.policy.enter("urgent", due(1.0), cost=1.0, now_s=day.now_s)
    assert day.policy.retry_s() is None, "so does the head when it is ready"
    day.policy.ready("urgent")
    assert day.policy.candidate(day.now_s) == "urgent"


def test_a_held_request_that_leaves_opens_the_queue() -> None:
    day = Day()
    day.comes("held", due(5.0))
    day.asks()
    day.refused("held")
    for key in ("a", "b"):
        day.comes(key, due(6.0))
    assert day.policy.retry_s() == pytest.approx(RETRY_S)
    day.policy.leave("held", day.now_s)
    day.policy.leave("held", day.now_s)
    assert day.policy.retry_s() is None
    assert day.asks() == ["a", "b"]


def test_one_that_leaves_while_it_asks_is_forgotten() -> None:
    day = Day(max_asking=1)
    day.comes("a", due(5.0))
    day.comes("b", due(6.0))
    assert day.asks() == ["a"]
    day.policy.leave("a", day.now_s)
    assert day.policy.asking_cost == 0.0
    assert day.asks() == ["b"]


def test_who_is_announced_counts_for_those_behind_and_keeps_its_turn_until_it_is_ready() -> None:
    day = Day()
    day.policy.enter("first", due(1.0), cost=100.0, now_s=0.0)
    day.comes("second", due(2.0))
    assert day.policy.cost_ahead(due(3.0), 0.0) == 200.0
    assert day.asks() == []
    day.policy.ready("first")
    assert day.asks() == ["first", "second"]


def test_a_flood_of_batch_gets_its_tenth_beside_interactive_and_everything_alone() -> None:
    day = Day(max_asking=1)
    for i in range(40):
        day.comes(f"b{i}", BATCH)
    for i in range(18):
        day.comes(f"i{i}", due(100.0 + i))
    served = []
    while turn := day.asks():
        served += turn
        day.granted(turn[0])
    beside = served[:20]
    assert sum(key.startswith("b") for key in beside) == 2
    assert [key for key in served if key.startswith("i")] == [f"i{i}" for i in range(18)]
    assert len(served) == 58
    assert day.policy.waiting_by_class() == {}


def test_what_decode_keeps_back_is_waited_for_at_the_rate_at_which_it_was_let_go() -> None:
    day = Day()
    for i in range(12):
        day.comes(f"r{i:02}", due(10.0 + i))
    assert day.policy.decode_wait_s(500.0, day.now_s) == 0.0, "nobody is held"
    asking = day.asks()
    for key in asking:
        day.refused(key)
    assert day.policy.decode_wait_s(500.0, day.now_s) == 0.0, "too early to say"
    for key in asking[:10]:
        day.later(0.1)
        assert day.asks() == [key]
        day.granted(key)
        for other in day.asks():
            day.refused(other)
    # Ten of 100 tokens in a second.
    assert day.policy.decode_wait_s(500.0, day.now_s) == pytest.approx(0.5, rel=0.15)
    for key in asking[10:]:
        day.policy.leave(key, day.now_s)
    assert day.policy.decode_wait_s(500.0, day.now_s) == 0.0


def test_where_nothing_is_let_go_the_wait_is_at_least_as_long_again() -> None:
    day = Day()
    day.comes("held", due(1.0))
    day.asks()
    day.refused("held")
    day.later(DRAIN_LEARNED_S * 8)
    assert day.policy.decode_wait_s(100.0, day.now_s) == pytest.approx(DRAIN_LEARNED_S * 8, rel=0.01)
    assert math.isfinite(day.policy.decode_wait_s(1e9, day.now_s))


def test_the_time_in_which_nobody_was_there_says_nothing_of_how_fast_workers_are() -> None:
    day = Day()
    day.comes("a", due(1.0))
    day.comes("b", due(2.0))
    for key in day.asks():
        day.policy.refused(key, day.now_s, absent=True)
    day.later(100.0)
    assert day.policy.decode_wait_s(100.0, day.now_s) == 0.0
    assert day.asks() == ["a"]
    day.refused("a")
    day.later(1.0)
    assert day.asks() == ["a"]
    day.granted("a")
    assert day.asks() == ["b"]
    day.refused("b")
    assert day.policy.decode_wait_s(100.0, day.now_s) == pytest.approx(1.0)


def idle() -> tuple[WorkerView, ...]:
    return (view("p", role=Role.PREFILL),)


def full() -> tuple[WorkerView, ...]:
    return (view("p", role=Role.PREFILL, queued_prefill_tokens=10**9),)


def test_who_passes_by_while_nobody_waits_has_paid_as_if_it_had_stood_in_the_queue() -> None:
    orders = []
    for passes in (True, False):
        turns: Turns[Spot] = Turns(unready_wait_s=1.0)
        a, b = Urgency(slo_class="a"), Urgency(slo_class="b", share=3.0)
        assert turns.open_to(a, idle, needs_room=True)
        assert not turns.open_to(a, full, needs_room=True)
        assert turns.open_to(a, full, needs_room=False)
        for urgency, cost in ((a, 1000), (b, 50), (a, 10)):
            if passes:
                turns.pass_by(urgency, cost)
                continue
            spot = Spot(0.0, urgency, needs_room=True)
            turns.expect(spot, cost, 0.0)
            turns.ready(spot)
            for turn in turns.due(0.0, idle):
                turns.placed(turn, 0.0)
        waiting = {Spot(1.0, urgency, needs_room=True): number for number, urgency in enumerate((a, b, b, a, b))}
        for spot in waiting:
            turns.expect(spot, 100, 1.0)
            turns.ready(spot)
        assert not turns.open_to(a, idle, needs_room=True), "others wait"
        orders.append([waiting[spot] for spot in turns.due(1.0, idle) if turns.placed(spot, 1.0) is None])
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0]), "the class that has paid more waits"
