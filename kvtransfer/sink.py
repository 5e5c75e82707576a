"""The decode worker's side of the handoff at run time: `HandoffPuller` plus transport, memory, clock and tasks.

1. `reserve` answers the router with a credit; `submit` redeems it, just before the sequence enters the engine's queue.
2. `on_blocks` (the engine admitted it) starts one pull task: it meets the peer once per epoch (`Hello`: version,
   fingerprint, layout), then writes block after block, each checked for ticket, pull, order, length and checksum; or
   counts what a transport has checked and written by itself (`kvtransfer.mover`, `kvtransfer.mapped`).
3. With the last block and the first token comes `kv_ready`; the engine joins the sequence to its batch.
4. `on_first_step` confirms to the holder, in the background, a bounded number of times.
5. `abort`, a deadline or a refusal: the task is cancelled, and only when it has ended comes `writer_done`, after
   which the engine may free the blocks; `failed` follows unless it was an abort.

Everything runs on one event loop. Callbacks run inside the call or task step that causes them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ..cluster.clock import Clock
from ..cluster.types import BlockRef, SampledToken, Side, Urgency, seq_id
from .meetings import Meetings
from .protocol.actions import (
    CancelPull,
    Confirm,
    Credit,
    Failed,
    KvReady,
    PullerAction,
    Refuse,
    SendAbort,
    StartPull,
    WriteBlocks,
    WriterDone,
)
from .protocol.credits import NO_PROMISE, CreditLedger
from .protocol.puller import HandoffPuller
from .protocol.puller_state import PullerCounts
from .store import KVStore, written
from .ticket import PROTOCOL_VERSION, HandoffRefused, Hello, Peer, RefusalReason, Ticket
from .transfer_stats import TransferStats
from .transport import BlockFrame, EndFrame, KVTransport, PullRequest, WrittenBlocks
from .wire import check_blocks, verify_copies

log = logging.getLogger(__name__)

CONFIRM_TRIES = 3


@dataclass(slots=True)
class _Sequence:
    """What the run time keeps for one sequence beside the protocol's record."""

    peer: Peer
    deadline_s: float
    task: asyncio.Task[None] | None = None
    first_byte_s: float | None = None
    last_byte_s: float = 0.0
    received_bytes: int = 0
    received_blocks: int = 0
    end: EndFrame | None = None
    end_s: float = 0.0


