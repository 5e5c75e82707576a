"""The decode service. Life of a request in here:

1. `reserve`: a credit, a bounded promise of KV and of a place in the queue; no block yet. No more promises: refused,
   and the router waits; the want is remembered, so that nobody overtakes it for ever.
2. `decode` redeems it and queues the sequence in the engine. While no block is free it waits there, and its KV waits
   in the prefill worker's memory.
3. Blocks are granted: the sink (`kvtransfer.sink`) pulls what the own prefix cache lacks, while prefill computes.
4. All KV and the first token are here: the sequence joins the running batch at the next step. Its first frame repeats
   the first token, in case this connection is faster than the prefill worker's.
5. After its first step the sink confirms to the prefill worker, which lets its blocks go.
6. A finish, an abort, a deadline, a failed pull or a lost router ends it; blocks are freed only when nothing can write
   into them any more (`writer_done`).

A request without a peer is prefilled here: mixed workers, and short prompts on decode workers.
"""

from __future__ import annotations

import grpc

from ..cluster.engine.scheduler_events import BlocksGranted, SchedulerEvent, SequenceFailed, TokensEmitted
from ..cluster.messages import sequence_from_proto, token_to_proto, urgency_from_proto
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.rpc import Refusal
from ..cluster.types import Handoff, SampledToken, Side
from ..cluster.worker.engine_thread import EngineThread
from ..cluster.worker.services import DecodeHandler, LiveSequence
from ..cluster.worker.shell import WorkerShell
from ..kvtransfer.sink import SinkDriver
from ..kvtransfer.store import KVStore
from ..kvtransfer.ticket import HandoffRefused, Peer, RefusalReason, Ticket
from ..kvtransfer.transfer_stats import TransferStats
from ..kvtransfer.transport import KVTransport

_LAST_ENDS = frozenset({"deadline", "failed", "invalid"})
"""After these the holder may be told; after any other end another decode attempt may come for the same KV."""

_REFUSAL_CODES = {
    RefusalReason.LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RefusalReason.EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalReason.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.CLOSED: grpc.StatusCode.UNAVAILABLE,
}


