"""What of a pull is copying, told apart from asking for blocks and waiting for them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ...kvtransfer.ticket import Hello, Peer, Ticket
from ...kvtransfer.transport import EndFrame, KVFrames, KVTransport, PullRequest, WrittenBlocks


class Watched(KVTransport):
    """Another transport, watched for one pull."""

    def __init__(self, transport: KVTransport) -> None:
        self._transport = transport
        self.copy_s = 0.0
        """In which blocks were written: by the transport, from when it had heard where they are (a device's copy to its
        end, generations compared), or by who pulls, from when it was given them. What goes on at once counts once.
        """
        self._until_s = 0.0

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        return await self._transport.hello(peer, mine, timeout_s=timeout_s)

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        async with aclosing(self._transport.pull(peer, request, timeout_s=timeout_s)) as frames:
            async for came in frames:
                given_s = time.perf_counter()
                if isinstance(came, WrittenBlocks):
                    self._count(given_s - came.arrived_age_s, given_s - came.written_age_s)
                yield came
                if not isinstance(came, WrittenBlocks | EndFrame):
                    self._count(given_s, time.perf_counter())

    def _count(self, begin_s: float, end_s: float) -> None:
        self.copy_s += max(0.0, end_s - max(begin_s, self._until_s))
        self._until_s = max(self._until_s, end_s)

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._transport.confirm(peer, ticket, timeout_s=timeout_s)

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._transport.abort(peer, ticket, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._transport.close()
