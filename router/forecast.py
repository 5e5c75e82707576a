"""What a request that came now would wait for its first token: at the router, in a prefill worker's queue, and for its
own prompt. Pure; from the workers' views, their step-time models and what the router knows to wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..cluster.latency.linear import step_time_model
from ..cluster.types import Role, Urgency
from .placement import WorkerView

LEARNED_STEPS = 8
"""Steps after which a worker's coefficients are more than a guess."""
QUEUE_S = 0.1
"""How much work the router lets wait in a prefill worker's own queue behind the step that runs. Enough that the worker
never waits for the router; the rest waits here, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Seconds."""

    wait_s: float
    """Until its own prompt is begun."""
    own_s: float
    """The steps of its own prompt, on the worker that would be done first."""
    idle_s: float
    """Its own prompt, on the best worker of an idle cluster."""

    @property
    def ttft_s(self) -> float:
        """From now to the first token."""
        return self.wait_s + self.own_s


def learned(views: Sequence[WorkerView]) -> tuple[WorkerView, ...]:
    """The views with coefficients that were measured: workers that have hardly run a step are taken to be as one that
    has. Empty while nobody has.
    """
    known = [view for view in views if view.steps_total >= LEARNED_STEPS]
    if len(known) == len(views):
        return tuple(views)
    if not known:
        return ()
    return tuple(
        view if view.steps_total >= LEARNED_STEPS else view._replace(step_time=known[0].step_time) for view in views
    )


def _beside(view: WorkerView) -> tuple[int, int, int]:
    """(prompt tokens that a full step of this worker has room for, decode rows beside them, their context)."""
    if view.role is not Role.MIXED:
        return view.max_batched_tokens, 0, 0
    rows = min(view.running, view.max_batched_tokens - 1)
    return view.max_batched_tokens - rows, rows, view.context_tokens


def tokens_per_s(view: WorkerView) -> float:
    """Prompt tokens that this worker computes in a second of full steps."""
    room, rows, context_tokens = _beside(view)
    return room / max(step_time_model(view.step_time).step_time_s(room, rows, context_tokens), 1e-9)


def room_tokens(views: Sequence[WorkerView], urgency: Urgency) -> float:
    """Prompt tokens of such urgency that may yet be sent to these workers before some have to wait at the router. Every
    stage of a pipeline has its own, or all but one would stand idle.
    """
    rooms = [
        view.pipeline_stages * (view.max_batched_tokens + QUEUE_S * tokens_per_s(view)) - view.tokens_before(urgency)
        for view in views
    ]
    return sum([room for room in rooms if room > 0.0])


def forecast(
    views: Sequence[WorkerView],
    uncached_tokens: Mapping[str, int],
    *,
    urgency: Urgency,
    ahead_tokens: float,
    decode_wait_s: float,
) -> Forecast | None:
    """For a prompt of such urgency, of which each worker lacks `uncached_tokens`, behind `ahead_tokens` at the router.
    `decode_wait_s`: how long the decode side keeps the router's queue, where that is what it waits for. None: nobody
    knows, because no worker has learned its step times yet.
    """
    views = learned(views)
    if not views:
        return None
    queue_s: dict[str, float] = {}
    own_s: dict[str, float] = {}
    idle_s = math.inf
    for view in views:
        model, beside = step_time_model(view.step_time), _beside(view)
        queue_s[view.worker_id] = model.predict_prefill_s(view.tokens_before(urgency), *beside)
        alone_s = model.predict_prefill_s(max(1, uncached_tokens[view.worker_id]), *beside)
        # A prompt is done when its step is. Where more waits than a step has room for, its step is full of others too.
        others = min(beside[0], max(0.0, view.queued_prefill_tokens + ahead_tokens - beside[0]))
        own_s[view.worker_id] = max(alone_s, model.predict_prefill_s(others, *beside))
        idle_s = min(idle_s, alone_s)
    level_s = max(_level_s(views, queue_s, ahead_tokens), decode_wait_s)
    best = min(views, key=lambda view: (max(queue_s[view.worker_id], level_s) + own_s[view.worker_id], view.worker_id))
    return Forecast(
        wait_s=max(queue_s[best.worker_id], level_s),
        own_s=own_s[best.worker_id],
        idle_s=idle_s,
    )


def _level_s(views: Sequence[WorkerView], queue_s: Mapping[str, float], ahead_tokens: float) -> float:
    """When what waits ahead has been begun: every worker takes of it as soon as its own queue is done, like water that
    fills a vessel with steps.
    """
    if ahead_tokens <= 0:
        return 0.0
    rate = filled = 0.0
    by_queue = sorted(views, key=lambda view: queue_s[view.worker_id])
    for index, view in enumerate(by_queue):
        rate += tokens_per_s(view)
        filled += tokens_per_s(view) * queue_s[view.worker_id]
        level_s = (ahead_tokens + filled) / rate
        if index + 1 == len(by_queue) or level_s <= queue_s[by_queue[index + 1].worker_id]:
            return level_s
    raise AssertionError("the last worker takes what is left")
