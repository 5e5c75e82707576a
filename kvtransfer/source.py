"""The prefill worker's side of the handoff at run time: `HandoffHolder` plus memory, clock and waiting.

1. The worker tells it what the engine does: `on_submitted`, `on_blocks`, `on_advanced`, `on_done`, `on_failed`.
2. A transport server asks `open_pull`: runs of blocks come out as the watermark moves; between runs it waits for a
   wake-up.
3. Every block's generation is checked before its bytes are offered and, by `BlockRun.verify`, after they were copied.
4. `confirm`, an abort or the lease ends the ticket; the worker hears `release` (held) or `abort_prefill` (still
   computing), once, when no reader is left.

Everything runs on one event loop. A run is copied without an `await` in between, so whenever other code runs no
reader is inside a block: a revoked reader is ended at once, and finds out when it next asks. Where other processes have
a part in the blocks (ranks on other nodes or GPUs), their bytes come meanwhile into memory of their own: what comes of
a block that is let go of before is seen by its generation, as with mapped memory.

A reader that has mapped the memory (`PullRequest.mapped`) is sent references and copies by itself, later, even after
its pull has ended here. It needs no hold: until it confirms, the lease keeps the blocks, and whatever ends the ticket
before (an abort, the lease, a preemption) only frees them; the pool raises a block's generation, in the mapped memory,
before it is handed out anew, and the reader compares it after each copy (`kvtransfer.mapped.segment`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from ..cluster.clock import Clock
from ..cluster.types import BlockRef, SampledToken, Side, seq_id
from .protocol.actions import AbortPrefill, HolderAction, Outcome, Refuse, ReleaseBlocks, Revoke, Serve, Wake
from .protocol.holder import HandoffHolder
from .protocol.holder_state import HolderCounts, ReaderView
from .store import BlockRead, KVStore
from .ticket import PROTOCOL_VERSION, HandoffRefused, Hello, RefusalReason, SegmentOffer, Ticket, check_hello
from .transport import MESSAGE_BYTES, BlockFrame, BlockRun, EndFrame, KVSource, PullRequest
from .wire import MAX_BLOCKS_PER_MESSAGE, block_checksum

OWN_READER_BYTES = 16 * 2**20
"""What a worker's own reader is told of at a time: a pull that makes progress renews the lease with each."""


class _Reader:
    """One open pull: wakes it, and remembers why it was stopped."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.wake = asyncio.Event()
        self.revoked: RefusalReason | None = None
        self._sending: BlockRead | None = None
        """Whose bytes the last run has."""
        self._ahead: BlockRead | None = None
        self._ahead_refs: tuple[BlockRef, ...] = ()
        """What is being read for the next run."""

    def read_ahead(self, store: KVStore, refs: tuple[BlockRef, ...]) -> None:
        """Has the device begin the next run's blocks, while this one is sent."""
        if refs:
            self._ahead, self._ahead_refs = store.begin_read([ref.block_id for ref in refs]), refs

    async def read(self, store: KVStore, refs: tuple[BlockRef, ...]) -> tuple[tuple[BlockRef, ...], list[memoryview]]:
        """Those of the blocks, from the first on, that are read now, and their bytes: until the next `await`, or the
        next call where they were read ahead. Does not suspend where no other process has a part in it.
        """
        begun, ahead_refs = self._ahead, self._ahead_refs
        self._ahead = None
        self.end_reads()
        if begun is not None and refs[: len(ahead_refs)] == ahead_refs:
            self._sending = begun
            await begun.come()
            return ahead_refs, begun.views()
        if begun is not None:
            begun.end()
        return refs, await store.fetch_blocks([ref.block_id for ref in refs])

    def end_reads(self) -> None:
        """Nothing that was read is wanted any more."""
        for read in (self._sending, self._ahead):
            if read is not None:
                read.end()
        self._sending = self._ahead = None


