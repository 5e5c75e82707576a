"""Reader's end of one session (`holder` tells what that is): this worker's ranks meet a holder's, and take batches.

A batch is asked for, and when the holder says GO every rank that has a part in it is told to receive it and to write it
where it belongs. `MAX_READS` are under way at once; others wait their turn. A read that is given up (`Reading.forget`)
is received all the same, so that the order of messages stands, and not written. A holder that says what is not due ends
the session: what it can make its reader keep is bounded, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from ..reshape import Reshape
from ..ticket import HandoffRefused, Peer, RefusalReason, Ticket
from . import messages as m
from .commands import Answer, Done, Failed, Forget, Forgotten, Join, Joined, Key, Left, Receive
from .holder import MAX_KEYS, MAX_READS, pair_name, pair_proof
from .plan import Batch
from .ports import WorkerRanks

log = logging.getLogger(__name__)

SETTLE_S = 30.0
"""A rank that does not answer for so long has ended, and its worker with it."""
_BROKEN = frozenset({RefusalReason.CORRUPT, RefusalReason.DEADLINE, RefusalReason.CLOSED})
"""Why a session may end that another may do without."""
Say = Callable[[bytes], Awaitable[None]]
Stream = tuple[AsyncIterator[bytes], Say]
"""What the holder says, and how to say something."""


@dataclass(slots=True)
class Reading:
    """One batch of one pull."""

    number: int
    batch: Batch
    block_ids: tuple[int, ...]
    """Of the reader, for `batch.target_blocks`."""
    done: asyncio.Future[None]
    """Set when everything is written, or with why it will not be."""
    wanted: bool = True
    receiving: set[int] = field(default_factory=set)
    """Pairs whose part has not been written."""
    forgotten: set[int] = field(default_factory=set)
    """Pairs that have not said yet that they will not write."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing of it will be written any more."""
    arrived_s: float = 0.0
    written_s: float = 0.0