class SinkDriver:
    """See the module."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        fingerprint: str,
        store: KVStore,
        transport: KVTransport,
        clock: Clock,
        kv_ready: Callable[[str, SampledToken, TransferStats], None],
        writer_done: Callable[[str], None],
        failed: Callable[[str, RefusalReason, bool, str], None],
        credit_limit_blocks: int,
        credit_ttl_s: float = 10.0,
        max_credits: int = 4096,
        max_sequences: int = 4096,
        max_tombstones: int = 4096,
        max_pull_retries: int = 3,
        checksum: bool = True,
        call_timeout_s: float = 5.0,
    ) -> None:
        self._store = store
        self._transport = transport
        self._clock = clock
        self._kv_ready = kv_ready
        self._writer_done = writer_done
        self._failed = failed
        self._checksum = checksum
        self._call_timeout_s = call_timeout_s
        self._block_bytes = store.layout.block_bytes
        self._worker_id = worker_id
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=worker_id,
            epoch=epoch,
            fingerprint=fingerprint,
            layout=store.layout.to_bytes(),
        )
        self._meetings = Meetings(hello, transport, timeout_s=call_timeout_s)
        self._puller = HandoffPuller(
            block_size=store.layout.block_size,
            credits=CreditLedger(limit_blocks=credit_limit_blocks, ttl_s=credit_ttl_s, max_credits=max_credits),
            max_sequences=max_sequences,
            max_tombstones=max_tombstones,
            max_pull_retries=max_pull_retries,
        )
        self._sequences: dict[str, _Sequence] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False
        self.pulls_total: Counter[str] = Counter()
        """Transfers that ended well, by transport."""
        self.failures_total: Counter[str] = Counter()
        """Handoffs that failed, by `RefusalReason`; what was aborted is none."""

    # What the router asks

    def reserve(
        self,
        request_id: str,
        choice: int,
        decode_attempt: int,
        blocks: int,
        *,
        urgency: Urgency = NO_PROMISE,
        places: int | None = None,
        router_id: str = "",
    ) -> int:
        """Promises `blocks` of KV and one of `places` for promises, and returns the credit's id; asked again, the same
        one. Raises `HandoffRefused`: LIMIT (no more promises now; asked again soon, it keeps its place in the order),
        ABORTED (the abort came first), DUPLICATE (already submitted), CLOSED. Ends with `router_gone`.
        """
        self._check_open()
        wanted = (request_id, choice, decode_attempt, blocks, self._clock.now_s())
        credit = self._run(self._puller.reserve(*wanted, urgency=urgency, places=places, router_id=router_id))
        assert credit is not None
        return credit

    def submit(self, ticket: Ticket, peer: Peer, credit_id: int, timeout_s: float) -> str:
        """Redeems a credit for a sequence that is about to enter the engine's queue; returns its key. `HandoffRefused`
        (EXPIRED, ABORTED, DUPLICATE, STALE_ATTEMPT, LIMIT, CLOSED): do not add it. If the engine then refuses it, say
        `abort`. After `timeout_s` without KV it fails with DEADLINE.
        """
        self._check_open()
        if (peer.worker_id, peer.epoch) != (ticket.prefill_worker, ticket.epoch):
            raise HandoffRefused(RefusalReason.INVALID, f"peer: {peer} is not the ticket's {ticket.prefill_worker}")
        now_s = self._clock.now_s()
        self._run(self._puller.submit(ticket, credit_id, now_s + timeout_s, now_s))
        self._sequences[ticket.decode_key] = _Sequence(peer, now_s + timeout_s)
        return ticket.decode_key

    def submit_local(self, request_id: str, choice: int, decode_attempt: int, credit_id: int) -> str:
        """Redeems a credit for a sequence that this worker prefills itself; nothing more is said about it here."""
        self._check_open()
        now_s = self._clock.now_s()
        self._run(self._puller.submit_local(request_id, choice, decode_attempt, credit_id, now_s))
        return seq_id(request_id, choice, Side.DECODE, decode_attempt)

    def abort(self, request_id: str, choice: int, decode_attempt: int, *, notify_holder: bool = True) -> None:
        """Ends this decode attempt and all before it, credit included; idempotent, may overtake. `writer_done` follows
        for each that was submitted, when nothing can write into its blocks any more; `failed` does not.
        """
        now_s = self._clock.now_s()
        self._run(self._puller.abort(request_id, choice, decode_attempt, now_s, notify=notify_holder))

    def router_gone(self, router_id: str) -> None:
        """The router's stream broke: credits that it has not redeemed end."""
        self._run(self._puller.router_gone(router_id))

    # What the engine does

    def on_blocks(self, key: str, refs: tuple[BlockRef, ...], cached_tokens: int) -> None:
        """The engine took blocks (`BlocksGranted`); the pull starts. Keys that are not here are ignored."""
        self._run(self._puller.blocks_granted(key, refs, cached_tokens))

    def on_first_step(self, key: str) -> None:
        """The sequence produced its first own token: the holder may let go. Again, or for unknown keys: ignored."""
        self._run(self._puller.first_step(key))

    def tick(self) -> None:
        """Lapses credits and deadlines; call a few times a second."""
        self._run(self._puller.tick(self._clock.now_s()))

    # What it says about itself

    def counts(self) -> PullerCounts:
        """Sequences by state, credits."""
        return self._puller.counts()

    def check_integrity(self) -> None:
        """Raises AssertionError if something does not add up."""
        self._puller.check_integrity()
        counts = self._puller.counts()
        live = counts.waiting_blocks + counts.pulling + counts.cancelling + counts.ready + counts.running
        assert live == len(self._sequences)

    async def close(self) -> None:
        """Cancels every task and waits for them; the transport is the caller's to close. Idempotent."""
        self._closed = True
        pulls = [s.task for s in self._sequences.values() if s.task is not None]
        tasks: list[asyncio.Task[Any]] = [*pulls, *self._meetings.under_way(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Within: actions

    def _run(self, actions: list[PullerAction]) -> int | None:
        """Takes the actions in order; returns the credit's id after `Credit`."""
        credit: int | None = None
        for action in actions:
            match action:
                case Refuse(key, reason, message):
                    raise HandoffRefused(reason, message or f"decode worker {self._worker_id} on {key}")
                case Credit(_, credit_id):
                    credit = credit_id
                case StartPull():
                    self._start(action)
                case CancelPull(key):
                    task = self._sequences[key].task
                    assert task is not None
                    task.cancel()
                case WriterDone(key):
                    self._sequences.pop(key, None)
                    self._writer_done(key)
                case Failed(key, reason, message):
                    self.failures_total[reason.value] += 1
                    self._failed(key, reason, reason.retryable, message)
                case KvReady(key, first_token):
                    stats = self._stats(key)
                    self.pulls_total[stats.transport] += 1
                    self._kv_ready(key, first_token, stats)
                case Confirm(ticket):
                    self._spawn(self._confirm(ticket, self._sequences[ticket.decode_key].peer))
                case SendAbort(ticket):
                    self._spawn(self._send_abort(ticket, self._sequences[ticket.decode_key].peer))
                case WriteBlocks():
                    raise AssertionError("only a pull's frame leads to a write")
        return credit

    def _start(self, action: StartPull) -> None:
        sequence = self._sequences[action.key]
        sequence.task = asyncio.create_task(self._pull(action, sequence), name=f"pull {action.key}")
        sequence.task.add_done_callback(lambda task: self._pull_ended(action, task))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Within: one pull

    async def _pull(self, action: StartPull, sequence: _Sequence) -> None:
        """Runs one pull to its end frame, or raises `HandoffRefused`."""
        timeout_s = sequence.deadline_s - self._clock.now_s()
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await asyncio.sleep(action.delay_s)
                await self._meetings.meet(sequence.peer)
                request = PullRequest(
                    ticket=action.ticket,
                    first_block=action.first_block,
                    pull_index=action.pull_index,
                    checksum=self._checksum,
                    into=self._puller.targets_of(action.key),
                )
                frames = self._transport.pull(sequence.peer, request, timeout_s=timeout_s)
                async with aclosing(frames):
                    async for came in frames:
                        if isinstance(came, EndFrame):
                            self._accept_end(action, sequence, came)
                            return
                        if isinstance(came, WrittenBlocks):
                            self._accept_written(action, sequence, came)
                        else:
                            await self._accept_blocks(action, sequence, came)
        except TimeoutError as error:
            raise HandoffRefused(RefusalReason.DEADLINE, f"no KV within {timeout_s:.3f} s") from error
        raise HandoffRefused(RefusalReason.PEER_LOST, "the stream of blocks ended before its end frame")

    async def _accept_blocks(self, action: StartPull, sequence: _Sequence, frames: tuple[BlockFrame, ...]) -> None:
        """Checks and writes blocks that came together; `HandoffRefused` if others were due. Nothing writes after it."""
        now_s = self._clock.now_s()
        check_blocks(frames, self._block_bytes, checksum=self._checksum)
        indices = [frame.block_index for frame in frames]
        for block_ids in self._due(action, (frame.ticket for frame in frames), indices):
            writing = self._store.begin_write(block_ids, [frame.payload for frame in frames])
            try:
                verify_copies(frames)
            finally:
                await written(writing)
        self._count(action, sequence, indices, now_s, self._clock.now_s())

    def _accept_written(self, action: StartPull, sequence: _Sequence, came: WrittenBlocks) -> None:
        """Takes blocks that the transport has written; `HandoffRefused` if they are not those that were due."""
        now_s = self._clock.now_s()
        indices = range(came.first_block, came.first_block + len(came.block_ids))
        for block_ids in self._due(action, (came.ticket,), indices):
            if block_ids != came.block_ids:
                raise HandoffRefused(RefusalReason.CORRUPT, f"blocks of {action.key} were written elsewhere")
        self._count(action, sequence, indices, now_s - came.arrived_age_s, now_s - came.written_age_s)

    def _due(self, action: StartPull, tickets: Iterable[Ticket], indices: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Where blocks that arrived belong; `HandoffRefused` if others were due."""
        for step in self._puller.blocks_arrived(action.key, action.pull_index, tickets, indices):
            if isinstance(step, WriteBlocks):
                yield step.block_ids
            else:
                self._run([step])

    def _count(
        self, action: StartPull, sequence: _Sequence, indices: Sequence[int], arrived_s: float, written_s: float
    ) -> None:
        """Blocks are written: the next ones are due."""
        self._run(self._puller.blocks_written(action.key, action.pull_index, indices))
        if sequence.first_byte_s is None:
            sequence.first_byte_s = arrived_s
        sequence.last_byte_s = written_s
        sequence.received_bytes += self._block_bytes * len(indices)
        sequence.received_blocks += len(indices)

    def _accept_end(self, action: StartPull, sequence: _Sequence, frame: EndFrame) -> None:
        """Takes the end of a pull; `HandoffRefused` if something is missing."""
        sequence.end, sequence.end_s = frame, self._clock.now_s()
        end = (action.key, action.pull_index, frame.ticket, frame.num_tokens, frame.first_token)
        self._run(self._puller.end_arrived(*end))

    def _pull_ended(self, action: StartPull, task: asyncio.Task[None]) -> None:
        """The task of one pull is over: tells the protocol why."""
        reason: RefusalReason | None = None
        message = ""
        if task.cancelled():
            reason, message = RefusalReason.CLOSED, "the decode worker is shutting down"
        elif (error := task.exception()) is not None:
            if isinstance(error, HandoffRefused):
                reason, message = error.reason, str(error)
            else:
                reason, message = RefusalReason.INVALID, f"{type(error).__name__}: {error}"
                log.error("pull of %s failed unexpectedly", action.key, exc_info=error)
        if reason in (RefusalReason.WRONG_EPOCH, RefusalReason.PEER_LOST) and action.key in self._sequences:
            self._meetings.forget(self._sequences[action.key].peer)
        if self._closed:
            reason = RefusalReason.CLOSED
        self._run(self._puller.pull_ended(action.key, action.pull_index, reason, message, self._clock.now_s()))

    def _stats(self, key: str) -> TransferStats:
        sequence = self._sequences[key]
        assert sequence.end is not None
        prefill_end_s = sequence.end_s - sequence.end.prefill_end_age_s
        first_s = sequence.first_byte_s
        last_s = sequence.last_byte_s if first_s is not None else sequence.end_s
        return TransferStats(
            transfer_s=last_s - first_s if first_s is not None else 0.0,
            exposed_transfer_s=max(0.0, last_s - prefill_end_s),
            bytes=sequence.received_bytes,
            blocks=sequence.received_blocks,
            retries=self._puller.retries_of(key),
            transport=sequence.end.transport,
        )

    # Within: confirm, abort

    async def _confirm(self, ticket: Ticket, peer: Peer) -> None:
        try:
            await asyncio.sleep(0)  # the first step's tokens leave before it
            for _ in range(CONFIRM_TRIES):
                try:
                    await self._transport.confirm(peer, ticket, timeout_s=self._call_timeout_s)
                    return
                except HandoffRefused as refusal:
                    log.info("confirmation of %s: %s", ticket.prefill_key, refusal)
                    if refusal.reason not in (RefusalReason.PEER_LOST, RefusalReason.DEADLINE):
                        return
        finally:
            self._sequences.pop(ticket.decode_key, None)
            self._run(self._puller.confirm_ended(ticket.decode_key, self._clock.now_s()))

    async def _send_abort(self, ticket: Ticket, peer: Peer) -> None:
        try:
            await self._transport.abort(peer, ticket, timeout_s=self._call_timeout_s)
        except HandoffRefused as refusal:
            log.info("abort of %s: %s", ticket.prefill_key, refusal)

    def _check_open(self) -> None:
        if self._closed:
            raise HandoffRefused(RefusalReason.CLOSED, "the decode worker is shutting down")
