"""Who watches a simulated cluster: told how full it is now and then, and of every step and transfer, while it runs.
What becomes of requests is in their outcomes; this is for queues over time and for traces. Nothing depends on it: with
an observer or without one, the same happens at the same times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """One worker at one moment. Counts are those of `cluster.types.EngineLoad`."""

    worker_id: str
    up: bool
    """False: it has failed and is not back; the counts are 0."""
    waiting: int
    running: int
    """Rows of the batch, those that wait for their KV included."""
    held: int
    """Prefilled sequences whose KV waits here for a decode worker."""
    queued_prefill_tokens: int
    num_blocks: int
    used_blocks: int
    """Held by sequences; what the prefix cache could give back is not counted."""
    cached_blocks: int
    preemptions_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpan:
    """One step of one worker's engine, or a run of decode steps that were taken together."""

    worker_id: str
    start_s: float
    end_s: float
    steps: int
    prefill_tokens: int
    """Of one step; a run has none."""
    decode_rows: int
    """Of one step: a run computes `steps` tokens of each."""
    context_tokens: int
    """Of the decode rows, at the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSpan:
    """KV of one request on its way: from the first byte that it could have had to its end, waits for prefill
    included.
    """

    request_id: str
    source: str
    target: str
    """Worker ids."""
    start_s: float
    end_s: float
    size_bytes: int
    exposed_s: float
    """How long after the end of prefill the last byte came."""


class Observer(Protocol):
    """Given to `SimCluster`. Calls come in the order of virtual time, with times in seconds of it; none may change what
    is simulated.
    """

    @property
    def sample_period_s(self) -> float:
        """Seconds between two calls of `sample`, above 0; inf: it is not called."""

    @property
    def wants_spans(self) -> bool:
        """Whether `step` and `transfer` are called. Read once, before the run."""

    def sample(self, at_s: float, waiting_at_router: int, workers: Sequence[WorkerSample]) -> None:
        """How full everything is: requests that wait at the router for a worker, and every worker in the order of the
        spec. Called from the first arrival's time on, while any request is under way.
        """

    def step(self, span: StepSpan) -> None:
        """A step, or a run of them, has ended. Of one that was lost with its worker nothing is told."""

    def transfer(self, span: TransferSpan) -> None:
        """A request's KV has arrived whole."""
