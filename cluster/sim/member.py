"""What the router in virtual time knows of a worker: its last heartbeat, corrected by what the router sent since."""

from __future__ import annotations

from ...router.placement import WorkerView
from ...router.sent_load import SentLoad, WorkerSeen
from .worker import SimWorker


class SimMember:
    """One life of one worker, as `router.members.Member`."""

    def __init__(self, worker: SimWorker) -> None:
        self.worker = worker
        self.role = worker.spec.role
        self.sent = SentLoad()
        self.routable = True
        """Its heartbeats are fresh, and its stream stands."""
        self.attached = True
        """Its stream stands."""
        self._seen = WorkerSeen(self._ask(), self.sent)
        self.heartbeats = 0
        """That were heard. With `sent.version` it counts what changes its view."""

    def heartbeat(self) -> None:
        """The worker says how loaded it is."""
        self._seen.hear(self._ask())
        self.heartbeats += 1

    @property
    def view(self) -> WorkerView:
        """As of now: the same object while nothing has changed."""
        return self._seen.view

    def _ask(self) -> WorkerView:
        status, spec = self.worker.status(), self.worker.spec
        load = status.load
        return WorkerView(
            worker_id=spec.worker_id,
            role=spec.role,
            fingerprint="",
            block_size=spec.block_size,
            num_blocks=spec.num_blocks,
            available_blocks=load.free_blocks + load.cached_blocks,
            credited_blocks=status.credited_blocks,
            credit_limit_blocks=self.worker.credit_limit_blocks,
            queued_prefill_tokens=load.queued_prefill_tokens,
            running=load.running,
            waiting=load.waiting,
            max_running=spec.max_running,
            max_batched_tokens=max(spec.max_batched_tokens, spec.max_running),
            max_waiting=spec.max_waiting,
            context_tokens=load.context_tokens,
            step_time=status.step_time,
            steps_total=status.learned_steps,
            patient_prefill_tokens=load.patient_prefill_tokens,
            pipeline_stages=spec.costs.pipeline_stages,
        )
