"""Holder's end of sessions: lets readers' ranks meet this worker's, and sends what they ask for.

1. A reader opens a session over the KV service, which knows members from strangers. Each pair of ranks between which
   KV of the two passes meets, by what is relayed here (`groups`).
2. READ: the ticket and the generations of its blocks are compared, every rank copies its part into a message, and they
   are compared again: as the pool raises a generation before it hands a block out, equal means that what was copied is
   what was offered. Then, in one go, GO is said and every rank told to send; so both ends have one order of messages on
   every pair. Blocks are not held meanwhile, and no lease is needed for what is on its way.
3. A read names the blocks of one batch at most, and what is staged is bounded, over all sessions
   (`MAX_STAGED_BYTES`); reads beyond it wait. One counts until its answer is written: a reader that does not take what
   it is told ends its session, and nothing piles up for it.
4. A pair that breaks, a reader that goes or breaks a rule ends the session on both sides. The next one has groups of
   its own: a peer that comes back meets no remains.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from ...cluster.types import BlockRef
from ..reshape import Reshape
from ..source import SourceDriver
from ..ticket import HandoffRefused, RefusalReason
from . import messages as m
from .commands import Answer, Discard, Done, Failed, Join, Joined, Key, Send, Stage
from .plan import batch_blocks, moved_block_bytes
from .ports import WorkerRanks
from .staging import StagedBytes

log = logging.getLogger(__name__)

MAX_SESSIONS = 64
MAX_READS = 4
"""Of a session, that are not written yet. The holder may hear later than the reader that one is over."""
MAX_STAGED_BYTES = 256 * 2**20
MAX_KEYS = 64
"""That a rank of the reader may put in for each pair, to meet."""
Write = Callable[[bytes], Awaitable[None]]


def pair_name(opened: m.Open, pair: int) -> str:
    """Of a pair's process group: both lives, the session and the pair, so that no two groups ever share a key."""
    return f"{opened.holder_epoch:x}/{opened.epoch:x}/{opened.session.hex()}/{pair}"


def pair_proof(opened: m.Open, answered: m.Opened, pair: int) -> bytes:
    """What the two ranks of a pair show each other."""
    return hmac.digest(opened.secret + answered.secret, pair_name(opened, pair).encode(), hashlib.sha256)


class CollectiveHolder:
    """Serves sessions of one worker. Lives on its event loop."""

    def __init__(self, source: SourceDriver, ranks: WorkerRanks, *, epoch: int) -> None:
        self._source = source
        self._ranks = ranks
        self._epoch = epoch
        self._sessions = 0
        self._staged = StagedBytes(max(MAX_STAGED_BYTES, ranks.split.layout.block_bytes))

    @property
    def sessions(self) -> int:
        """Open now."""
        return self._sessions

    async def serve(self, said: AsyncIterator[bytes], write: Write) -> None:
        """One session, until the reader goes or something breaks; END is the last message then. `write` is called by
        one task at a time.
        """
        if self._sessions >= MAX_SESSIONS:
            refusal = HandoffRefused(RefusalReason.LIMIT, f"{MAX_SESSIONS} sessions are open")
            await write(m.encode(m.End(refusal=refusal)))
            return
        self._sessions += 1
        try:
            await self._serve(said, write)
        except HandoffRefused as refusal:  # of OPEN: nothing has been written yet
            await write(m.encode(m.End(refusal=refusal)))
        finally:
            self._sessions -= 1

    async def _serve(self, said: AsyncIterator[bytes], write: Write) -> None:
        try:
            async with asyncio.timeout(self._ranks.timeout_s):
                opened = m.decode(await anext(said))
        except (TimeoutError, StopAsyncIteration):
            raise HandoffRefused(RefusalReason.DEADLINE, "no OPEN came") from None
        if not isinstance(opened, m.Open):
            raise HandoffRefused(RefusalReason.CORRUPT, "a session begins with OPEN")
        if opened.holder_epoch != self._epoch:
            raise HandoffRefused(RefusalReason.WRONG_EPOCH, "the session is of another life of this worker")
        if opened.backend != self._ranks.backend:
            text = f"this worker's ranks speak {self._ranks.backend}, not {opened.backend}"
            raise HandoffRefused(RefusalReason.TRANSPORT_MISMATCH, text)
        try:
            reshape = Reshape(self._ranks.split, opened.split)
        except ValueError as error:
            raise HandoffRefused(RefusalReason.LAYOUT_MISMATCH, str(error)) from error
        if (one_bytes := moved_block_bytes(reshape)) > self._staged.limit_bytes:
            text = f"a block is {one_bytes} bytes for all ranks of the reader, more than {self._staged.limit_bytes}"
            raise HandoffRefused(RefusalReason.LIMIT, text)
        session = _Session(self._source, self._ranks, self._staged, opened, reshape)
        try:
            await session.run(said, write)
        finally:
            session.close()


