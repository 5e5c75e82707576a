"""One engine in virtual time, for claims about scheduling: the real `Scheduler`, block pool and policies, and a step
profile instead of a device. Nothing sleeps, and equal input gives equal output.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..clock import VirtualClock
from ..engine.block_pool import BlockPool
from ..engine.plan import RowOutput, StepOutput, StepPlan
from ..engine.policies import policy_for
from ..engine.prefix_cache import PrefixCache
from ..engine.scheduler import Scheduler
from ..engine.scheduler_events import SequenceFailed, TokensEmitted
from ..engine.step_shape import step_shape
from ..latency.profile import StepProfile
from ..types import Role, SampledToken, SamplingParams, SequenceSpec

MAX_JOBS = 2**20
_TOKEN = SampledToken(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: when it comes and its lengths."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What became of a job, seconds of virtual time."""

    job: Job
    first_token_s: float
    last_token_s: float
    batch_end_s: float
    """When the engine was next without any sequence, at request level; else as `last_token_s`. Systems before Orca
    returned an answer only then."""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.job.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token, first token excluded; None for one token."""
        others = self.job.output_tokens - 1
        return (self.last_token_s - self.first_token_s) / others if others else None

    def normalized_s(self, *, with_batch: bool = False) -> float:
        """End-to-end latency by output token (Orca §6.2); `with_batch`: the answer comes when its batch has ended."""
        end_s = self.batch_end_s if with_batch else self.last_token_s
        return (end_s - self.job.arrival_s) / self.job.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What the engine may hold and do in a step."""

    num_blocks: int
    block_size: int = 16
    max_batched_tokens: int = 2048
    max_running: int = 256
    max_model_len: int = 2048
    batching: str = "iteration"


class VirtualEngine:
    """A mixed worker's engine without the worker. `run` once."""

    def __init__(self, shape: EngineShape, profile: StepProfile) -> None:
        self.clock = VirtualClock()
        self.pool = BlockPool(shape.num_blocks, shape.block_size)
        self.scheduler = Scheduler(
            block_pool=self.pool,
            prefix_cache=PrefixCache(self.pool, enabled=False),
            policy=policy_for(Role.MIXED, shape.batching),
            clock=self.clock,
            max_batched_tokens=max(shape.max_batched_tokens, shape.max_running),
            max_running=shape.max_running,
            max_waiting=MAX_JOBS,
            max_model_len=shape.max_model_len,
            eos_token_ids=(),
        )
        self._profile = profile
        self._by_batch = shape.batching == "request"
        self._left: dict[str, Job] = {}
        self._first_s: dict[str, float] = {}
        self._ended: list[tuple[Job, float, float]] = []
        """(job, first token, last token) of those whose batch goes on."""

    def run(
        self,
        jobs: Sequence[Job],
        *,
        on_step: Callable[[StepPlan], None] | None = None,
        until_s: float = math.inf,
    ) -> list[Served]:
        """Serves the jobs (in order of arrival) and returns those that ended before `until_s`, in order of their end.

        `on_step` is called when a step has been planned and every sequence holds its blocks for it.
        """
        coming: deque[tuple[str, Job]] = deque((str(number), job) for number, job in enumerate(jobs))
        served: list[Served] = []
        while self.clock.now_s() < until_s:
            while coming and coming[0][1].arrival_s <= self.clock.now_s():
                self._add(*coming.popleft())
            plan = self.scheduler.schedule()
            if plan is None:
                if not coming:
                    break
                self.clock.advance(coming[0][1].arrival_s - self.clock.now_s())
                continue
            if on_step is not None:
                on_step(plan)
            shape = step_shape(plan)
            self.clock.advance(
                self._profile.step_time_s(
                    shape.prefill_tokens, shape.prefill_squares, shape.decode_rows, shape.context_tokens
                )
            )
            rows = tuple(RowOutput(row.seq_id, (_TOKEN,) if row.sample is not None else ()) for row in plan.rows)
            self.scheduler.complete(StepOutput(plan.plan_id, rows, 0.0))
            served += self._take_events()
        return served

    def _add(self, seq_id: str, job: Job) -> None:
        self._left[seq_id] = job
        self.scheduler.add(
            SequenceSpec(
                seq_id=seq_id,
                prompt_token_ids=(0,) * job.prompt_tokens,
                sampling=SamplingParams(temperature=0.0, max_tokens=job.output_tokens, ignore_eos=True),
                arrival_s=job.arrival_s,
            )
        )

    def _take_events(self) -> Iterable[Served]:
        now_s = self.clock.now_s()
        for event in self.scheduler.take_events():
            assert not isinstance(event, SequenceFailed), event
            if not isinstance(event, TokensEmitted):
                continue
            self._first_s.setdefault(event.seq_id, now_s)
            if event.finish_reason is not None:
                self._ended.append((self._left.pop(event.seq_id), self._first_s.pop(event.seq_id), now_s))
        if self._ended and (not self._by_batch or self.scheduler.load().running == 0):
            for job, first_s, last_s in self._ended:
                end_s = now_s if self._by_batch else last_s
                yield Served(job=job, first_token_s=first_s, last_token_s=last_s, batch_end_s=end_s)
            self._ended = []
