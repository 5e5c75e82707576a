"""What a worker knows of its step times before it serves: those of its device's latency model, or of a few steps that
it times at its start. Routers forecast from them, so that the first request already is told the truth.

The timed steps write into KV memory that belongs to nobody yet, and run before the engine's thread does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..engine.devices.base import Device
from ..latency.linear import PRIOR_STEPS, OnlineStepTimeFit, linear_terms
from ..types import Role
from .points import Places, Point, fitting

ALWAYS = (Point(length=16), Point(batch=1, context=16))
ALWAYS_ROUNDS = 5
"""Of which the first is not counted: it touches memory for the first time. The others are as many steps as a router
takes for knowledge (`router.forecast.LEARNED_STEPS`)."""
MORE = (
    Point(length=64),
    Point(batch=4, context=64),
    Point(length=128),
    Point(batch=8, context=64),
    Point(length=256),
    Point(batch=16, context=128),
)
MORE_ROUNDS = 2
BUDGET_S = 0.5
"""What of MORE would not be done by then is left out."""


def known_steps(
    device: Device, role: Role, *, max_batched_tokens: int, max_model_len: int, block_size: int
) -> OnlineStepTimeFit:
    """The fit that a worker of that role begins with."""
    if device.costs is not None:
        return OnlineStepTimeFit(linear_terms(device.costs.step_time_s, role=role), prior_steps=PRIOR_STEPS)
    points, _ = fitting(
        [point for point in (*ALWAYS, *MORE) if point.tokens <= max_batched_tokens],
        max_model_len=max_model_len,
        kv_tokens=device.kv.num_blocks * block_size,
        block_size=block_size,
    )
    fit = OnlineStepTimeFit()
    if points:
        time_steps(device, fit, points, block_size=block_size)
    return fit


def time_steps(
    device: Device,
    fit: OnlineStepTimeFit,
    points: Sequence[Point],
    *,
    block_size: int,
    budget_s: float = BUDGET_S,
    now_s: Callable[[], float] = time.perf_counter,
) -> None:
    """Runs points on an idle device, and has the fit observe how long they took. Raises what the device raises."""
    places = Places(points, block_size, vocab_size=device.vocab_size)
    always = [point for point in ALWAYS if point in points]
    more = [point for point in points if point not in always]
    begin_s, plan_id = now_s(), 0
    token_s = {True: 0.0, False: 0.0}
    """Of the last step with a prompt, and of the last without."""

    def run(point: Point, *, counts: bool) -> None:
        nonlocal plan_id
        plan_id += 1
        device.launch(places.plan(point, plan_id))
        duration_s = device.collect().duration_s
        token_s[point.length > 0] = duration_s / point.tokens
        if counts:
            prefill_tokens, _, decode_rows, context_tokens = point.sizes
            fit.observe(prefill_tokens, decode_rows, context_tokens, duration_s)

    for number in range(ALWAYS_ROUNDS):
        for point in always:
            run(point, counts=number > 0)
    for point in more * MORE_ROUNDS:
        if now_s() - begin_s + token_s[point.length > 0] * point.tokens <= budget_s:
            run(point, counts=True)
