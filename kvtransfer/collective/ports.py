"""A worker's ranks, as its event loop has them: told what to do about KV between workers, heard by session."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from ..layout import KVSplit
from .commands import Answer, Begin, Command, Failed, Leave, Left

log = logging.getLogger(__name__)
Hear = Callable[[int, Answer], None]
"""Called on the loop, with the rank that answers."""


class RankPort(ABC):
    """One rank of this worker."""

    @abstractmethod
    def start(self, begin: Begin, hear: Callable[[Answer], None], on_lost: Callable[[str], None]) -> None:
        """Once, before anything is said. `hear`: takes answers, in order, from any thread; does not wait. `on_lost`:
        the same, called where the rank has ended before its worker. May take a while: libraries load.
        """

    @abstractmethod
    def say(self, command: Command) -> None:
        """Tells it, in order; does not wait. A rank that has ended is nobody's business here: its worker ends."""

    @abstractmethod
    def close(self) -> None:
        """Leaves every session; idempotent."""


class WorkerRanks:
    """All ranks of this worker, in order. Lives on the worker's event loop."""

    def __init__(self, split: KVSplit, num_blocks: int, ports: Sequence[RankPort], begin: Begin) -> None:
        """`split`: how the worker's KV lies over `ports`."""
        if split.num_ranks != len(ports):
            raise ValueError(f"ports: {len(ports)} are not the {split.num_ranks} ranks of the worker")
        self.split = split
        self.num_blocks = num_blocks
        self.backend = begin.backend
        self.timeout_s = begin.timeout_s
        """For meeting, and for each message."""
        self._begin = begin
        self._ports = tuple(ports)
        self._heard_by: dict[bytes, Hear] = {}

    async def start(self) -> None:
        """Before the first session."""
        loop = asyncio.get_running_loop()

        def hear(rank: int, answer: Answer) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._route, rank, answer)

        def lost(rank: int, why: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._lose, rank, why)

        for rank, port in enumerate(self._ports):
            await asyncio.to_thread(port.start, self._begin, partial(hear, rank), partial(lost, rank))

    def attend(self, session: bytes, hear: Hear) -> None:
        """From now on `hear` gets what is answered about a session."""
        self._heard_by[session] = hear

    def say(self, rank: int, command: Command) -> None:
        """Tells one rank."""
        self._ports[rank].say(command)

    def leave(self, session: bytes) -> None:
        """Tells all ranks that a session is over. Each answers `Left`."""
        for port in self._ports:
            port.say(Leave(session=session))

    def ignore(self, session: bytes) -> None:
        """What is still answered about a session is nobody's any more; idempotent."""
        self._heard_by.pop(session, None)

    async def close(self) -> None:
        """Leaves every session; idempotent."""
        for port in self._ports:
            await asyncio.to_thread(port.close)

    def _lose(self, rank: int, why: str) -> None:
        """Every session has lost its pairs of this rank, which writes nothing any more: one that was told to leave as
        it ended does not say so.
        """
        for session, hear in list(self._heard_by.items()):
            hear(rank, Failed(session=session, pair=0, message=why))
            hear(rank, Left(session=session))

    def _route(self, rank: int, answer: Answer) -> None:
        hear = self._heard_by.get(answer.session)
        if hear is not None:
            hear(rank, answer)
