"""What the router in virtual time knows of a worker: its last heartbeat, corrected by what the router sent since."""

from __future__ import annotations

import math

from ...router.placement import WorkerView
from .worker import SimWorker, Status


class SimMember:
    """As `router.members.Member` and the accounts of its link."""

    def __init__(self, worker: SimWorker) -> None:
        self.worker = worker
        self.queued_prefill_tokens = 0
        self.patient_prefill_tokens = 0
        self.decode_rows = 0
        self._promises_s: dict[float, int] = {}
        self._view: WorkerView | None = None
        self._heard_of_us = (0, 0, 0)
        """Of what the status counts, what this router had sent when it came."""
        self._status: Status
        self.heartbeat()

    def heartbeat(self) -> None:
        """The worker says how loaded it is."""
        self._status = self.worker.status()
        self._heard_of_us = (self.queued_prefill_tokens, self.patient_prefill_tokens, self.decode_rows)
        self._view = None

    def prompt_sent(self, tokens: int, patient_tokens: int) -> None:
        """A prompt of so many tokens to compute is on its way there."""
        self.queued_prefill_tokens += tokens
        self.patient_prefill_tokens += patient_tokens
        self._view = None

    def prompt_done(self, tokens: int, patient_tokens: int) -> None:
        """It waits there no longer."""
        self.prompt_sent(-tokens, -patient_tokens)

    def row_begun(self, tpot_s: float) -> None:
        """A choice that was promised `tpot_s` is decoded there."""
        self.decode_rows += 1
        self._promises_s[tpot_s] = self._promises_s.get(tpot_s, 0) + 1
        self._view = None

    def row_ended(self, tpot_s: float) -> None:
        """It is no longer."""
        self.decode_rows -= 1
        left = self._promises_s.pop(tpot_s) - 1
        if left:
            self._promises_s[tpot_s] = left
        self._view = None

    @property
    def view(self) -> WorkerView:
        """As `Membership` makes it."""
        if self._view is None:
            self._view = self._make_view()
        return self._view

    def _make_view(self) -> WorkerView:
        status, spec, load = self._status, self.worker.spec, self._status.load
        own_tokens, own_patient, own_rows = self._heard_of_us
        others_tokens = max(0, load.queued_prefill_tokens - own_tokens)
        others_patient = max(0, load.patient_prefill_tokens - own_patient)
        others_rows = max(0, load.running + load.waiting - own_rows)
        return WorkerView(
            worker_id=spec.worker_id,
            role=spec.role,
            fingerprint="",
            block_size=spec.block_size,
            num_blocks=spec.num_blocks,
            available_blocks=load.free_blocks + load.cached_blocks,
            credited_blocks=status.credited_blocks,
            credit_limit_blocks=self.worker.credit_limit_blocks,
            queued_prefill_tokens=self.queued_prefill_tokens + others_tokens,
            running=max(self.decode_rows + others_rows - load.waiting, 0),
            waiting=load.waiting,
            max_running=spec.max_running,
            max_waiting=spec.max_waiting,
            context_tokens=load.context_tokens,
            step_time=status.step_time,
            steps_total=status.steps_total,
            patient_prefill_tokens=self.patient_prefill_tokens + min(others_patient, others_tokens),
            tightest_tpot_s=min(self._promises_s, default=math.inf),
        )
