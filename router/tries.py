"""When a choice tries again, and what it may keep of the try before. Pure: `choice` and `attempt` follow it with tasks
and calls, `cluster.sim` in virtual time.
"""

from __future__ import annotations

from .errors import DeadlineExceeded, ServiceError, Unavailable
from .placing import NoWorkers

REFUSED_WAIT_S = 0.05
"""Who was refused by a worker tries again so much later: the view that led there was old."""
LAST_WORD_S = 0.5
"""So long before its deadline a request that waits for workers is told that they did not come: the deadline itself
could only say that time ran out."""
FINISHED = "finished"
"""The decode worker's reason when prefill's first token was also the last (`kvtransfer.ticket.RefusalReason`)."""
KV_GONE = frozenset(
    {"aborted", "expired", "prefill_failed", "stale_attempt", "unknown_ticket", "wrong_epoch", "wrong_generation"}
)
"""A decode worker's reasons that mean: what that prefill left is not to be had any more."""
UNREACHABLE = "peer_lost"
"""Once, that may be the decode worker's own trouble; a second decode worker that says it is believed."""


class AttemptLost(Exception):
    """One try cannot go on; another one may, if `retryable`."""

    def __init__(self, reason: str, message: str, *, retryable: bool = True, worker_id: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retryable = retryable
        self.worker_id = worker_id
        """The worker that failed; empty where it was none."""


class Tries:
    """The tries at one choice."""

    def __init__(self, *, max_attempts: int, deadline_s: float, timeout_s: float) -> None:
        """`deadline_s`: on the router's clock, `timeout_s` after the request came."""
        self._max_attempts = max_attempts
        self._deadline_s = deadline_s
        self._timeout_s = timeout_s
        self.number = 0
        """Counts the tries from 1, those that were refused included."""
        self.lost_total = 0
        self.avoid: frozenset[str] = frozenset()
        """Workers that refused or failed the last try."""

    def begin(self) -> None:
        """Another try begins."""
        self.number += 1

    def failed(self, worker_id: str) -> None:
        """The try was refused or lost by this worker (empty: by none of them)."""
        self.avoid = frozenset({worker_id})

    def lost(self, lost: AttemptLost) -> ServiceError | None:
        """The try was lost: what the client is told, or None where another try follows."""
        self.lost_total += 1
        if lost.reason == "deadline":
            return DeadlineExceeded(f"the request's {self._timeout_s:g} s ran out")
        if not lost.retryable:
            return ServiceError(f"{lost.reason}: {lost.message}")
        if self.lost_total >= self._max_attempts:
            message = f"gave up after {self.lost_total} attempts; the last one: {lost.reason}: {lost.message}"
            return Unavailable(message, retry_after_s=1.0)
        return None

    @property
    def waits_until_s(self) -> float | None:
        """A request that was under way waits so long for workers to come back; None: it is at the door still."""
        return self._deadline_s - min(LAST_WORD_S, 0.5 * self._timeout_s) if self.lost_total else None

    def nobody_came(self, none: NoWorkers) -> Unavailable:
        """What the client is told where no worker was there for as long as it waited."""
        if self.waits_until_s is None:
            return none
        message = f"no {none.missing} came back within the request's {self._timeout_s:.3g} s"
        return Unavailable(message, retry_after_s=none.retry_after_s)


class PrefillKeep:
    """What a router knows of one prefill and the KV that comes of it: whether a decode worker may still get it."""

    __slots__ = ("_handed_over", "_unreachable", "open", "serves")

    def __init__(self) -> None:
        self.serves = False
        """Whether a decode worker may get its KV there: submitted, not known to be lost, not handed over."""
        self.open = False
        """Whether the worker may still have something of it, to be aborted at the end."""
        self._handed_over = False
        self._unreachable = 0
        """Decode workers that could not reach it."""

    def submitting(self) -> None:
        """It is on its way to the worker."""
        self.open = True

    def submitted(self, *, handoff: bool) -> None:
        """The worker took it."""
        self.serves = handoff

    def worker_lost(self, *, prompt_waits: bool, silent: bool) -> bool:
        """The stream to its worker broke. True: the attempt is lost with it: it is still needed, before its first
        token, and, where the worker has merely fallen silent, until a decode worker has its KV: a puller would wait.
        """
        # It stays open: the stream may be back, and what was submitted meanwhile runs on it.
        self.serves = False
        return prompt_waits or (silent and not self._handed_over)

    def ended(self) -> None:
        """It has failed on its worker, or its first token was the last."""
        self.serves = self.open = False

    def handed_over(self) -> None:
        """A decode worker has made its first step, and confirms it to the prefill worker, which then frees itself."""
        self._handed_over = True
        self.serves = self.open = False

    def decode_lost(self) -> None:
        """The decode worker's stream broke: its confirmation, if there was one, may never have arrived."""
        self.open = True

    def decode_failed(self, reason: str) -> None:
        """A decode worker could not go on for this reason: does that say something about the KV here?"""
        self._unreachable += reason == UNREACHABLE
        if reason in KV_GONE or self._unreachable > 1:
            self.serves = False

    def close(self) -> bool:
        """Nobody needs it any more. True: the worker must be told."""
        must_tell, self.open, self.serves = self.open, False, False
        return must_tell
