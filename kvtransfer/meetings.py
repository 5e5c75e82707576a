"""Whom a decode worker has met: it says `Hello` to each life of a prefill worker once, before the first pull, so that a
pair that cannot work (version, fingerprint, layout) is refused then and not per request.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from .ticket import HandoffRefused, Hello, Peer, RefusalReason, check_hello
from .transport import KVTransport

MAX_MET_PEERS = 1024


class Meetings:
    """Lives on the worker's event loop."""

    def __init__(self, mine: Hello, transport: KVTransport, *, timeout_s: float) -> None:
        self._mine = mine
        self._transport = transport
        self._timeout_s = timeout_s
        self._met: OrderedDict[Peer, None] = OrderedDict()
        self._meeting: dict[Peer, asyncio.Task[Hello]] = {}

    async def meet(self, peer: Peer) -> None:
        """Says Hello, unless that was done; who comes meanwhile waits for the same answer. Raises `HandoffRefused`:
        PEER_LOST where there is no answer, WRONG_EPOCH where another life answers, else why the two cannot work.
        """
        if peer in self._met:
            return
        task = self._meeting.get(peer)
        if task is None:
            task = self._meeting[peer] = asyncio.create_task(self._introduce(peer))
            task.add_done_callback(lambda done: self._introduced(peer, done))
        await asyncio.shield(task)

    def forget(self, peer: Peer) -> None:
        """It was lost: before the next pull it is met again. Idempotent."""
        self._met.pop(peer, None)

    def under_way(self) -> tuple[asyncio.Task[Hello], ...]:
        """Hellos without an answer yet, for whoever must end them."""
        return tuple(self._meeting.values())

    async def _introduce(self, peer: Peer) -> Hello:
        try:
            theirs = await self._transport.hello(peer, self._mine, timeout_s=self._timeout_s)
        except HandoffRefused as refusal:
            if refusal.reason is not RefusalReason.DEADLINE:
                raise
            raise HandoffRefused(RefusalReason.PEER_LOST, f"no answer to Hello: {refusal.message}") from refusal
        check_hello(self._mine, theirs)
        if (theirs.worker_id, theirs.epoch) != (peer.worker_id, peer.epoch):
            message = f"{peer.kv_address} is now another life of {theirs.worker_id}"
            raise HandoffRefused(RefusalReason.WRONG_EPOCH, message)
        return theirs

    def _introduced(self, peer: Peer, task: asyncio.Task[Hello]) -> None:
        self._meeting.pop(peer, None)
        if task.cancelled() or task.exception() is not None:
            return
        self._met[peer] = None
        while len(self._met) > MAX_MET_PEERS:
            self._met.popitem(last=False)