class DecodeService(DecodeHandler):
    """One per worker process, on its event loop."""

    def __init__(self, shell: WorkerShell, engine: EngineThread, store: KVStore, transport: KVTransport) -> None:
        self._shell = shell
        self._engine = engine
        self._layout = store.layout
        self._transport = transport
        self._arrived: dict[str, tuple[TransferStats, SampledToken]] = {}
        """Of sequences whose KV is here and whose first own token is not: how it came, and the token that came with
        it."""
        self._kv_bytes = store.num_blocks * store.layout.block_bytes
        self._credit_limit_blocks = max(1, int(store.num_blocks * shell.config.credit_factor))
        self.sink = SinkDriver(
            worker_id=shell.facts.worker_id,
            epoch=shell.facts.epoch,
            fingerprint=shell.facts.fingerprint,
            store=store,
            transport=transport,
            clock=shell.clock,
            kv_ready=self._kv_ready,
            writer_done=self._writer_done,
            failed=self._failed,
            credit_limit_blocks=self._credit_limit_blocks,
            credit_ttl_s=shell.config.credit_ttl_s,
            checksum=shell.config.checksum,
        )

    # --- the router's calls -----------------------------------------------------------------------------------------

    async def reserve(self, request: pb.ReserveRequest) -> int:
        """See `DecodeHandler.reserve`."""
        if not 1 <= request.context_tokens < self._shell.facts.max_model_len:
            raise ValueError(
                f"context_tokens: {request.context_tokens} does not fit worker {self._shell.facts.worker_id}, "
                f"which holds contexts of up to {self._shell.facts.max_model_len} tokens, output included"
            )
        blocks = self._layout.blocks_for(request.context_tokens + 1)
        urgency = urgency_from_proto(request.urgency, self._shell.clock.now_s())
        # Who has a credit will wait in the engine's queue, or prefill would compute for a queue that then refuses;
        # others wait there too: prefilled here, or preempted.
        waiting, limit = self._engine.status.load.waiting, self._shell.config.engine.max_waiting
        others = max(0, waiting - self.sink.counts().waiting_blocks)
        name = (request.request_id, request.choice, request.decode_attempt)
        try:
            return self.sink.reserve(*name, blocks, urgency=urgency, places=limit - others, router_id=request.router_id)
        except HandoffRefused as refused:
            if refused.reason is not RefusalReason.LIMIT:
                raise _refusal(refused) from refused
            text = f"worker {self._shell.facts.worker_id}: {refused.message}; {waiting} of {limit} wait for blocks"
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text) from refused

    async def decode(self, request: pb.DecodeRequest) -> None:
        """See `DecodeHandler.decode`."""
        message = request.sequence
        handoff = Handoff.IN if request.HasField("peer") else Handoff.NONE
        sequence = LiveSequence.of(message, message.decode_attempt, self)
        spec = sequence_from_proto(
            message,
            seq_id=sequence.seq_id,
            handoff=handoff,
            now_s=self._shell.clock.now_s(),
            vocab_size=self._shell.facts.vocab_size,
        )
        self._redeem(request, spec.context_tokens)
        self._shell.admit(sequence, message.timeout_s)
        try:
            await self._shell.add_to_engine(spec)
        except BaseException:
            self.end(sequence, "not_admitted")
            raise

    def _redeem(self, request: pb.DecodeRequest, num_tokens: int) -> None:
        message = request.sequence
        try:
            if not request.HasField("peer"):
                self.sink.submit_local(message.request_id, message.choice, message.decode_attempt, request.credit_id)
                return
            ticket = Ticket(
                request_id=message.request_id,
                choice=message.choice,
                prefill_attempt=message.prefill_attempt,
                decode_attempt=message.decode_attempt,
                prefill_worker=request.peer.worker_id,
                epoch=request.peer.epoch,
                num_tokens=num_tokens,
                fingerprint=self._shell.facts.fingerprint,
            )
            peer = Peer(request.peer.worker_id, request.peer.epoch, request.peer.kv_address)
            self.sink.submit(ticket, peer, request.credit_id, message.timeout_s)
        except HandoffRefused as refused:
            raise _refusal(refused) from refused

    def abort(self, request: pb.AbortRequest) -> None:
        """See `DecodeHandler.abort`."""
        for sequence in self._shell.sequences_of(request.router_id):
            same_choice = (sequence.request_id, sequence.choice) == (request.request_id, request.choice)
            if same_choice and sequence.side is Side.DECODE and sequence.attempt <= request.decode_attempt:
                self._end(sequence, notify_holder=request.prefill_attempt > 0)
        # Also what has not come yet, and credits.
        self.sink.abort(
            request.request_id, request.choice, request.decode_attempt, notify_holder=request.prefill_attempt > 0
        )

    def router_gone(self, router_id: str) -> None:
        """See `DecodeHandler.router_gone`."""
        self.sink.router_gone(router_id)

    def end(self, sequence: LiveSequence, reason: str) -> None:
        """See `RoleService.end`: the engine frees the blocks at once, or when the writer has ended."""
        self._end(sequence, notify_holder=reason in _LAST_ENDS)

    def _end(self, sequence: LiveSequence, *, notify_holder: bool) -> None:
        self._forget(sequence.seq_id)
        self._engine.submit(lambda scheduler: scheduler.abort(sequence.seq_id))
        self.sink.abort(sequence.request_id, sequence.choice, sequence.attempt, notify_holder=notify_holder)

    # --- the engine's events ----------------------------------------------------------------------------------------

    def on_event(self, sequence: LiveSequence, event: SchedulerEvent) -> None:
        """See `RoleService.on_event`."""
        match event:
            case BlocksGranted():
                self.sink.on_blocks(event.seq_id, event.blocks, event.cached_tokens)
            case TokensEmitted():
                self._on_tokens(sequence, event)
            case SequenceFailed():
                self._shell.post_failure(sequence, "decode_failed", event.message, retryable=False)
                self.end(sequence, "failed")

    def _on_tokens(self, sequence: LiveSequence, event: TokensEmitted) -> None:
        tokens = pb.TokensEvent(
            index=event.index,
            tokens=[token_to_proto(token) for token in event.tokens],
            finish_reason=event.finish_reason or "",
            stop_token_id=event.stop_token_id,
        )
        if not sequence.told:
            sequence.told = True
            self._on_first_tokens(tokens, event)
        if event.finish_reason is not None:
            self._forget(event.seq_id)
        self._shell.post(sequence, pb.Event(tokens=tokens))

    def _on_first_tokens(self, tokens: pb.TokensEvent, event: TokensEmitted) -> None:
        arrived = self._arrived.pop(event.seq_id, None)
        if arrived is None:
            tokens.prefill.queue_s = event.queue_s
            tokens.prefill.prefill_s = event.prefill_s
            tokens.prefill.cached_tokens = event.cached_tokens
            return
        # The first step is done: the prefill worker may let its copy go.
        self.sink.on_first_step(event.seq_id)
        stats, first_token = arrived
        # The prefill worker has told the router of it already, but on another connection: that may be slower.
        tokens.index -= 1
        tokens.tokens.insert(0, token_to_proto(first_token))
        tokens.decode.transfer_s = stats.transfer_s
        tokens.decode.exposed_transfer_s = stats.exposed_transfer_s
        tokens.decode.transferred_bytes = stats.bytes
        tokens.decode.transport = stats.transport
        tokens.decode.queue_s = event.queue_s

    # --- the sink's callbacks ---------------------------------------------------------------------------------------

    def _kv_ready(self, key: str, first_token: SampledToken, stats: TransferStats) -> None:
        self._arrived[key] = (stats, first_token)
        self._engine.submit(lambda scheduler: scheduler.kv_ready(key, first_token))

    def _writer_done(self, key: str) -> None:
        self._engine.submit(lambda scheduler: scheduler.writer_done(key))

    def _failed(self, key: str, reason: RefusalReason, retryable: bool, message: str) -> None:
        sequence = self._forget(key)
        if sequence is not None:
            self._shell.post_failure(sequence, reason.value, message, retryable=retryable)
        self._engine.submit(lambda scheduler: scheduler.abort(key))

    def _forget(self, key: str) -> LiveSequence | None:
        self._arrived.pop(key, None)
        return self._shell.forget(key)

    # --- the shell's calls ------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """See `RoleService.tick`."""
        self.sink.tick()

    def fill_status(self, status: pb.WorkerStatus) -> None:
        """See `RoleService.fill_status`."""
        counts = self.sink.counts()
        status.kv_bytes = self._kv_bytes
        status.credited_blocks = counts.credited_blocks
        status.credit_limit_blocks = self._credit_limit_blocks
        status.pulls += counts.pulling + counts.cancelling
        status.puller_states.update(counts.by_state())
        status.pulls_total.update(dict(self.sink.pulls_total))
        for reason, count in dict(self.sink.failures_total).items():
            status.handoff_failures_total[reason] += count

    def idle(self) -> bool:
        """See `RoleService.idle`."""
        return self.sink.counts().live == 0

    async def close(self) -> None:
        """See `RoleService.close`."""
        await self.sink.close()
        await self._transport.close()


def _refusal(refused: HandoffRefused) -> Refusal:
    return Refusal(_REFUSAL_CODES.get(refused.reason, grpc.StatusCode.ABORTED), str(refused))
