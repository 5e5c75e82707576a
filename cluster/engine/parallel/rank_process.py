"""A process that is to be a rank of this worker, as its leader has it: a link, a life, and a way to end it.

Ranks are children of the worker's process (`children`), or whatever else hands them over (`Recruit`): actors of Ray,
which may stand on other nodes (`cluster.launch.rank_actors`).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence


class RankProcess(ABC):
    """One rank's process. Used by one thread at a time, but for `kill`."""

    rank: int
    pid: int
    link: socket.socket
    """A Unix socket for a process of this node."""
    kv_link: socket.socket | None = None
    """Of a rank on another node, whose KV memory nobody else can map: its blocks are read and written here."""
    host: str = ""
    """Its address, where it is on another node."""
    leader_host: str = ""
    """The leader's address as a rank on another node has it."""

    @property
    def is_local(self) -> bool:
        """Whether it shares this node, and so memory."""
        return self.kv_link is None

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"rank {self.rank} (pid {self.pid}{where}{self.ended()})"

    @abstractmethod
    def ended(self) -> str:
        """How it ended, as a continuation of a sentence; empty where it lives or nobody can tell. Waits a moment."""

    @abstractmethod
    def kill(self) -> None:
        """Ends it at once; idempotent, and does not wait."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Waits for its end, after its link was closed; False where it may live still."""


Recruit = Callable[[int], Sequence[RankProcess]]
"""Hands over processes for ranks 1 … n - 1 of a worker of n ranks, in order. Raises RankLost, OSError; then none is
left. Blocks.
"""


class _Child(RankProcess):
    """A process that this one has started."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self.rank, self.pid, self.link = rank, process.pid, link
        self._process = process

    def ended(self) -> str:
        try:
            return f", ended with {self._process.wait(0.2)}"  # the end of its socket may be seen before its own
        except subprocess.TimeoutExpired:
            return ""

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def children(num_ranks: int) -> list[RankProcess]:
    """`Recruit` by starting processes."""
    started: list[RankProcess] = []
    try:
        for rank in range(1, num_ranks):
            started.append(_spawn(rank))
    except BaseException:
        dismiss(started)
        raise
    return started


def dismiss(ranks: Sequence[RankProcess]) -> None:
    """Ends processes that nobody has made use of."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait(1.0)
        for link in (rank.link, rank.kv_link):
            if link is not None:
                link.close()


def _spawn(rank: int) -> RankProcess:
    link, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "tandem.cluster.engine.parallel.follower", str(theirs.fileno())]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        # A group of its own: Ctrl-C is for the worker, which drains first.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            process_group=0,
            env=paths,
        )
    except BaseException:
        link.close()
        raise
    finally:
        theirs.close()
    return _Child(rank, process, link)
