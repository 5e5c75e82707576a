"""What a router has under way on one worker: its own correction to the worker's last heartbeat. Pure; the runtime's
links and the simulator keep the same accounts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .placement import WorkerView


class Snapshot(NamedTuple):
    """The accounts at one moment."""

    queued_prefill_tokens: int = 0
    patient_prefill_tokens: int = 0
    decode_rows: int = 0
    tightest_tpot_s: float = math.inf


NOTHING = Snapshot()


class SentLoad:
    """Prompts that were sent and have no token yet, and choices that are decoded there."""

    def __init__(self, on_less: Callable[[], None] = lambda: None) -> None:
        """`on_less`: called when there may be room for who waits."""
        self.queued_prefill_tokens = 0
        """Prompt tokens that this router sent and has no first token for yet."""
        self.patient_prefill_tokens = 0
        """Those of them that are due at no time: the worker computes before them what is."""
        self.decode_rows = 0
        """Choices that this router decodes there now."""
        self.version = 0
        """Counts the changes of these."""
        self._tpot_promises_s: dict[float, int] = {}
        """What those choices were promised as time per output token, inf for nothing, with how many it was."""
        self._on_less = on_less

    @property
    def tightest_tpot_s(self) -> float:
        """The tightest promise among the choices that this router decodes there; inf: none."""
        return min(self._tpot_promises_s, default=math.inf)

    @property
    def now(self) -> Snapshot:
        """All of these at once."""
        return Snapshot(self.queued_prefill_tokens, self.patient_prefill_tokens, self.decode_rows, self.tightest_tpot_s)

    def prompt_sent(self, tokens: int, patient_tokens: int) -> None:
        """A prompt of so many tokens to compute, of which so many are due at no time, is on its way there."""
        self.version += 1
        self.queued_prefill_tokens += tokens
        self.patient_prefill_tokens += patient_tokens

    def prompt_done(self, tokens: int, patient_tokens: int) -> None:
        """It waits there no longer."""
        self.version += 1
        self.queued_prefill_tokens -= tokens
        self.patient_prefill_tokens -= patient_tokens
        self._on_less()

    def row_begun(self, tpot_s: float) -> None:
        """A choice that was promised `tpot_s` is decoded there."""
        self.version += 1
        self.decode_rows += 1
        self._tpot_promises_s[tpot_s] = self._tpot_promises_s.get(tpot_s, 0) + 1

    def row_ended(self, tpot_s: float) -> None:
        """It is no longer."""
        self.version += 1
        self.decode_rows -= 1
        left = self._tpot_promises_s.pop(tpot_s) - 1
        if left:
            self._tpot_promises_s[tpot_s] = left
        self._on_less()


class WorkerSeen:
    """A worker as its last heartbeat had it, corrected by what this router has under way there now."""

    __slots__ = ("_said", "_sent", "_then", "_version", "_view")

    def __init__(self, said: WorkerView, sent: SentLoad) -> None:
        """Of its first heartbeat: nothing was sent before."""
        self._sent = sent
        self._said, self._then = said, NOTHING
        self._view, self._version = said, 0

    def hear(self, said: WorkerView) -> None:
        """The next heartbeat."""
        self._said, self._then, self._version = said, self._sent.now, -1

    @property
    def view(self) -> WorkerView:
        """As of now: the same object while nothing has changed, because a request asks for it many times."""
        if self._version != self._sent.version:
            self._version = self._sent.version
            self._view = corrected(self._said, self._then, self._sent.now)
        return self._view


def corrected(said: WorkerView, then: Snapshot, now: Snapshot) -> WorkerView:
    """The worker as `said` by its heartbeat, when this router had `then` under way there, corrected by what it has now:
    the worker's own count is as old as its heartbeat, and what was ours of it is replaced by what is ours now.
    """
    queued_tokens, patient_tokens, waiting = said.queued_prefill_tokens, said.patient_prefill_tokens, said.waiting
    others_tokens = max(0, queued_tokens - then.queued_prefill_tokens)
    others_patient = max(0, patient_tokens - then.patient_prefill_tokens) if patient_tokens else 0
    others_rows = max(0, said.running + waiting - then.decode_rows)
    return said._replace(
        queued_prefill_tokens=now.queued_prefill_tokens + others_tokens,
        patient_prefill_tokens=now.patient_prefill_tokens + min(others_patient, others_tokens),
        running=max(now.decode_rows + others_rows - waiting, 0),
        tightest_tpot_s=now.tightest_tpot_s,
    )
