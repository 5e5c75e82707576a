"""Two stages of a pipeline that meet while both compute. `meeting_stage.py LINK MEETINGS`, with descriptors of two
sockets, is the second one's process: `engine.parallel.follower`, whose computations go to the meetings.

The first stage comes to meeting 0 with the second piece of plan 0, the second one with the first piece; to meeting k of
`PLANS` they come with plans k + 1 and k. Who comes waits for the other, inside of its computation: two that only ever
compute one after another never meet.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from tandem.cluster.engine import runner
from tandem.cluster.engine.parallel import follower

PLANS = range(12, 16)
"""By then all prompts are computed, and rows decode."""
WAIT_S = 60.0


class Meetings:
    """One stage's end of them."""

    def __init__(self, link: socket.socket, *, stage: int) -> None:
        link.settimeout(WAIT_S)
        self._link = link
        self._stage = stage
        self._pieces = 0
        """Of plan 0, so far."""
        self.held: list[int] = []

    def within(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """`Runner.run`, which goes to the meetings."""

        def run(*arguments: Any) -> Any:
            plan_id = arguments[-2].plan_id
            number = plan_id - 1 if self._stage == 0 and plan_id else plan_id
            self._pieces += plan_id == 0
            if (plan_id == 0 and self._pieces == 2 - self._stage) or number in PLANS:
                self._meet(number)
            return compute(*arguments)

        return run

    def _meet(self, number: int) -> None:
        self._link.sendall(struct.pack("<I", number))
        (theirs,) = struct.unpack("<I", self._link.recv(4, socket.MSG_WAITALL))
        assert theirs == number, f"the other stage is at meeting {theirs}, this one at {number}"
        self.held.append(number)


if __name__ == "__main__":
    link, met = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    runner.Runner.run = Meetings(met, stage=1).within(runner.Runner.run)  # type: ignore[method-assign]
    follower.serve(link)
