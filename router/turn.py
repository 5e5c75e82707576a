"""What waits for the end of a turn of the event loop, so that all that one turn brings is answered once: the tokens of
a worker's frame leave as one delta a choice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Turn:
    """One per event loop and owner. Bounded by what calls it: once a choice and turn."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def at_end(self, call: Callable[[], None]) -> None:
        """Calls it behind everything that is due now."""
        if not self._calls:
            asyncio.get_running_loop().call_soon(self._end)
        self._calls.append(call)

    def _end(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception:  # of one choice: the others' tokens leave
                logger.exception("tokens could not be sent on")
