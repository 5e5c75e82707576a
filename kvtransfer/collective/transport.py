"""What a decode worker pulls through where KV goes from rank to rank.

1. `hello` goes over gRPC; the answer says how the peer's ranks can be met. A peer whose ranks cannot is refused: this
   transport was demanded.
2. `pull` asks for references over gRPC, as for mapped memory, and has every batch of them brought by the session with
   that life of the peer (`reader`), which is opened by the first pull and kept. What comes is written into
   `PullRequest.into` by the ranks themselves; blocks of another size, and other splits, are cut on the way (`plan`).
3. A session that breaks fails its pulls with PEER_LOST, which are tried again: with a new session, and new groups.

There is no checksum: what lies between is TCP, or what NCCL uses.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from ..grpc_transport import GrpcKVTransport
from ..layout import KVLayout, KVSplit
from ..meetings import MAX_MET_PEERS
from ..reshape import Reshape
from ..ticket import HandoffRefused, Hello, Peer, RefusalReason, Ticket
from ..transport import EndFrame, KVFrames, KVTransport, PullRequest, RefFrame, WrittenBlocks
from ..uncancelled import to_its_end
from .holder import MAX_READS
from .messages import Offer, decode_offer, lost
from .plan import Batch, PullPlan
from .ports import WorkerRanks
from .reader import ReaderSession, Reading

MAX_SESSIONS = 64
"""With peers that nobody pulls from now, the oldest of them first to go."""


class CollectiveKVTransport(KVTransport):
    """See the module. Everything but the bytes of blocks is the `control` transport's."""

    def __init__(self, control: GrpcKVTransport, ranks: WorkerRanks, *, max_sessions: int = MAX_SESSIONS) -> None:
        self._control = control
        self._ranks = ranks
        self._max_sessions = max_sessions
        self._me: Hello | None = None
        self._theirs: OrderedDict[Peer, KVSplit] = OrderedDict()
        self._sessions: OrderedDict[Peer, ReaderSession] = OrderedDict()
        self._users: Counter[Peer] = Counter()
        """Pulls that use a session, or wait for one."""
        self._meeting: dict[Peer, asyncio.Task[ReaderSession]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def sessions(self) -> int:
        """Open now."""
        return len(self._sessions)

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        theirs = await self._control.hello(peer, mine, timeout_s=timeout_s)
        self._me = mine
        if theirs.protocol_version != mine.protocol_version:
            return theirs  # whose other fields mean nothing here: the caller refuses it
        offer = decode_offer(theirs.ranks)
        if offer is None or offer.backend != self._ranks.backend:
            has = "is not set to" if offer is None else f"is set to {offer.backend!r}, not to"
            text = f"transport {self._ranks.backend!r} is demanded, and {peer.worker_id} {has} it"
            raise HandoffRefused(RefusalReason.TRANSPORT_MISMATCH, text)
        self._theirs.pop(peer, None)
        split = _split(theirs, offer)
        if split is not None:
            self._theirs[peer] = split
        while len(self._theirs) > MAX_MET_PEERS:
            self._theirs.popitem(last=False)
        return theirs

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        theirs = self._theirs.get(peer)
        if theirs is None:
            raise HandoffRefused(RefusalReason.PEER_LOST, f"{peer.worker_id} has not been met")
        reshape = Reshape(theirs, self._ranks.split)
        async with self._session(peer, reshape) as session, aclosing(_Pull(session, request, reshape)) as pull:
            wanted = replace(request, first_block=pull.plan.first_source_block, mapped=True, checksum=False, into=())
            async with aclosing(self._control.references(peer, wanted, timeout_s=timeout_s)) as messages:
                while True:
                    following = asyncio.ensure_future(anext(messages))
                    try:
                        async for written in pull.written_before(following):
                            yield written
                        refs = await following
                    finally:
                        following.cancel()
                        await asyncio.gather(following, return_exceptions=True)
                    came_s = time.monotonic()
                    if isinstance(refs, EndFrame):
                        break
                    async for written in pull.take(refs):
                        yield written
            async for written in pull.rest():
                yield written
            age_s = refs.prefill_end_age_s + time.monotonic() - came_s
            yield replace(refs, prefill_end_age_s=age_s, transport=self._ranks.backend)

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._control.confirm(peer, ticket, timeout_s=timeout_s)

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._control.abort(peer, ticket, timeout_s=timeout_s)

    async def close(self) -> None:
        for task in self._meeting.values():
            task.cancel()
        await asyncio.gather(*self._meeting.values(), return_exceptions=True)
        await asyncio.gather(*(session.close() for session in self._sessions.values()), *self._ending)
        self._sessions.clear()
        await self._control.close()

    # Within

    @asynccontextmanager
    async def _session(self, peer: Peer, reshape: Reshape) -> AsyncGenerator[ReaderSession, None]:
        """The one with this life of a peer, in use from now on: who waits until it is open uses it as well."""
        self._users[peer] += 1
        try:
            yield await self._met(peer, reshape)
        finally:
            self._users[peer] -= 1
            if not self._users[peer]:
                del self._users[peer]

    async def _met(self, peer: Peer, reshape: Reshape) -> ReaderSession:
        """Opens a session where there is none, or it broke."""
        session = self._sessions.get(peer)
        if session is not None and session.alive:
            self._sessions.move_to_end(peer)
            return session
        task = self._meeting.get(peer)
        if task is None:
            task = self._meeting[peer] = asyncio.create_task(self._open(peer, reshape))
            task.add_done_callback(lambda done: self._opened(peer, done))
        return await asyncio.shield(task)

    async def _open(self, peer: Peer, reshape: Reshape) -> ReaderSession:
        assert self._me is not None
        session = ReaderSession(self._ranks, peer, reshape, worker_id=self._me.worker_id, epoch=self._me.epoch)
        try:
            await session.meet(self._control.session(peer))
        except BaseException:
            await session.close()
            raise
        return session

    def _opened(self, peer: Peer, task: asyncio.Task[ReaderSession]) -> None:
        self._meeting.pop(peer, None)
        if task.cancelled() or task.exception() is not None:
            return
        self._sessions[peer] = task.result()
        self._sessions.move_to_end(peer)
        gone = [one for one, session in self._sessions.items() if not session.alive]
        idle = [one for one in self._sessions if one not in self._users and one != peer]
        surplus = len(self._sessions) - len(gone) - self._max_sessions
        for one in dict.fromkeys((*gone, *idle[: max(0, surplus)])):
            why = lost(one.worker_id, "nobody pulls from them, and others are met")
            ending = asyncio.create_task(self._sessions.pop(one).close(why))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


class _Pull:
    """The batches of one pull: asked for as references come, told of in order when they are written."""

    def __init__(self, session: ReaderSession, request: PullRequest, reshape: Reshape) -> None:
        self.plan = PullPlan(reshape, first_block=request.first_block, num_tokens=request.ticket.num_tokens)
        self._session = session
        self._request = request
        self._refs: dict[int, tuple[int, int]] = {}
        """(block id, generation) of the holder's blocks that are still needed, by index."""
        self._readable = self.plan.first_source_block
        self._complete = request.first_block
        """Blocks of the reader's that were told of, counted from 0."""
        self._under_way: deque[Reading] = deque()
        self._finishing: asyncio.Task[None] | None = None
        """Waits for the oldest of them."""

    async def take(self, refs: tuple[RefFrame, ...]) -> AsyncGenerator[WrittenBlocks, None]:
        """The next blocks of the holder."""
        for ref in refs:
            if ref.ticket != self._request.ticket or ref.block_index != self._readable:
                text = f"block {ref.block_index} of {ref.ticket.prefill_key} came, {self._readable} was due"
                raise HandoffRefused(RefusalReason.CORRUPT, text)
            self._refs[ref.block_index] = (ref.block_id, ref.generation)
            self._readable += 1
        for batch in self.plan.batches(self._readable):
            while len(self._under_way) >= MAX_READS:
                async for written in self._oldest():
                    yield written
            self._under_way.append(await self._ask(batch))

    async def written_before(self, following: asyncio.Future[Any]) -> AsyncGenerator[WrittenBlocks, None]:
        """What is written until more has come of the holder, or nothing is under way."""
        while self._under_way and not following.done():
            await asyncio.wait((self._oldest_ends(), following), return_when=asyncio.FIRST_COMPLETED)
            if self._oldest_ends().done():
                async for written in self._oldest():
                    yield written

    async def rest(self) -> AsyncGenerator[WrittenBlocks, None]:
        """Until everything is written."""
        while self._under_way:
            async for written in self._oldest():
                yield written

    async def aclose(self) -> None:
        """Nothing is written into the reader's blocks any more when this returns, however it does."""
        await to_its_end(self._forget())

    async def _forget(self) -> None:
        if self._finishing is not None:
            self._finishing.cancel()
            await asyncio.gather(self._finishing, return_exceptions=True)
        for reading in self._under_way:
            await self._session.forget(reading)

    async def _ask(self, batch: Batch) -> Reading:
        request = self._request
        refs = tuple(self._refs[index] for index in batch.source_blocks)
        for index in [index for index in self._refs if index < batch.source_blocks.stop - 1]:
            del self._refs[index]  # the last one may be needed again
        block_ids = tuple(request.into[index - request.first_block] for index in batch.target_blocks)
        return await self._session.read(batch, request.ticket, refs, block_ids)

    def _oldest_ends(self) -> asyncio.Task[None]:
        if self._finishing is None:
            self._finishing = asyncio.create_task(self._session.finish(self._under_way[0]))
        return self._finishing

    async def _oldest(self) -> AsyncGenerator[WrittenBlocks, None]:
        """Waits for the oldest batch; what it completes."""
        await self._oldest_ends()
        self._finishing = None
        reading = self._under_way.popleft()
        first, self._complete = self._complete, max(self._complete, reading.batch.complete)
        if self._complete == first:
            return
        into = self._request.into[first - self._request.first_block : self._complete - self._request.first_block]
        now_s = time.monotonic()
        yield WrittenBlocks(
            ticket=self._request.ticket,
            first_block=first,
            block_ids=into,
            arrived_age_s=now_s - reading.arrived_s,
            written_age_s=now_s - reading.written_s,
        )


def _split(theirs: Hello, offer: Offer) -> KVSplit | None:
    """How the peer's KV lies over its ranks; None where its layout is of another version: the caller refuses it."""
    try:
        layout = KVLayout.from_bytes(theirs.layout)
    except ValueError:
        return None
    return KVSplit(layout=layout, tensor_parallel=offer.tensor_parallel, pipeline_stages=offer.pipeline_stages)