class SourceDriver(KVSource):
    """See the module. Callbacks run inside the call that causes them and must not call back into the driver."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        fingerprint: str,
        store: KVStore,
        generation_of: Callable[[int], int],
        release: Callable[[str, Outcome], None],
        abort_prefill: Callable[[str], None],
        clock: Clock,
        lease_s: float = 30.0,
        pull_wait_s: float = 30.0,
        max_tickets: int = 4096,
        max_tombstones: int = 4096,
        message_bytes: int = MESSAGE_BYTES,
        offer: SegmentOffer | None = None,
        ranks: bytes = b"",
    ) -> None:
        """`offer`, `ranks`: as in `Hello`."""
        self._store = store
        self._generation_of = generation_of
        self._release = release
        self._abort_prefill = abort_prefill
        self._clock = clock
        block_bytes = store.layout.block_bytes
        self._run_blocks = min(MAX_BLOCKS_PER_MESSAGE, max(1, message_bytes // block_bytes))
        self._own_run_blocks = min(MAX_BLOCKS_PER_MESSAGE, max(1, OWN_READER_BYTES // block_bytes))
        self._hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=worker_id,
            epoch=epoch,
            fingerprint=fingerprint,
            layout=store.layout.to_bytes(),
            offer=offer,
            ranks=ranks,
        )
        self._holder = HandoffHolder(
            worker_id=worker_id,
            epoch=epoch,
            fingerprint=fingerprint,
            block_size=store.layout.block_size,
            lease_s=lease_s,
            pull_wait_s=pull_wait_s,
            max_tickets=max_tickets,
            max_tombstones=max_tombstones,
        )
        self._readers: dict[int, _Reader] = {}
        self._closed = False
        self.expired_total = 0
        """Held handoffs whose lease ran out."""

    # What the engine does

    def on_submitted(self, request_id: str, choice: int, prefill_attempt: int, num_tokens: int) -> str:
        """A prefill is about to enter the engine's queue; returns its key. `HandoffRefused` (ABORTED, DUPLICATE, LIMIT,
        CLOSED): do not add it. If the engine then refuses it, say `on_failed`.
        """
        if self._closed:
            raise HandoffRefused(RefusalReason.CLOSED, "the prefill worker is shutting down")
        now_s = self._clock.now_s()
        self._run(self._holder.prefill_submitted(request_id, choice, prefill_attempt, num_tokens, now_s))
        return seq_id(request_id, choice, Side.PREFILL, prefill_attempt)

    def on_blocks(self, key: str, refs: tuple[BlockRef, ...], cached_tokens: int) -> None:
        """The engine took blocks for the sequence (`BlocksGranted`); unknown keys are ignored."""
        self._run(self._holder.blocks_granted(key, refs, cached_tokens))

    def on_advanced(self, key: str, computed_tokens: int) -> None:
        """KV of positions below `computed_tokens` is written (`PrefillAdvanced`)."""
        self._run(self._holder.advanced(key, computed_tokens))

    def on_preempted(self, key: str) -> None:
        """The engine took the blocks back before prefill was done (`Preempted`)."""
        self._run(self._holder.preempted(key))

    def on_done(self, key: str, first_token: SampledToken) -> None:
        """The first token is out, the choice goes on and the engine holds the blocks: the lease starts now."""
        self._run(self._holder.prefill_done(key, first_token, self._clock.now_s()))

    def on_failed(self, key: str, reason: RefusalReason = RefusalReason.PREFILL_FAILED) -> None:
        """The engine freed the sequence itself. FINISHED: its first token ended the choice."""
        self._run(self._holder.prefill_failed(key, reason, self._clock.now_s()))

    def abort(self, request_id: str, choice: int, prefill_attempt: int) -> None:
        """Ends this prefill attempt and all before it; idempotent, may overtake `on_submitted`."""
        self._run(self._holder.abort_attempt(request_id, choice, prefill_attempt, self._clock.now_s()))

    def tick(self) -> None:
        """Ends leases and waits that ran out; call a few times a second."""
        self._run(self._holder.tick(self._clock.now_s()))

    # What transports ask

    async def hello(self, theirs: Hello) -> Hello:
        check_hello(self._hello, theirs)
        return self._hello

    async def open_pull(
        self, request: PullRequest, *, own_reader: bool = False
    ) -> AsyncGenerator[BlockRun | EndFrame, None]:
        """See `KVSource.open_pull`. `own_reader`: a process of this worker reads the blocks in the mapped memory and
        passes their bytes on.
        """
        if self._closed:
            raise HandoffRefused(RefusalReason.CLOSED, "the prefill worker is shutting down")
        if request.mapped and self._hello.offer is None and not self._hello.ranks:
            raise HandoffRefused(RefusalReason.INVALID, "mapped: this worker's KV memory is not shared")
        most = MAX_BLOCKS_PER_MESSAGE if request.mapped else self._run_blocks
        if own_reader and not request.mapped:
            request, most = replace(request, mapped=True, checksum=False), self._own_run_blocks
        actions = self._holder.pull(request.ticket, request.first_block, request.pull_index, self._clock.now_s())
        reader_id = self._run(actions)
        assert reader_id is not None
        reader = self._readers[reader_id] = _Reader(request.ticket.prefill_key)
        index, sent_bytes = request.first_block, 0
        try:
            while True:
                reader.wake.clear()
                view = self._view(reader_id, reader)
                if index < view.readable_blocks:
                    stop = min(view.readable_blocks, index + most)
                    run = await self._run_of(request, reader, view, index, stop)
                    index += len(run.refs)
                    if view.first_token is not None and index == view.readable_blocks:
                        run = replace(run, last=True)
                    elif not request.mapped:
                        reader.read_ahead(self._store, view.blocks[index : min(view.readable_blocks, index + most)])
                    sent_bytes += len(run.refs) * self._store.layout.block_bytes
                    yield run
                    self._run(self._holder.pull_progress(reader_id, self._clock.now_s()))
                elif view.first_token is not None:
                    yield self._end_frame(request.ticket, view, sent_bytes)
                    return
                else:
                    await reader.wake.wait()
        finally:
            reader.end_reads()
            self._readers.pop(reader_id, None)
            self._run(self._holder.pull_ended(reader_id, self._clock.now_s()))

    def check_read(self, ticket: Ticket, refs: tuple[BlockRef, ...]) -> None:
        """Before and after blocks that a pull has named are copied out of the ranks' memories: `HandoffRefused` where
        what is, or was, copied is not what the reader was offered. Renews the lease.
        """
        self._run(self._holder.read(ticket, self._clock.now_s()))
        self._compare_generations(ticket.prefill_key, refs)

    async def confirm(self, ticket: Ticket) -> None:
        self._run(self._holder.confirm(ticket, self._clock.now_s()))

    async def abort_ticket(self, ticket: Ticket) -> None:
        self._run(self._holder.abort_ticket(ticket, self._clock.now_s()))

    # What it says about itself

    def counts(self) -> HolderCounts:
        """Tickets by state, readers, leases."""
        return self._holder.counts()

    def check_integrity(self) -> None:
        """Raises AssertionError if something does not add up."""
        self._holder.check_integrity()
        assert len(self._readers) >= self._holder.counts().readers

    async def close(self) -> None:
        """Stops every reader and refuses new ones; tickets stay until their owners end them. Idempotent."""
        self._closed = True
        for reader_id, reader in list(self._readers.items()):
            self._stop(reader_id, reader, RefusalReason.CLOSED)

    # Within

    def _run(self, actions: list[HolderAction]) -> int | None:
        """Takes the actions in order; returns the reader's id after `Serve`."""
        served: int | None = None
        for action in actions:
            match action:
                case Refuse(key, reason):
                    raise HandoffRefused(reason, f"prefill worker {self._hello.worker_id} on {key}")
                case Serve(_, reader_id):
                    served = reader_id
                case Wake(key):
                    for reader in self._readers.values():
                        if reader.key == key:
                            reader.wake.set()
                case Revoke(_, reader_ids, reason):
                    for reader_id in reader_ids:
                        if reader_id in self._readers:
                            self._stop(reader_id, self._readers[reader_id], reason)
                case ReleaseBlocks(key, outcome):
                    self.expired_total += outcome is Outcome.EXPIRED
                    self._release(key, outcome)
                case AbortPrefill(key):
                    self._abort_prefill(key)
        return served

    def _stop(self, reader_id: int, reader: _Reader, reason: RefusalReason) -> None:
        """The reader is outside of every block now (module docstring); it must not enter another."""
        reader.revoked = reader.revoked or reason
        reader.wake.set()
        self._run(self._holder.pull_ended(reader_id, self._clock.now_s()))

    def _view(self, reader_id: int, reader: _Reader) -> ReaderView:
        view = self._holder.view(reader_id)
        reason = reader.revoked or view.refused
        if reason is not None:
            raise HandoffRefused(reason, f"pull of {reader.key} was stopped")
        return view

    async def _run_of(self, request: PullRequest, reader: _Reader, view: ReaderView, start: int, stop: int) -> BlockRun:
        refs = view.blocks[start:stop]
        self._check_generations(reader, refs)
        if request.mapped:  # read by the reader; what nobody sends need not come out of a device
            return BlockRun(
                first_block=start, frames=(), refs=refs, verify=lambda: self._check_generations(reader, refs)
            )
        came, payloads = await reader.read(self._store, refs)
        frames = []
        for index, (ref, payload) in enumerate(zip(came, payloads, strict=True), start):
            checksum = None
            if request.checksum:
                checksum = block_checksum(request.ticket, index, ref.generation, payload)
            frames.append(
                BlockFrame(
                    ticket=request.ticket,
                    block_index=index,
                    generation=ref.generation,
                    payload=payload,
                    checksum=checksum,
                )
            )
        return BlockRun(
            first_block=start,
            frames=tuple(frames),
            refs=came,
            verify=lambda: self._check_generations(reader, came),
        )

    def _check_generations(self, reader: _Reader, refs: tuple[BlockRef, ...]) -> None:
        if reader.revoked is not None:
            raise HandoffRefused(reader.revoked, f"pull of {reader.key} was stopped")
        self._compare_generations(reader.key, refs)

    def _compare_generations(self, key: str, refs: tuple[BlockRef, ...]) -> None:
        for ref in refs:
            if self._generation_of(ref.block_id) != ref.generation:
                raise HandoffRefused(
                    RefusalReason.WRONG_GENERATION, f"block {ref.block_id} of {key} was handed out anew"
                )

    def _end_frame(self, ticket: Ticket, view: ReaderView, sent_bytes: int) -> EndFrame:
        assert view.first_token is not None
        return EndFrame(
            ticket=ticket,
            num_tokens=view.num_tokens,
            first_token=view.first_token,
            prefill_end_age_s=max(0.0, self._clock.now_s() - view.prefill_end_s),
            total_bytes=sent_bytes,
        )
