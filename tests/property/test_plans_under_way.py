"""The rule by which plans follow each other is one: the worker's engine thread and virtual time make the same plans, of
one device and of a pipeline, whatever they are given to compute.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.clock import Clock, VirtualClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.plan import RowOutput, StepOutput, StepPlan
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import SchedulerEvent, TokensEmitted
from tandem.cluster.engine.step_shape import step_shape
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.sim.engine import TOKEN, SimEngine
from tandem.cluster.sim.timeline import Timeline
from tandem.cluster.types import Role, SamplingParams, SequenceSpec
from tandem.cluster.worker.engine_thread import EngineThread

WAIT_S = 20.0
Rows = list[tuple[str, int, int]]


class Pipeline:
    """A device on a clock of its own: `launch` takes the first stage's time, `collect` waits for the last one."""

    late_steps_total = 0
    looks_ahead = False

    def __init__(self, costs: StepProfile, clock: VirtualClock) -> None:
        self.plans_ahead = costs.pipeline_stages
        self._costs, self._clock = costs, clock
        self._done_s = 0.0
        self._launched: deque[tuple[StepPlan, float]] = deque()

    def launch(self, plan: StepPlan) -> None:
        shape, stages, now_s = step_shape(plan), self.plans_ahead, self._clock.now_s()
        sizes = (shape.prefill_tokens, shape.prefill_squares, shape.decode_rows, shape.context_tokens)
        step_s, stage_s = self._costs.step_time_s(*sizes), self._costs.stage_time_s(*sizes)
        if not shape.prefill_tokens and stages > 1:  # micro-batches, one in each stage
            rows = -(-shape.decode_rows // stages)
            stage_s = step_s = self._costs.step_time_s(0, 0, rows, rows * shape.context_tokens // shape.decode_rows)
        self._done_s = max(self._done_s + step_s / stages, now_s + step_s)
        self._launched.append((plan, self._done_s))
        self._clock.advance(stage_s)

    def done(self) -> bool:
        return bool(self._launched) and self._launched[0][1] <= self._clock.now_s()

    def wait(self, wake: threading.Event) -> bool:
        return True

    def collect(self) -> StepOutput:
        plan, done_s = self._launched.popleft()
        self._clock.advance(max(0.0, done_s - self._clock.now_s()))
        rows = [RowOutput(row.seq_id, () if row.sample is None else (TOKEN,)) for row in plan.rows]
        return StepOutput(plan.plan_id, tuple(rows), 0.001)


class Watched(Scheduler):
    """Remembers its plans."""

    def __init__(self, clock: Clock, stages: int, blocks: int, role: Role) -> None:
        pool = BlockPool(blocks, 4)
        super().__init__(
            block_pool=pool,
            prefix_cache=PrefixCache(pool, enabled=False),
            policy=policy_for(role),
            clock=clock,
            max_batched_tokens=16,
            max_running=6,
            max_waiting=100,
            max_model_len=64,
            eos_token_ids=(),
            max_outstanding_plans=stages,
        )
        self.plans: list[Rows] = []

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        if plan is not None:
            self.plans.append([(row.seq_id, row.start, len(row.token_ids)) for row in plan.rows])
        return plan


SEQUENCES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=10)
TERMS = st.sampled_from([0.0, 0.75])  # whose shares of a stage are exact


@settings(max_examples=40, deadline=None)
@given(
    sequences=SEQUENCES,
    stages=st.integers(1, 3),
    blocks=st.integers(12, 40),
    role=st.sampled_from(Role),
    token_s=TERMS,
    row_s=TERMS,
)
def test_the_engine_thread_makes_the_plans_of_virtual_time(
    sequences: list[tuple[int, int]], stages: int, blocks: int, role: Role, token_s: float, row_s: float
) -> None:
    decode = DecodeTerms(step_s=1.5, row_s=row_s, context_token_s=0.0)
    costs = StepProfile(
        prefill_step_s=1.5,
        prefill_token_s=token_s,
        decode=decode,
        large_decode=decode,
        large_batch_rows=1,
        pipeline_stages=stages,
    )
    specs = [
        SequenceSpec(seq_id=str(n), prompt_token_ids=(1,) * prompt, sampling=SamplingParams(max_tokens=answer))
        for n, (prompt, answer) in enumerate(sequences)
    ]
    timeline = Timeline()
    virtual = Watched(timeline, stages, blocks, role)
    with patch.object(Scheduler, "begin_run", lambda self, limit: None):
        engine = SimEngine(timeline, virtual, costs, lambda events: None)
        timeline.do_at(0.0, lambda: engine.submit(lambda scheduler, _: add_all(scheduler, specs), None))
        timeline.run()
    clock, over, left = VirtualClock(), threading.Event(), {spec.seq_id for spec in specs}

    def hear(events: Sequence[SchedulerEvent]) -> None:
        for event in events:
            if isinstance(event, TokensEmitted) and event.finish_reason is not None:
                left.discard(event.seq_id)
        if not left:
            over.set()

    real, failures = Watched(clock, stages, blocks, role), list[BaseException]()
    device: Any = Pipeline(costs, clock)
    thread = EngineThread(real, device, on_events=hear, on_failure=failures.append)
    thread.submit(lambda scheduler: add_all(scheduler, specs))
    thread.start()
    assert over.wait(WAIT_S)
    thread.stop(WAIT_S)
    assert not failures
    assert real.plans == virtual.plans


def add_all(scheduler: Scheduler, specs: Sequence[SequenceSpec]) -> None:
    for spec in specs:
        scheduler.add(spec)
