"""The prefill service. Life of a request in here:

1. `prefill`: the holder (`kvtransfer.source`) learns of it, the shell watches its deadline and its router, the engine
   queues it. A full queue refuses it at once.
2. Blocks are granted and chunks are computed; the holder's watermark follows, and the decode worker may pull behind it.
3. The first token goes to the router at once (the client sees it now) and to the holder, whose lease starts. A first
   token that ends the answer frees everything.
4. The decode worker pulls and confirms its first step; one that is lost before that is replaced by another, which
   pulls the same blocks. The confirmation, the lease, an abort, the deadline or a lost router ends it: when no reader
   is left the holder says `release`, and the engine keeps the blocks as prefix cache or frees them.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from ..cluster.engine.scheduler_events import (
    BlocksGranted,
    Preempted,
    PrefillAdvanced,
    SchedulerEvent,
    SequenceFailed,
    TokensEmitted,
)
from ..cluster.messages import sequence_from_proto, token_to_proto
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.rpc import Refusal
from ..cluster.types import Handoff
from ..cluster.worker.engine_thread import EngineThread
from ..cluster.worker.services import LiveSequence, PrefillHandler
from ..cluster.worker.shell import WorkerShell
from ..kvtransfer.protocol.actions import Outcome
from ..kvtransfer.source import SourceDriver
from ..kvtransfer.store import KVStore
from ..kvtransfer.ticket import HandoffRefused, RefusalReason, SegmentOffer


class PrefillService(PrefillHandler):
    """One per worker process, on its event loop."""

    def __init__(
        self,
        shell: WorkerShell,
        engine: EngineThread,
        store: KVStore,
        generation_of: Callable[[int], int],
        offer: SegmentOffer | None = None,
        ranks: bytes = b"",
    ) -> None:
        """`offer`, `ranks`: as in `Hello`, how others can have the KV memory."""
        self._shell = shell
        self._engine = engine
        self.source = SourceDriver(
            worker_id=shell.facts.worker_id,
            epoch=shell.facts.epoch,
            fingerprint=shell.facts.fingerprint,
            store=store,
            generation_of=generation_of,
            release=self._release,
            abort_prefill=self._abort_prefill,
            clock=shell.clock,
            lease_s=shell.config.lease_s,
            pull_wait_s=shell.config.pull_wait_s,
            offer=offer,
            ranks=ranks,
        )

    async def prefill(self, request: pb.PrefillRequest) -> None:
        """See `PrefillHandler.prefill`."""
        message = request.sequence
        sequence = LiveSequence.of(message, message.prefill_attempt, self)
        spec = sequence_from_proto(
            message,
            seq_id=sequence.seq_id,
            handoff=Handoff.OUT if request.handoff else Handoff.NONE,
            now_s=self._shell.clock.now_s(),
            vocab_size=self._shell.facts.vocab_size,
        )
        try:
            self.source.on_submitted(message.request_id, message.choice, message.prefill_attempt, spec.context_tokens)
        except HandoffRefused as refused:
            full = refused.reason is RefusalReason.LIMIT
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.ABORTED
            raise Refusal(code, str(refused)) from refused
        self._shell.admit(sequence, message.timeout_s)
        try:
            await self._shell.add_to_engine(spec)
        except BaseException:
            self._shell.forget(sequence.seq_id)
            self.source.on_failed(sequence.seq_id)
            raise

    def abort(self, request: pb.AbortRequest) -> None:
        """See `PrefillHandler.abort`."""
        self.source.abort(request.request_id, request.choice, request.prefill_attempt)

    def end(self, sequence: LiveSequence, reason: str) -> None:
        """See `RoleService.end`: the holder calls `_release` or `_abort_prefill`, now or when the last reader is
        out."""
        self.source.abort(sequence.request_id, sequence.choice, sequence.attempt)

    def on_event(self, sequence: LiveSequence, event: SchedulerEvent) -> None:
        """See `RoleService.on_event`."""
        match event:
            case BlocksGranted():
                self.source.on_blocks(event.seq_id, event.blocks, event.cached_tokens)
            case PrefillAdvanced():
                self.source.on_advanced(event.seq_id, event.computed_tokens)
            case Preempted():
                self.source.on_preempted(event.seq_id)
            case TokensEmitted():
                self._on_tokens(sequence, event)
            case SequenceFailed():
                self._shell.post_failure(sequence, "prefill_failed", event.message, retryable=False)
                self.source.on_failed(event.seq_id)
                self._shell.forget(event.seq_id)

    def _on_tokens(self, sequence: LiveSequence, event: TokensEmitted) -> None:
        tokens = pb.TokensEvent(
            index=event.index,
            tokens=[token_to_proto(token) for token in event.tokens],
            finish_reason=event.finish_reason or "",
            stop_token_id=event.stop_token_id,
            prefill=pb.PrefillTimings(
                queue_s=event.queue_s, prefill_s=event.prefill_s, cached_tokens=event.cached_tokens
            ),
        )
        self._shell.post(sequence, pb.Event(tokens=tokens))
        if event.finish_reason is not None:
            self.source.on_failed(event.seq_id, RefusalReason.FINISHED)
            self._shell.forget(event.seq_id)
        else:
            self.source.on_done(event.seq_id, event.tokens[0])

    def _release(self, key: str, outcome: Outcome) -> None:
        self._shell.forget(key)
        self._engine.submit(lambda scheduler: scheduler.release(key))

    def _abort_prefill(self, key: str) -> None:
        self._shell.forget(key)
        self._engine.submit(lambda scheduler: scheduler.abort(key))

    def tick(self, now_s: float) -> None:
        """See `RoleService.tick`."""
        self.source.tick()

    def fill_status(self, status: pb.WorkerStatus) -> None:
        """See `RoleService.fill_status`."""
        counts = self.source.counts()
        status.leases = counts.leases
        status.pulls += counts.readers
        status.holder_states.update(counts.by_state())
        if self.source.expired_total:
            status.handoff_failures_total[RefusalReason.EXPIRED.value] += self.source.expired_total

    def idle(self) -> bool:
        """See `RoleService.idle`."""
        return self.source.counts().live == 0

    async def close(self) -> None:
        """See `RoleService.close`."""
        await self.source.close()
