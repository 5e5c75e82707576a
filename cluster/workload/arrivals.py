"""When requests arrive: an open loop, that is times drawn beforehand, which no slow answer can push back. Pure.

Intervals are gamma distributed with mean 1/rate, as `vllm bench serve` has it: `burstiness` is the shape; 1 is a
Poisson process, below 1 is burstier, above 1 more even, inf a clock. A ramp changes the rate from request to request,
as there.
"""

from __future__ import annotations

import math

import numpy as np


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> tuple[float, ...]:
    """Seconds from the start at which each of `count` requests is due, ascending, the first at 0.

    `rate` in requests per second; infinite: all at once. Raises ValueError naming the field.
    """
    if count < 1:
        raise ValueError(f"num_prompts: {count} is not allowed; allowed: at least 1")
    if not rate > 0:
        raise ValueError(f"request_rate: {rate} is not allowed; allowed: above 0, or inf")
    if not burstiness > 0:
        raise ValueError(f"burstiness: {burstiness} is not allowed; allowed: above 0")
    if math.isinf(rate):
        return (0.0,) * count
    if math.isinf(burstiness):
        gaps = np.full(count - 1, 1.0 / rate)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), count - 1)
    return (0.0, *(float(due) for due in np.cumsum(gaps)))


def ramp_times(
    count: int, strategy: str, start_rps: float, end_rps: float, burstiness: float, seed: int
) -> tuple[float, ...]:
    """As `arrival_times`, while the rate goes from `start_rps` to `end_rps`, `linear` or `exponential` by request."""
    even = np.diff(arrival_times(count, 1.0, burstiness, seed))
    progress = np.arange(1, count) / max(count - 1, 1)
    if strategy == "linear":
        rates = start_rps + (end_rps - start_rps) * progress
    else:
        rates = start_rps * (end_rps / start_rps) ** progress
    return (0.0, *(float(due) for due in np.cumsum(even / rates)))
