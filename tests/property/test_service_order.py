"""Who is served when: the fair queue against what start-time fair queueing promises, and a scheduler that uses it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.plan import RowOutput, StepOutput
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import BlocksGranted, TokensEmitted
from tandem.cluster.fair_queue import PATIENCE_S, FairQueue
from tandem.cluster.types import Handoff, Role, SampledToken, SamplingParams, SequenceSpec, Urgency

SHARES = {"interactive": 8.0, "batch": 1.0, "": 0.25}
CLASSES = st.sampled_from(sorted(SHARES))
COSTS = st.integers(1, 50)
STEP_S = 0.5


def urgency(slo_class: str, deadline_s: float = math.inf) -> Urgency:
    return Urgency(slo_class=slo_class, share=SHARES[slo_class], deadline_s=deadline_s)


@given(
    waiters=st.lists(st.tuples(CLASSES, COSTS, st.sampled_from([math.inf, 5.0, 1.0])), max_size=30),
    served=st.lists(st.integers(0, 29), max_size=10),
)
def test_an_iteration_says_in_which_order_they_will_be_taken(
    waiters: list[tuple[str, int, float]], served: list[int]
) -> None:
    queue: FairQueue[int] = FairQueue()
    for key, (slo_class, cost, deadline_s) in enumerate(waiters):
        queue.push(key, urgency(slo_class, deadline_s), cost=cost, now_s=0.0)
    for key in served:  # so that classes owe something
        if key in queue:
            queue.take(key)
    said, got = list(queue), []
    while (key := queue.peek()) is not None:
        got.append(key)
        queue.take(key)
    assert got == said
    for slo_class in SHARES:  # earliest deadline first inside a class, in the order of arrival where they are equal
        line = [(waiters[key][2], key) for key in got if waiters[key][0] == slo_class]
        assert line == sorted(line)
    assert not queue._classes or all(c.finish > queue._now for c in queue._classes.values())


@given(costs=st.lists(st.tuples(COSTS, COSTS, COSTS), min_size=20, max_size=20), parts=st.booleans())
def test_while_all_classes_wait_they_share_what_is_served(costs: list[tuple[int, int, int]], parts: bool) -> None:
    """Goyal et al., Theorem 1: two classes that both wait get service in proportion to their shares, within one
    largest request of each.
    """
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for number, triple in enumerate(costs):
        for slo_class, cost in zip(SHARES, triple, strict=True):
            queue.push((slo_class, number), urgency(slo_class), cost=cost, now_s=0.0)
    cost_of = {(c, n): cost for n, triple in enumerate(costs) for c, cost in zip(SHARES, triple, strict=True)}
    got: Counter[str] = Counter()
    while all(any(key[0] == slo_class for key in cost_of) for slo_class in SHARES):
        key = queue.peek()
        assert key is not None
        if parts and cost_of[key] > 10:
            cost_of[key] -= 10
            got[key[0]] += 10
            queue.serve(key, 10, left=cost_of[key])
        else:
            got[key[0]] += cost_of.pop(key)
            queue.take(key)
        for one, other in itertools.combinations(SHARES, 2):
            apart = abs(got[one] / SHARES[one] - got[other] / SHARES[other])
            assert apart <= 50 / SHARES[one] + 50 / SHARES[other] + 1e-6


@given(events=st.lists(st.tuples(CLASSES, COSTS, st.sampled_from(["leave", "serve", "stay"])), max_size=60))
def test_the_table_of_classes_is_as_large_as_what_waits(events: list[tuple[str, int, str]]) -> None:
    queue: FairQueue[int] = FairQueue()
    for key, (slo_class, cost, what) in enumerate(events):
        name = slo_class if what == "stay" else f"{slo_class}{key}"  # who does not stay has a class of its own
        queue.push(key, Urgency(slo_class=name), cost=cost, now_s=0.0)
        ahead = queue.cost_ahead(Urgency(slo_class=name), 0.0)
        assert ahead >= cost  # at least who has just come in the same class
        if what == "leave":
            assert queue.remove(key)
            assert not queue.remove(key)
        elif what == "serve":
            queue.take(key)
    waiting = {f"{c}" for c, _, what in events if what == "stay"}
    owing = sum(1 for c in queue._classes.values() if not c.line)
    assert len(queue._classes) == len(waiting) + owing
    for _ in range(len(queue)):
        key = queue.peek()
        assert key is not None
        queue.take(key)
    assert queue.peek() is None


@dataclass
class Served:
    """A prefill engine in virtual time; each step takes `STEP_S`."""

    scheduler: Scheduler
    clock: VirtualClock
    first_step: dict[str, int]
    steps: int = 0

    @classmethod
    def new(cls, *, blocks: int = 400, budget: int = 16, running: int = 8, waiting: int = 64) -> Served:
        pool, clock = BlockPool(blocks, 4), VirtualClock()
        scheduler = Scheduler(
            block_pool=pool,
            prefix_cache=PrefixCache(pool, True),
            policy=policy_for(Role.PREFILL),
            clock=clock,
            max_batched_tokens=budget,
            max_running=running,
            max_waiting=waiting,
            max_model_len=1024,
            eos_token_ids=(0,),
        )
        return cls(scheduler, clock, {})

    def add(self, seq_id: str, prompt: int, urgent: Urgency, handoff: Handoff = Handoff.NONE) -> None:
        start = 1000 * len(seq_id) + sum(map(ord, seq_id)) * 7919
        self.scheduler.add(
            SequenceSpec(
                seq_id=seq_id,
                prompt_token_ids=tuple(range(start, start + prompt)),
                sampling=SamplingParams(max_tokens=1 if handoff is not Handoff.IN else 2),
                handoff=handoff,
                urgency=urgent,
            )
        )

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            drawn = [RowOutput(row.seq_id, (SampledToken(5),) if row.sample else ()) for row in plan.rows]
            self.scheduler.complete(StepOutput(plan.plan_id, tuple(drawn)))
        self.scheduler.check_integrity()
        self.steps += 1
        self.clock.advance(STEP_S)
        for event in self.scheduler.take_events():
            if isinstance(event, TokensEmitted):
                self.first_step.setdefault(event.seq_id, self.steps)
            elif isinstance(event, BlocksGranted):  # its KV comes at once
                self.scheduler.kv_ready(event.seq_id, SampledToken(5))


@settings(max_examples=60, deadline=None)
@given(
    waiters=st.lists(
        st.tuples(
            CLASSES,
            st.integers(1, 60),
            st.sampled_from([math.inf, 1.0, 30.0]),
            st.sampled_from([Handoff.NONE, Handoff.NONE, Handoff.IN]),
        ),
        min_size=1,
        max_size=40,
    ),
    per_step=st.integers(1, 5),
    blocks=st.sampled_from([16, 40, 400]),
)
def test_everybody_is_served_and_equals_in_the_order_of_their_arrival(
    waiters: list[tuple[str, int, float, Handoff]], per_step: int, blocks: int
) -> None:
    engine, left = Served.new(blocks=blocks), list(enumerate(waiters))
    bound = 4 * sum(prompt for _, prompt, _, _ in waiters) + len(waiters) + 10
    while len(engine.first_step) < len(waiters):
        for number, (slo_class, prompt, due_s, handoff) in left[:per_step]:
            deadline_s = engine.clock.now_s() + due_s
            engine.add(str(number), prompt, urgency(slo_class, deadline_s), handoff)
        del left[:per_step]
        engine.step()
        assert engine.steps <= bound, "somebody is never served"
    for slo_class in SHARES:
        for due_s in (math.inf, 1.0, 30.0):
            # Pulled ones wait for blocks, the others for tokens: each kind is in order.
            for kind in (Handoff.NONE, Handoff.IN):
                line = [n for n, (c, _, d, h) in enumerate(waiters) if (c, d, h) == (slo_class, due_s, kind)]
                assert [engine.first_step[str(n)] for n in line] == sorted(engine.first_step[str(n)] for n in line)


@given(shares=st.sampled_from([(100.0, 1.0), (1.0, 1.0), (1.0, 0.01)]), prompt=st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_batch_work_is_done_under_an_endless_stream_of_urgent_work(shares: tuple[float, float], prompt: int) -> None:
    """More urgent tokens come than a step can take: batch still gets its share of them, so a bounded number of steps
    is enough.
    """
    engine, budget = Served.new(), 16
    engine.add("batch", prompt, Urgency(slo_class="batch", share=shares[1]))
    bound = 3 + math.ceil(2 * (prompt + budget) * (shares[0] + shares[1]) / shares[1] / budget)
    while "batch" not in engine.first_step:
        for number in range(2):
            if engine.scheduler.load().waiting < 32:
                due_s = engine.clock.now_s() + 0.1
                urgent = Urgency(slo_class="interactive", share=shares[0], deadline_s=due_s)
                engine.add(f"u{engine.steps}.{number}", budget, urgent)
        engine.step()
        assert engine.steps <= bound


def test_inside_a_class_nobody_waits_longer_than_everybodys_patience() -> None:
    engine = Served.new()
    engine.add("patient", 40, Urgency())
    while "patient" not in engine.first_step:
        engine.add(f"u{engine.steps}", 16, Urgency(deadline_s=engine.clock.now_s() + 1.0))
        engine.step()
        assert engine.steps <= PATIENCE_S / STEP_S + 10
    assert engine.steps > 40 / 16 + 1, "the others had deadlines: they went before"


def test_an_urgent_prompt_waits_for_a_few_chunks_of_a_long_one_not_for_all() -> None:
    engine = Served.new(blocks=400, budget=16)
    engine.add("long", 1000, urgency("batch"))
    for _ in range(5):
        engine.step()
    engine.add("chat", 40, urgency("interactive", engine.clock.now_s() + 1.0))
    while len(engine.first_step) < 2:
        engine.step()
    assert engine.first_step["chat"] <= 5 + math.ceil(40 / 16)
    assert engine.first_step["long"] == math.ceil(1040 / 16), "no step was wasted"