class ReaderSession:
    """One life of one peer. Lives on the worker's event loop."""

    def __init__(self, ranks: WorkerRanks, peer: Peer, reshape: Reshape, *, worker_id: str, epoch: int) -> None:
        self._ranks = ranks
        self._peer = peer
        self._reshape = reshape
        self._opened = m.Open(
            worker_id=worker_id,
            epoch=epoch,
            holder_epoch=peer.epoch,
            session=os.urandom(m.NONCE_BYTES),
            secret=os.urandom(m.NONCE_BYTES),
            backend=ranks.backend,
            split=ranks.split,
        )
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._places = asyncio.Semaphore(MAX_READS)
        self._readings: dict[int, Reading] = {}
        self._next = 0
        self._joined = False
        self._keys_left = MAX_KEYS * len(reshape.routes)
        self._to_meet = set(range(len(reshape.routes)))
        self._ranks_in = {route.target_rank for route in reshape.routes}
        self._to_leave: set[int] = set()
        self._met: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._over: HandoffRefused | None = None
        self._ended = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        return self._over is None

    async def meet(self, stream: AbstractContextManager[Stream]) -> None:
        """Opens it over `stream`; every pair of ranks has met when this returns. Raises `HandoffRefused`."""
        self._work = asyncio.create_task(self._run(stream))
        try:
            async with asyncio.timeout(self._ranks.timeout_s):
                await asyncio.shield(self._met)
        except TimeoutError:
            self._end(self._lost(f"they were not met within {self._ranks.timeout_s:g} s"))
        if self._over is not None:
            raise self._over

    async def read(
        self, batch: Batch, ticket: Ticket, refs: tuple[tuple[int, int], ...], block_ids: tuple[int, ...]
    ) -> Reading:
        """Asks for a batch when its turn has come; returns then. `refs`: (block id, generation) of
        `batch.source_blocks`. Raises `HandoffRefused` (PEER_LOST) where the session is over.
        """
        await self._places.acquire()
        if self._over is not None:
            self._places.release()
            raise self._over
        self._next += 1
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda future: future.exception())  # nobody may be left to ask
        reading = self._readings[self._next] = Reading(self._next, batch, block_ids, done)
        read = m.Read(
            batch=self._next,
            ticket=ticket,
            first_token=batch.first_token,
            end_token=batch.end_token,
            block_ids=tuple(block_id for block_id, _ in refs),
            generations=tuple(generation for _, generation in refs),
        )
        self._out.put_nowait(m.encode(read))
        return reading

    async def finish(self, reading: Reading) -> None:
        """Returns when the batch is written. Raises `HandoffRefused`: the holder's reason, or PEER_LOST, which also
        ends the session where nothing came for too long.
        """
        try:
            async with asyncio.timeout(2 * self._ranks.timeout_s):
                await asyncio.shield(reading.done)
        except TimeoutError:
            refusal = self._lost(f"no batch within {2 * self._ranks.timeout_s:g} s")
            self._end(refusal)
            raise refusal from None

    async def forget(self, reading: Reading) -> None:
        """Returns when nothing of the batch will be written any more; idempotent."""
        reading.wanted = False
        if reading.receiving and not reading.forgotten and self._over is None:
            reading.forgotten = set(reading.receiving)
            for pair in sorted(reading.forgotten):
                self._say(pair, Forget(session=self._opened.session, pair=pair, batch=reading.number))
        if reading.receiving or reading.forgotten:
            await _bounded(reading.settled)

    async def close(self, why: HandoffRefused | None = None) -> None:
        """Ends it; returns when no rank will write anything of it. Idempotent. `why`: to whoever still uses it; by
        default that this worker is shutting down.
        """
        self._end(why or HandoffRefused(RefusalReason.CLOSED, "the decode worker is shutting down"))
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
        await _bounded(self._ended)

    # Within: the stream

    async def _run(self, stream: AbstractContextManager[Stream]) -> None:
        self._out.put_nowait(m.encode(self._opened))
        with stream as (said, say):
            writing = asyncio.create_task(self._write(say))
            try:
                async for data in said:
                    self._take(m.decode(data))
                self._end(self._lost("the stream ended"))
            except HandoffRefused as refusal:
                self._end(self._lost(str(refusal)) if refusal.reason in _BROKEN else refusal)
            finally:
                writing.cancel()
                self._end(self._lost("the session ended"))

    async def _write(self, write: Say) -> None:
        while True:
            await write(await self._out.get())

    def _take(self, message: m.Message) -> None:
        match message:
            case m.Opened() if not self._joined:
                self._join(message)
            case m.PairKey() if message.pair < len(self._reshape.routes) and self._keys_left:
                self._keys_left -= 1
                key = Key(session=self._opened.session, pair=message.pair, key=message.key, value=message.value)
                self._say(message.pair, key)
            case m.Go() if (reading := self._readings.get(message.batch)) and not reading.receiving:
                self._receive(reading)
            case m.No() if (reading := self._readings.get(message.batch)) and not reading.receiving:
                self._conclude(reading, message.refusal)
            case m.End():
                raise message.refusal
            case _:
                raise HandoffRefused(RefusalReason.CORRUPT, f"{type(message).__name__} came")

    def _join(self, answered: m.Opened) -> None:
        self._joined = True
        self._ranks.attend(self._opened.session, self._heard)
        self._to_leave = set(self._ranks_in)
        for pair in range(len(self._reshape.routes)):
            join = Join(
                session=self._opened.session,
                pair=pair,
                sends=False,
                source=self._reshape.source,
                target=self._reshape.target,
                group=pair_name(self._opened, pair),
                proof=pair_proof(self._opened, answered, pair),
            )
            self._say(pair, join)

    def _receive(self, reading: Reading) -> None:
        reading.arrived_s = time.monotonic()
        reading.receiving = set(range(len(self._reshape.routes)))
        cleared: set[int] = set()
        for pair, route in enumerate(self._reshape.routes):
            first = route.target_rank not in cleared
            cleared.add(route.target_rank)
            receive = Receive(
                session=self._opened.session,
                pair=pair,
                batch=reading.number,
                first_token=reading.batch.first_token,
                end_token=reading.batch.end_token,
                block_ids=reading.block_ids if reading.wanted else (),
                cleared_from=reading.batch.cleared_from if first else None,
            )
            self._say(pair, receive)

    # Within: the ranks

    def _say(self, pair: int, command: Join | Key | Receive | Forget) -> None:
        self._ranks.say(self._reshape.routes[pair].target_rank, command)

    def _heard(self, rank: int, answer: Answer) -> None:
        match answer:
            case Key():
                self._out.put_nowait(m.encode(m.PairKey(pair=answer.pair, key=answer.key, value=answer.value)))
            case Joined():
                self._to_meet.discard(answer.pair)
                if not self._to_meet and not self._met.done():
                    self._met.set_result(None)
            case Done() if answer.batch in self._readings:
                reading = self._readings[answer.batch]
                reading.receiving.discard(answer.pair)
                self._count(reading, answer.pair)
                if not reading.receiving:
                    reading.written_s = time.monotonic()
                    self._conclude(reading, None)
            case Forgotten() if answer.batch in self._readings:
                self._count(self._readings[answer.batch], answer.pair)
            case Failed():
                self._end(self._lost(answer.message))
            case Left():
                self._to_leave.discard(rank)
                if not self._to_leave:
                    self._all_left()

    def _count(self, reading: Reading, pair: int) -> None:
        """A pair will not write any more of a batch that is given up."""
        if reading.forgotten:
            reading.forgotten.discard(pair)
            if not reading.forgotten:
                reading.settled.set()

    def _conclude(self, reading: Reading, refusal: HandoffRefused | None) -> None:
        if self._readings.pop(reading.number, None) is None:
            return
        self._places.release()
        reading.settled.set()
        if reading.done.done():
            return
        if refusal is None:
            reading.done.set_result(None)
        else:
            reading.done.set_exception(refusal)

    # Within: its end

    def _lost(self, why: str) -> HandoffRefused:
        return m.lost(self._peer.worker_id, why)

    def _end(self, refusal: HandoffRefused) -> None:
        """Whoever waits is told; ranks leave. Only once."""
        if self._over is not None:
            return
        self._over = refusal
        if not self._met.done():
            self._met.set_result(None)
        for reading in self._readings.values():
            if not reading.done.done():
                reading.done.set_exception(refusal)
            self._places.release()
        if self._to_leave:
            self._ranks.leave(self._opened.session)
        else:
            self._all_left()
        if self._work is not None and self._work is not asyncio.current_task():
            self._work.cancel()

    def _all_left(self) -> None:
        """No rank writes anything of this session any more."""
        self._ranks.ignore(self._opened.session)
        for reading in self._readings.values():
            reading.settled.set()
        self._readings.clear()
        self._ended.set()


async def _bounded(event: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(SETTLE_S):
            await event.wait()
    except TimeoutError:
        log.error("a rank of this worker has not answered for %g s", SETTLE_S)
