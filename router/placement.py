"""Which worker should take a request: pure rankings over what the router knows. Hints only: workers decide, and may
refuse.

Prefill workers are ranked by predicted TTFT (queued tokens, cached prefix), decode workers by predicted TPOT among
those whose KV can take the request (free KV, running batch). Ties go to the lower worker id, so that equal input
gives equal output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..cluster.latency.linear import DEFAULT_TOKEN_BUDGET, step_time_model
from ..cluster.types import Role, StepTimeCoefficients, Urgency

ANSWER_TOKENS = 128
"""What an answer is taken for where its length decides; about the mean of conversations."""


class WorkerView(NamedTuple):
    """One routable worker as the router sees it now: its last heartbeat, corrected by what this router sent since. A
    named tuple: one is made whenever anything is sent, in a quarter of a frozen dataclass's time.
    """

    worker_id: str
    role: Role
    fingerprint: str
    """Of its KV, layout included: workers with the same one can hand off to each other."""
    block_size: int
    num_blocks: int
    available_blocks: int
    credited_blocks: int
    credit_limit_blocks: int
    queued_prefill_tokens: int
    running: int
    waiting: int
    max_running: int
    max_waiting: int
    context_tokens: int
    step_time: StepTimeCoefficients
    steps_total: int = 0
    """Steps that its coefficients stand for, run or known beforehand: they are a guess until there are some."""
    patient_prefill_tokens: int = 0
    """Of `queued_prefill_tokens`: those that are due at no time."""
    pipeline_stages: int = 1
    """It works on as many prompts at once."""
    max_batched_tokens: int = DEFAULT_TOKEN_BUDGET
    """Token budget of its steps."""
    tightest_tpot_s: float = math.inf
    """The tightest promise among the choices that this router decodes there; inf: none."""

    def tokens_before(self, urgency: Urgency) -> int:
        """Queued prompt tokens that are computed before those of somebody who came now: work without a deadline, under
        way or not, lets that with one go first (`cluster.engine.service_queue`), but for its class's share.
        """
        patient = self.patient_prefill_tokens if math.isfinite(urgency.deadline_s) else 0
        return self.queued_prefill_tokens - patient


def pair(
    prefill: Iterable[WorkerView], decode: Iterable[WorkerView]
) -> tuple[tuple[WorkerView, ...], tuple[WorkerView, ...]]:
    """Those of either pool that have a counterpart with the same KV fingerprint, layout included, in the other."""
    prefill, decode = tuple(prefill), tuple(decode)
    ours, theirs = {view.fingerprint for view in prefill}, {view.fingerprint for view in decode}
    if ours == theirs:
        return prefill, decode
    shared = ours & theirs
    return (
        tuple([view for view in prefill if view.fingerprint in shared]),
        tuple([view for view in decode if view.fingerprint in shared]),
    )


def missing(prefill: Sequence[WorkerView], decode: Sequence[WorkerView]) -> str:
    """What is not there, in words, where these make no pair."""
    if prefill and decode:
        alike = "the same KV fingerprint and layout (layers, heads, dtype)"
        return f"pair of a prefill and a decode worker with {alike}"
    return "decode worker" if prefill else "prefill worker" if decode else "worker"


def predicted_ttft_s(view: WorkerView, uncached_tokens: int) -> float:
    """Seconds until this worker would have the first token of a prompt with that many tokens to compute."""
    model = step_time_model(view.step_time)
    return model.predict_ttft_s(view.queued_prefill_tokens, uncached_tokens, view.max_batched_tokens)


def predicted_tpot_s(view: WorkerView, context_tokens: int) -> float:
    """Seconds per output token if one more sequence of that context joined this worker's batch."""
    rows = min(view.running + view.waiting + 1, view.max_running)
    return step_time_model(view.step_time).predict_tpot_s(rows, view.context_tokens + context_tokens)


def idle_tpot_s(view: WorkerView, context_tokens: int) -> float:
    """Seconds per output token if that worker decoded nothing else."""
    return step_time_model(view.step_time).predict_tpot_s(1, context_tokens)


def keeps_tpot(view: WorkerView, context_tokens: int, tpot_s: float) -> bool:
    """Whether this worker could decode one more sequence of that context within its own promise and within those of
    the choices that this router decodes there. An idle worker always may be asked: no other would be faster.
    """
    promised_s = min(tpot_s, view.tightest_tpot_s)
    if promised_s == math.inf or view.running + view.waiting == 0:
        return True
    return predicted_tpot_s(view, context_tokens) <= promised_s


def rank_prefill(
    views: Iterable[WorkerView], prompt_tokens: int, cached_tokens: Mapping[str, int]
) -> tuple[WorkerView, ...]:
    """Best first. Workers whose queue is full come last: they would refuse now, but the view may be old."""

    def cost(view: WorkerView) -> tuple[bool, float, int, str]:
        uncached = max(1, prompt_tokens - cached_tokens.get(view.worker_id, 0))
        ttft_s = predicted_ttft_s(view, uncached)
        return (view.waiting >= view.max_waiting, ttft_s, view.queued_prefill_tokens + uncached, view.worker_id)

    return tuple(sorted(views, key=cost))


def rank_mixed(
    views: Iterable[WorkerView], context_tokens: int, cached_tokens: Mapping[str, int]
) -> tuple[WorkerView, ...]:
    """Best first, of workers that prefill and decode it: as `rank_decode`, but by when an answer of some length would
    be whole, so that neither a queue of prompts nor a full batch is overlooked.
    """

    def cost(view: WorkerView) -> tuple[bool, bool, float, int, str]:
        uncached = max(1, context_tokens - cached_tokens.get(view.worker_id, 0))
        whole_s = predicted_ttft_s(view, uncached) + ANSWER_TOKENS * predicted_tpot_s(view, context_tokens)
        return (*_has_no_room(view, context_tokens), whole_s, view.running + view.waiting, view.worker_id)

    return tuple(sorted(views, key=cost))


def _has_no_room(view: WorkerView, context_tokens: int) -> tuple[bool, bool]:
    """Neither a credit, nor KV that is free now: what is false is better."""
    blocks = -(-context_tokens // view.block_size)
    has_credit = view.credited_blocks + blocks <= view.credit_limit_blocks
    has_blocks = view.available_blocks - view.credited_blocks >= blocks
    return not has_credit, not has_blocks


def rank_decode(views: Iterable[WorkerView], context_tokens: int) -> tuple[WorkerView, ...]:
    """Best first: those with KV free for the context now, then those whose credits allow it, by predicted TPOT."""

    def cost(view: WorkerView) -> tuple[bool, bool, float, int, str]:
        tpot_s = predicted_tpot_s(view, context_tokens)
        return (*_has_no_room(view, context_tokens), tpot_s, view.running + view.waiting, view.worker_id)

    return tuple(sorted(views, key=cost))