class _Session:
    def __init__(
        self,
        source: SourceDriver,
        ranks: WorkerRanks,
        staged: StagedBytes,
        opened: m.Open,
        reshape: Reshape,
    ) -> None:
        self._source = source
        self._ranks = ranks
        self._staged = staged
        self._opened = opened
        self._reshape = reshape
        self._out: asyncio.Queue[tuple[bytes, asyncio.Future[None] | None]] = asyncio.Queue()
        """What is to be written, with who waits for that. A reader can make no more of it than it has reads."""
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._most_blocks = batch_blocks(reshape)
        self._block_bytes = moved_block_bytes(reshape)
        self._closed = False
        self._keys_left = MAX_KEYS * len(reshape.routes)
        self._reads: dict[int, asyncio.Task[None]] = {}
        self._waits: dict[int, asyncio.Event] = {}
        self._left: dict[int, set[int]] = {}
        """Pairs that have not done what they were told last about a batch."""

    async def run(self, said: AsyncIterator[bytes], write: Write) -> None:
        """Until one of the two ends it, or the reader breaks a rule: END is the last message then."""
        answered = m.Opened(secret=os.urandom(m.NONCE_BYTES))
        self._tell(answered)
        self._ranks.attend(self._opened.session, self._heard)
        for pair, route in enumerate(self._reshape.routes):
            self._ranks.say(
                route.source_rank,
                Join(
                    session=self._opened.session,
                    pair=pair,
                    sends=True,
                    source=self._reshape.source,
                    target=self._reshape.target,
                    group=pair_name(self._opened, pair),
                    proof=pair_proof(self._opened, answered, pair),
                ),
            )
        writing = asyncio.create_task(self._write(write))
        listening = asyncio.create_task(self._listen(said))
        try:
            await asyncio.wait((writing, listening, self._broken), return_when=asyncio.FIRST_COMPLETED)
            for over in (listening, writing, self._broken):
                if over.done():
                    over.result()
        except HandoffRefused as refusal:
            listening.cancel()
            self.close()
            await self._say_last(refusal, writing)
        finally:
            for task in (writing, listening):
                task.cancel()
            await asyncio.gather(writing, listening, return_exceptions=True)

    async def _say_last(self, refusal: HandoffRefused, writing: asyncio.Task[None]) -> None:
        """END, behind what is being written: gRPC takes no message beside one that was given up half-way, and the
        reader would never hear of the end.
        """
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tell(m.End(refusal=refusal), written)
        await asyncio.wait((written, writing), timeout=self._ranks.timeout_s, return_when=asyncio.FIRST_COMPLETED)

    def close(self) -> None:
        """Ends what is under way; the ranks leave. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for task in self._reads.values():
            task.cancel()
        self._broken.cancel()
        self._ranks.ignore(self._opened.session)
        self._ranks.leave(self._opened.session)

    async def _write(self, write: Write) -> None:
        while True:
            message, written = await self._out.get()
            await write(message)
            if written is not None and not written.done():
                written.set_result(None)

    def _tell(self, message: m.Message, written: asyncio.Future[None] | None = None) -> None:
        self._out.put_nowait((m.encode(message), written))

    def _break(self, why: HandoffRefused) -> None:
        if not self._broken.done():
            self._broken.set_exception(why)
            self._broken.exception()  # the session may end for another reason: nobody need ask

    async def _listen(self, said: AsyncIterator[bytes]) -> None:
        async for data in said:
            message = m.decode(data)
            if isinstance(message, m.PairKey) and message.pair < len(self._reshape.routes):
                self._keys_left -= 1
                if self._keys_left < 0:
                    raise HandoffRefused(RefusalReason.LIMIT, f"more than {MAX_KEYS} keys for each pair")
                key = Key(session=self._opened.session, pair=message.pair, key=message.key, value=message.value)
                self._ranks.say(self._reshape.routes[message.pair].source_rank, key)
            elif isinstance(message, m.Read):
                self._read(message)
            else:
                raise HandoffRefused(RefusalReason.CORRUPT, f"{type(message).__name__} came")

    def _read(self, read: m.Read) -> None:
        size = self._reshape.source.layout.block_size
        blocks = -(-read.end_token // size) - read.first_token // size
        known = all(block_id < self._ranks.num_blocks for block_id in read.block_ids)
        if read.first_token >= read.end_token or len(read.block_ids) != blocks or not known:
            raise HandoffRefused(RefusalReason.CORRUPT, f"batch {read.batch} does not name its blocks")
        if blocks > self._most_blocks:
            text = f"batch {read.batch} names {blocks} blocks, a batch has at most {self._most_blocks}"
            raise HandoffRefused(RefusalReason.LIMIT, text)
        if len(self._reads) >= 2 * MAX_READS or read.batch in self._reads:
            raise HandoffRefused(RefusalReason.LIMIT, f"more than {2 * MAX_READS} reads of a session, or one twice")
        task = self._reads[read.batch] = asyncio.create_task(self._answer(read))
        task.add_done_callback(partial(self._answered, read.batch))

    def _answered(self, batch: int, task: asyncio.Task[None]) -> None:
        self._reads.pop(batch, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a read of a session failed unexpectedly", exc_info=error)
            self._break(HandoffRefused(RefusalReason.PEER_LOST, f"{type(error).__name__}: {error}"))

    async def _answer(self, read: m.Read) -> None:
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with self._staged.room(len(read.block_ids) * self._block_bytes):
            try:
                await self._send(read, written)
            except HandoffRefused as refusal:
                self._tell(m.No(batch=read.batch, refusal=refusal), written)
        await written

    async def _send(self, read: m.Read, written: asyncio.Future[None]) -> None:
        """Returns when the batch is sent. `HandoffRefused`: nothing of it is, and nothing stays staged."""
        refs = tuple(BlockRef(*pair) for pair in zip(read.block_ids, read.generations, strict=True))
        session, routes = self._opened.session, self._reshape.routes
        self._source.check_read(read.ticket, refs)
        tokens = {"first_token": read.first_token, "end_token": read.end_token}
        for pair, route in enumerate(routes):
            stage = Stage(session=session, pair=pair, batch=read.batch, block_ids=read.block_ids, **tokens)
            self._ranks.say(route.source_rank, stage)
        await self._all_done(read.batch)
        try:
            self._source.check_read(read.ticket, refs)
        except HandoffRefused:
            for pair, route in enumerate(routes):
                self._ranks.say(route.source_rank, Discard(session=session, pair=pair, batch=read.batch))
            raise
        self._tell(m.Go(batch=read.batch), written)
        for pair, route in enumerate(routes):
            self._ranks.say(route.source_rank, Send(session=session, pair=pair, batch=read.batch))
        await self._all_done(read.batch)

    async def _all_done(self, batch: int) -> None:
        self._left[batch] = set(range(len(self._reshape.routes)))
        event = self._waits[batch] = asyncio.Event()
        try:
            await event.wait()
        finally:
            del self._waits[batch], self._left[batch]

    def _heard(self, rank: int, answer: Answer) -> None:
        match answer:
            case Key():
                self._tell(m.PairKey(pair=answer.pair, key=answer.key, value=answer.value))
            case Done():
                left = self._left.get(answer.batch)
                if left is not None:
                    left.discard(answer.pair)
                    if not left:
                        self._waits[answer.batch].set()
            case Failed():
                self._break(m.lost("the prefill worker", answer.message))
            case Joined():
                log.debug("pair %d of session %s has met", answer.pair, answer.session.hex())
