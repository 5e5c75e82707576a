"""A scheduler whose device is done at once, for tests that step it by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.plan import RowOutput, StepOutput, StepPlan
from tandem.cluster.engine.policies import BatchPolicy, MixedPolicy
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import (
    SchedulerEvent,
    TokensEmitted,
)
from tandem.cluster.types import Handoff, SampledToken, SamplingParams, SequenceSpec

EOS = 0


class Engine:
    """A scheduler whose device draws token 100 + output index at once, or what `draw` says."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        size: int = 4,
        budget: int = 64,
        running: int = 8,
        plans: int = 1,
        policy: BatchPolicy | None = None,
    ) -> None:
        self.clock = VirtualClock(10.0)
        self.pool = BlockPool(blocks, size)
        self.draw: Callable[[str, int], int] = lambda seq_id, index: 100 + index
        self.events: list[SchedulerEvent] = []
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.scheduler = Scheduler(
            block_pool=self.pool,
            prefix_cache=PrefixCache(self.pool, True),
            policy=policy or MixedPolicy(),
            clock=self.clock,
            max_batched_tokens=budget,
            max_running=running,
            max_waiting=64,
            max_model_len=128,
            eos_token_ids=(EOS,),
            max_outstanding_plans=plans,
        )

    def add(
        self, seq_id: str, prompt: int = 8, handoff: Handoff = Handoff.NONE, *, text: str = "", **sampling: object
    ) -> None:
        start = 1000 * (1 + sum(map(ord, text or seq_id)))
        params = SamplingParams(**{"max_tokens": 4, **sampling})  # type: ignore[arg-type]
        self.scheduler.add(
            SequenceSpec(
                seq_id=seq_id,
                prompt_token_ids=tuple(range(start, start + prompt)),
                sampling=params,
                handoff=handoff,
                arrival_s=self.clock.now_s(),
            )
        )

    def finish(self, plan: StepPlan) -> None:
        rows = []
        for row in plan.rows:
            drawn = () if row.sample is None else (SampledToken(self.draw(row.seq_id, row.sample.output_index)),)
            rows.append(RowOutput(row.seq_id, drawn))
        self.scheduler.complete(StepOutput(plan.plan_id, tuple(rows)))

    def step(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.finish(plan)
        self.scheduler.check_integrity()
        for event in self.scheduler.take_events():
            self.events.append(event)
            if isinstance(event, TokensEmitted):
                self.tokens[event.seq_id] += [token.token_id for token in event.tokens]
        return plan

    def last(self, seq_id: str) -> TokensEmitted:
        return [e for e in self.events if isinstance(e, TokensEmitted) and e.seq_id == seq_id][-1]


def rows(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(row.seq_id, row.start, len(row.token_ids)) for row in plan.rows]
