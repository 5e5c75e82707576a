"""What a simulated worker is, and what it says: to a router of a sequence, with a heartbeat of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..latency.interface import StepCosts
from ..types import EngineLoad, Role, Side, StepTimeCoefficients


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a simulated worker is."""

    worker_id: str
    role: Role
    costs: StepCosts
    num_blocks: int
    block_size: int = 16
    block_bytes: int = 0
    """Of KV; what a handoff moves."""
    node: str = ""
    max_batched_tokens: int = 512
    max_running: int = 256
    max_waiting: int = 256
    max_model_len: int = 2048
    batching: str = "iteration"
    prefix_cache: bool = True
    credit_factor: float = 1.0
    """Of its blocks: how many may be promised at once."""
    credit_ttl_s: float = 10.0
    lease_s: float = 30.0
    pull_wait_s: float = 30.0


class Heard(NamedTuple):
    """What a worker tells a router of one sequence."""

    request_id: str
    side: Side
    attempt: int
    tokens: int
    """Output tokens of the choice by now, those of earlier attempts included."""
    finished: bool = False
    queue_s: float = 0.0
    prefill_s: float = 0.0
    cached_tokens: int = 0
    exposed_transfer_s: float = 0.0
    transferred_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Turned:
    """A sequence that a worker does not take, or cannot go on with."""

    request_id: str
    side: Side
    attempt: int
    reason: str
    """A `kvtransfer.ticket.RefusalReason`."""
    lost: bool
    """It was taken, and a try is lost with it; False: refused before any effect."""
    retryable: bool


class Status(NamedTuple):
    """What a heartbeat says."""

    load: EngineLoad
    credited_blocks: int
    step_time: StepTimeCoefficients
    learned_steps: int
