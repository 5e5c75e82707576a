"""What a worker tells routers of its steps: the fit that they predict from, fed with each step as virtual time does it
(`sim.engine`).

One step after another: its sizes and its time. In a pipeline of S stages, S plans are under way at the same time, and
routers want to know of answers how long a token takes, whole, among all that decode; of prompts how fast a queue of
them goes, by stages:

    rows that decode     all of those under way     the plan's time, through all stages
    with a prompt        the plan's                 since the plan before was done, or a stage's share of its time
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from ..engine.plan import StepPlan
from ..engine.step_shape import step_shape
from ..latency.linear import OnlineStepTimeFit


class HeardSteps:
    """Feeds a fit. One thread."""

    def __init__(self, fit: OnlineStepTimeFit, stages: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._fit = fit
        self._stages = stages
        self._clock = clock
        self._done_s = 0.0
        """When the plan before was done."""

    def observe(self, plan: StepPlan, beside: Iterable[StepPlan], duration_s: float) -> None:
        """`plan` is done after `duration_s`; those `beside` it are under way."""
        shape = step_shape(plan)
        rows, context_tokens = shape.decode_rows, shape.context_tokens
        if self._stages > 1:
            now_s = self._clock()
            if shape.prefill_tokens:
                since_s, self._done_s = now_s - self._done_s, now_s
                duration_s = since_s if since_s < duration_s else duration_s / self._stages
            else:
                self._done_s = now_s
                for other in map(step_shape, beside):
                    rows += other.decode_rows
                    context_tokens += other.context_tokens
        self._fit.observe(shape.prefill_tokens, rows, context_tokens, duration_s)
