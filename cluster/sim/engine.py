"""One engine in virtual time: what `cluster.worker.engine_thread` is in real time, with a latency model for a device.

Commands run between two steps; grants are told before the step that they come with, the rest after it. Decode steps
that are alike are taken together (`cluster.engine.quiet_run`): a run ends early, at the end of the step under way, when
a command comes, exactly as the thread would have taken it up then.

Of a pipeline of S stages, a new plan may begin as soon as the slowest stage is free, and is done after S of them; rows
that decode, where no prompt is beside them, are split into S micro-batches, of which each is in another stage
(DistServe, OSDI '24, §4.1): one plan or a run of them costs the same.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

from ..engine.plan import RowOutput, StepOutput, StepPlan
from ..engine.quiet_run import QuietRun
from ..engine.scheduler import Scheduler
from ..engine.scheduler_events import SchedulerEvent
from ..engine.step_shape import StepShape, padded_shape, shape_beside, step_shape
from ..latency.interface import StepCosts
from ..latency.linear import PRIOR_STEPS, OnlineStepTimeFit, linear_terms
from ..types import Role, SampledToken, StepTimeCoefficients
from .observer import StepSpan
from .timeline import Event, Timeline

TOKEN = SampledToken(1)
"""What every step draws: a token that ends nothing."""
FIRST_RUN_STEPS, MAX_RUN_STEPS = 16, 1024
T = TypeVar("T")


class SimEngine:
    """Owned by one simulated worker. `submit` at any time; `on_events` is called in virtual time, as in the runtime."""

    def __init__(
        self,
        timeline: Timeline,
        scheduler: Scheduler,
        costs: StepCosts,
        on_events: Callable[[Sequence[SchedulerEvent]], None],
        *,
        worker_id: str = "",
        on_span: Callable[[StepSpan], None] | None = None,
        prior: StepTimeCoefficients | None = None,
        beyond_stage_s: float = 0.0,
        pads_prompts: bool = False,
    ) -> None:
        """`on_span`: told of every step and run; `prior`: what the worker says of its steps before it has run one;
        `beyond_stage_s`: of this module, for the worker's role; `pads_prompts`: as the scheduler's policy has it.
        """
        self._shape = padded_shape if pads_prompts else step_shape
        self._timeline = timeline
        self.scheduler = scheduler
        self._costs = costs
        self._stages = costs.pipeline_stages
        self._beyond_stage_s = beyond_stage_s
        self._on_events = on_events
        self._worker_id = worker_id
        self._on_span = on_span
        self._stopped = False
        self._commands: deque[tuple[Callable[[Scheduler, Any], object], object]] = deque()
        self._run: _Run | None = None
        self._run_steps = FIRST_RUN_STEPS
        self._stage_free_s = 0.0
        self._done_s = 0.0
        """When the last plan is done: plans leave a pipeline in the order in which they came."""
        self._planned = 0
        """Plans that are under way."""
        self._looking = False
        self._boundary: Event | None = None
        """When the engine looks for work again."""
        self.steps_total = 0
        self.fit = OnlineStepTimeFit() if prior is None else OnlineStepTimeFit(prior, prior_steps=PRIOR_STEPS)
        """What the worker reports, and routers predict from."""
        self._known_steps = self.fit.steps

    def submit(self, command: Callable[[Scheduler, T], object], what: T) -> None:
        """Runs `command(scheduler, what)` between two steps."""
        if self._stopped:
            return
        self._commands.append((command, what))
        if self._run is not None:
            self._cut(self._run)
        elif not self._looking and self._planned < self._stages and self._boundary is None:
            self._look_at(max(self._timeline.time_s, self._stage_free_s))

    @property
    def learned_steps(self) -> int:
        """Steps that the fit stands for, those of runs one by one."""
        return self._known_steps + self.steps_total

    def steps_under_way(self) -> tuple[int, int]:
        """(steps, rows) of the run under way that are done already, though the scheduler has not heard of them."""
        run = self._run
        if run is None or run.prompts:
            return 0, 0
        return bisect_right(run.ends_s, self._timeline.time_s - run.begin_s, 0, run.steps), run.rows

    def drawn(self, seq_id: str) -> int:
        """Output tokens of that sequence by now; 0 where there is none."""
        drawn = self.scheduler.drawn(seq_id)
        return drawn + self.steps_under_way()[0] if drawn and self.scheduler.decodes(seq_id) else drawn

    def stop(self) -> None:
        """Its worker is no more: nothing happens here any more."""
        self._stopped = True
        self._commands.clear()
        if self._run is not None:
            self._run.end.cancel()
        if self._boundary is not None:
            self._boundary.cancel()

    def _look(self) -> None:
        """Between two steps: commands, then the next step or run."""
        self._boundary, self._looking = None, True
        scheduler, commands = self.scheduler, self._commands
        run = plan = None
        while True:
            while commands:
                command, what = commands.popleft()
                command(scheduler, what)
            if scheduler.has_work:
                run = None if self._planned else scheduler.begin_run(self._run_steps)
                plan = None if run is not None else scheduler.schedule()
            self._publish()
            if run is not None or plan is not None or not commands:
                break
        self._looking = False
        if run is not None:
            self._begin_run(run)
        elif plan is not None:
            self._begin(plan)

    # --- steps one by one -------------------------------------------------------------------------------------------

    def _begin(self, plan: StepPlan) -> None:
        shape, now_s = self._shape(plan), self._timeline.time_s
        step_s, stage_s = self._times_s(shape)
        heard_s = stage_s + self._beyond_stage_s if shape.prefill_tokens else step_s
        self.fit.observe(shape.prefill_tokens, shape.decode_rows, shape.context_tokens, heard_s)
        self._planned += 1
        self.steps_total += 1
        self._stage_free_s = now_s + stage_s
        # The last stage takes a plan up when the one before has left it: a small one behind a large one is a bubble.
        self._done_s = max(self._done_s + step_s / self._stages, now_s + step_s)
        self._timeline.do_at(self._done_s, partial(self._complete, plan, shape, now_s))
        if self._stages > 1:
            self._look_at(self._stage_free_s)

    def _times_s(self, shape: StepShape) -> tuple[float, float]:
        """How long the step takes, and after how long the next one may begin."""
        if self._stages > 1 and not shape.prefill_tokens:
            step_s = self._costs.step_time_s(0, 0, *self._micro_batch(shape.decode_rows, shape.context_tokens))
            return step_s, step_s
        sizes = (shape.prefill_tokens, shape.prefill_squares, shape.decode_rows, shape.context_tokens)
        step_s = self._costs.step_time_s(*sizes)
        return step_s, step_s if self._stages == 1 else self._costs.stage_time_s(*sizes)

    def _micro_batch(self, rows: int, context_tokens: int) -> tuple[int, int]:
        """Of decode rows alone: the rows of the largest one, and their share of the context, which grows by a token a
        row.
        """
        if self._stages == 1:
            return rows, context_tokens
        largest = -(-rows // self._stages)
        return largest, largest * context_tokens // rows

    def _complete(self, plan: StepPlan, shape: StepShape, began_s: float) -> None:
        if self._stopped:
            return
        self._planned -= 1
        if self._on_span is not None:
            self._tell(self._on_span, began_s, 1, shape)
        rows = tuple([RowOutput(row.seq_id, (TOKEN,) if row.sample is not None else ()) for row in plan.rows])
        self.scheduler.complete(StepOutput(plan.plan_id, rows))
        self._tell_now()
        self._look_soon(max(self._timeline.time_s, self._stage_free_s))

    def _look_soon(self, at_s: float) -> None:
        """Between two steps, with nothing else to be done: as `_look_at`, but at once where nobody comes before."""
        if at_s > self._timeline.time_s or self._boundary is not None or not self._timeline.nothing_now():
            self._look_at(at_s)
        else:
            self._look()

    def _look_at(self, at_s: float) -> None:
        if self._boundary is None and self._run is None:
            self._boundary = self._timeline.at(at_s, self._look)

    # --- runs -------------------------------------------------------------------------------------------------------

    def _begin_run(self, run: QuietRun) -> None:
        now_s = self._timeline.time_s
        if run.prompts:
            ends_s: Sequence[float] = (self._begin_mixed(run),)
        else:
            ends_s = self._costs.decode_steps(*self._micro_batch(run.decode_rows, run.context_tokens), run.steps)
        end = self._timeline.at(now_s + ends_s[-1], self._end_run)
        self._run = _Run(now_s, run, ends_s, end)
        if self._commands:  # which came while it was looked for
            self._cut(self._run)

    def _begin_mixed(self, run: QuietRun) -> float:
        """How long a step takes that has prompts beside the rows that decode."""
        shape = shape_beside(run.prompts, run.decode_rows, run.context_tokens)
        step_s, _ = self._times_s(shape)
        self.fit.observe(shape.prefill_tokens, shape.decode_rows, shape.context_tokens, step_s)
        self.steps_total += 1
        return step_s

    def _cut(self, run: _Run) -> None:
        """A command waits: the run ends with the step under way."""
        if run.steps == 1:
            return
        steps = bisect_left(run.ends_s, self._timeline.time_s - run.begin_s) + 1
        if steps < run.steps:
            run.end.cancel()
            run.steps = steps
            ends_s = max(self._timeline.time_s, run.begin_s + run.ends_s[steps - 1])
            run.end = self._timeline.at(ends_s, self._end_run)
            self._run_steps = max(FIRST_RUN_STEPS, 2 * steps)

    def _end_run(self) -> None:
        run = self._run
        assert run is not None
        self._run = None
        if not run.prompts:
            if run.steps == self._run_steps:
                self._run_steps = min(MAX_RUN_STEPS, 2 * self._run_steps)
            self.steps_total += run.steps
            self.fit.observe(0, run.rows, run.context_tokens, run.ends_s[0])
        if self._on_span is not None:
            shape = shape_beside(run.prompts, run.rows, run.context_tokens)
            self._tell(self._on_span, run.begin_s, run.steps, shape)
        self.scheduler.take_run(run.steps, TOKEN)
        self._tell_now()
        self._look_soon(self._timeline.time_s)

    # --- what is told -----------------------------------------------------------------------------------------------

    def _tell(self, on_span: Callable[[StepSpan], None], start_s: float, steps: int, shape: StepShape) -> None:
        on_span(
            StepSpan(
                worker_id=self._worker_id,
                start_s=start_s,
                end_s=self._timeline.time_s,
                steps=steps,
                prefill_tokens=shape.prefill_tokens,
                decode_rows=shape.decode_rows,
                context_tokens=shape.context_tokens,
            )
        )

    def _tell_now(self) -> None:
        """After a step: commands that come of what is told are taken up when the engine looks, which it will."""
        self._looking = True
        self._publish()
        self._looking = False

    def _publish(self) -> None:
        events = self.scheduler.take_events()
        if events:
            self._on_events(events)


def beyond_stage_s(costs: StepCosts, role: Role) -> float:
    """What a worker adds to the stage's time of a step with prompts before it tells routers: of prompts they want to
    know how fast a queue of them goes, by stages, and of answers how long a token takes, whole. One line is fitted to
    both kinds of steps, so where both come they must begin alike: else the difference is laid to the rows, and an idle
    worker looks slower than a full one.
    """
    return costs.step_time_s(0, 0, 1, 1) - costs.stage_time_s(0, 0, 1, 1) if role is Role.MIXED else 0.0


@lru_cache(maxsize=256)
def prior_of(costs: StepCosts, role: Role) -> StepTimeCoefficients:
    """What a worker of these costs says of its steps before it has run one; see `beyond_stage_s` for pipelines."""
    stages, beyond_s = costs.pipeline_stages, beyond_stage_s(costs, role)

    def heard_s(prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        if prefill_tokens:
            return costs.stage_time_s(prefill_tokens, prefill_squares, decode_rows, context_tokens) + beyond_s
        rows = -(-decode_rows // stages)
        return costs.step_time_s(0, 0, rows, rows * context_tokens // decode_rows)

    return linear_terms(heard_s, role=role)


class _Run:
    """A run under way."""

    __slots__ = ("begin_s", "context_tokens", "end", "ends_s", "prompts", "rows", "steps")

    def __init__(self, begin_s: float, run: QuietRun, ends_s: Sequence[float], end: Event) -> None:
        self.begin_s = begin_s
        self.rows = run.decode_rows
        self.context_tokens = run.context_tokens
        self.ends_s = ends_s
        """When each of its steps ends, from its begin."""
        self.end = end
        self.steps = run.steps
        self.prompts = run.prompts
