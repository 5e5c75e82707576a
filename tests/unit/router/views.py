"""A worker as the router sees it, for tests of what is decided from views."""

from __future__ import annotations

from tandem.cluster.types import Role, StepTimeCoefficients
from tandem.router.placement import WorkerView

VIEW = WorkerView(
    worker_id="w0",
    role=Role.DECODE,
    fingerprint="f",
    block_size=16,
    num_blocks=100,
    available_blocks=100,
    credited_blocks=0,
    credit_limit_blocks=100,
    queued_prefill_tokens=0,
    running=0,
    waiting=0,
    max_running=4,
    max_waiting=8,
    context_tokens=0,
    step_time=StepTimeCoefficients(step_s=0.01, prefill_token_s=1e-4, decode_row_s=1e-3, context_token_s=1e-6),
)


def view(worker_id: str = VIEW.worker_id, base: WorkerView = VIEW, **changes: object) -> WorkerView:
    """`base` with other values in some fields."""
    return base._replace(worker_id=worker_id, **changes)  # type: ignore[arg-type]
