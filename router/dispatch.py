"""Where admitted requests wait until workers take them.

The placer makes one try at a time; this waits between tries, as long as some worker may yet come or grant.
"""

from __future__ import annotations

from ..cluster.clock import Clock
from .attempt import Attempt, Work
from .errors import Unavailable
from .members import Membership
from .placer import Placer

RETRY_S = 0.05
"""Longest wait between two tries while every worker refuses; a change of membership or load ends it earlier."""


class Dispatcher:
    """One per router."""

    def __init__(self, placer: Placer, members: Membership, *, clock: Clock, unready_wait_s: float) -> None:
        self._placer = placer
        self._members = members
        self._clock = clock
        self._unready_wait_s = unready_wait_s

    async def place(self, work: Work) -> Attempt:
        """Waits until workers for this attempt are found; bounded by the caller's deadline. `Unavailable` when for
        `unready_wait_s` no worker was there at all; `Refusal` (INVALID_ARGUMENT) when it can never be placed.
        """
        ready_s = self._clock.now_s()
        while True:
            try:
                attempt = await self._placer.try_place(work)
                ready_s = self._clock.now_s()
            except Unavailable:
                attempt = None
                if self._clock.now_s() - ready_s >= self._unready_wait_s:
                    raise
            if attempt is not None:
                return attempt
            await self._members.wait_for_change(RETRY_S)
