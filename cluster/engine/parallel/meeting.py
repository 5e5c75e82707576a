"""Where the ranks of a worker find each other: a table of addresses that the leader keeps.

Followers read and write it over the links that they have with it already, so that no further port is open, and nobody
who is not of this worker can read an address or write one. Pure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from .messages import RankLost

MAX_VALUES = 65536
"""Each rank of a group says one, and of its worker's at most two groups each rank is in."""
LOOPBACK = "127.0.0.1"


class Meeting:
    """Keys, each written once. Any thread."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._asked: dict[str, list[Callable[[bytes], None]]] = {}
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        """Answers whoever has asked for it. ValueError for one key too many."""
        with self._changed:
            if len(self._values) >= MAX_VALUES:
                raise ValueError(f"put: the meeting holds {MAX_VALUES} keys already")
            self._values[key] = value
            waiting = self._asked.pop(key, [])
            self._changed.notify_all()
        for then in waiting:
            then(value)

    def ask(self, key: str, then: Callable[[bytes], None]) -> None:
        """`then` is called with the value, now or by whoever puts it."""
        with self._changed:
            value = self._values.get(key)
            if value is None:
                self._asked.setdefault(key, []).append(then)
        if value is not None:
            then(value)

    def take(self, key: str, timeout_s: float) -> bytes:
        """Waits for the value. Raises RankLost where it does not come, or `fail` was called."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while key not in self._values:
                if self._failure is not None:
                    raise RankLost(str(self._failure)) from self._failure
                if not self._changed.wait(deadline_s - time.monotonic()):
                    raise RankLost(f"no rank said {key} within {timeout_s:g} s")
            return self._values[key]

    def fail(self, error: BaseException) -> None:
        """Nobody else will come."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()


def group_hosts(hosts: Sequence[str], tensor_parallel: int) -> list[tuple[str, str]]:
    """For each rank, its address for the ranks of its stage, and for those of its place in all stages.

    `hosts`: each rank's address towards other nodes, the same for ranks of one node. A group within one node speaks
    over loopback.
    """
    found = []
    for rank, host in enumerate(hosts):
        stage, place = divmod(rank, tensor_parallel)
        groups = hosts[stage * tensor_parallel : (stage + 1) * tensor_parallel], hosts[place::tensor_parallel]
        in_stage, in_pipeline = (LOOPBACK if len(set(group)) == 1 else host for group in groups)
        found.append((in_stage, in_pipeline))
    return found
