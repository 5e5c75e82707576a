"""One try at one choice: the workers it was placed on, what they say, and what must be undone if it ends early."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from ..cluster.messages import sampling_to_proto
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.types import SamplingParams, Side
from .link import Inbox, LinkLost, SubscriptionKey, WorkerEvent, WorkerLink

FINISHED = "finished"
"""The decode worker's reason when prefill's first token was also the last (`kvtransfer.ticket.RefusalReason`)."""


class Path(enum.StrEnum):
    """How a choice is served. Whatever is not `split` is counted and visible."""

    SPLIT = "split"
    LOCAL = "local"
    """The decode worker prefills a short prompt itself (conditional disaggregation)."""
    MIXED = "mixed"
    PREFILL_ONLY = "prefill_only"
    """One output token: nothing to hand off."""


class AttemptLost(Exception):
    """One try cannot go on; another one may, if `retryable`."""

    def __init__(self, reason: str, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retryable = retryable


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an attempt is to compute."""

    request_id: str
    number: int
    """Counts the attempts at this choice from 1; both halves carry it."""
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    """Tokens already sent to the client; the attempt goes on behind them."""
    sampling: SamplingParams
    avoid: frozenset[str] = frozenset()
    """Workers that refused the try before: asked again only where there are no others."""
    block_keys: dict[int, list[bytes]] = field(default_factory=dict)
    """Of the context, by block size, as the placer comes to need them."""

    @property
    def context_tokens(self) -> int:
        """Tokens to prefill."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def abort_request(self, router_id: str) -> pb.AbortRequest:
        """Ends this attempt, both halves, and all before it."""
        return pb.AbortRequest(
            request_id=self.request_id,
            choice=self.sampling.choice,
            prefill_attempt=self.number,
            decode_attempt=self.number,
            router_id=router_id,
        )


class Attempt:
    """Made by `Placer.try_place`, with the credit already granted. Then `submit` once, `next_event` until done, and
    `close` whatever happened.
    """

    def __init__(
        self,
        work: Work,
        path: Path,
        *,
        router_id: str,
        prefill: WorkerLink | None,
        decode: WorkerLink | None,
        credit: pb.ReserveReply | None,
        kv_address: str,
        uncached_tokens: int,
    ) -> None:
        assert prefill is not None or decode is not None
        assert (decode is None) == (credit is None), "a decode worker takes part by its credit"
        self.work = work
        self.path = path
        self.prefill = prefill
        self.decode = decode
        self._router_id = router_id
        self._credit = credit
        self._kv_address = kv_address
        self._uncached_tokens = uncached_tokens
        self._inbox: Inbox = asyncio.Queue()  # bounded by the request's max_tokens: a worker sends no more
        self._waits_for_first = True
        self.asked = ""
        """The worker that was asked last; the one that refused if `submit` raises `Refusal`."""
        # Sides to abort if the attempt ends now: a credit binds the decode side from the start.
        self._open = {Side.DECODE} if decode is not None else set()
        self._count(+1)

    @property
    def first_worker(self) -> WorkerLink:
        """The worker that computes the prompt."""
        worker = self.prefill or self.decode
        assert worker is not None
        return worker

    async def submit(self, timeout_s: float) -> None:
        """Dispatches prefill, then decode, which starts to pull while prefill computes. `Refusal` or `AttemptLost`."""
        sequence = self._sequence(timeout_s)
        if self.decode is not None:
            self.decode.subscribe(self._key(Side.DECODE), self._inbox)
        if self.prefill is not None:
            self._open.add(Side.PREFILL)
            self.prefill.subscribe(self._key(Side.PREFILL), self._inbox)
            handoff = self.decode is not None
            self.asked = self.prefill.worker_id
            await self.prefill.prefill(pb.PrefillRequest(sequence=sequence, handoff=handoff, epoch=self.prefill.epoch))
        if self.decode is None or self._credit is None:
            return
        request = pb.DecodeRequest(sequence=sequence, credit_id=self._credit.credit_id, epoch=self._credit.epoch)
        if self.prefill is not None:
            request.peer.worker_id = self.prefill.worker_id
            request.peer.epoch = self.prefill.epoch
            request.peer.kv_address = self._kv_address
        self.asked = self.decode.worker_id
        await self.decode.decode(request)

    async def next_event(self) -> pb.TokensEvent:
        """The next tokens. `AttemptLost` when the side that they must come from has failed."""
        while True:
            item = await self._inbox.get()
            if isinstance(item, LinkLost):
                # Nothing is closed by that: the stream may be back, and what was submitted meanwhile runs on it.
                if item.side is Side.DECODE and self.prefill is not None:
                    self._open.add(Side.PREFILL)  # its confirmation may never have arrived
                if self._needs(item.side):
                    raise AttemptLost("worker_lost", f"{item.side} worker {item.worker_id}: {item.message}")
            elif (tokens := self._take(item)) is not None:
                return tokens

    def close(self, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """Unsubscribes and aborts every side that has not ended by itself; aborts run in the background, bounded.
        Once.
        """
        self._count(-1)
        abort = self.work.abort_request(self._router_id)
        for side, link in ((Side.PREFILL, self.prefill), (Side.DECODE, self.decode)):
            if link is not None:
                link.unsubscribe(self._key(side))
                if side in self._open:
                    spawn(link.abort(abort))
        self._open.clear()

    def _take(self, item: WorkerEvent) -> pb.TokensEvent | None:
        event, side = item.event, item.side
        if event.HasField("failed"):
            self._open.discard(side)
            failed = event.failed
            if failed.reason == FINISHED:
                # The first token ended the choice, so there is nothing to pull; it may still be on its way to us.
                return None
            if self._needs(side) or failed.reason == "deadline":
                raise AttemptLost(failed.reason, failed.message, retryable=failed.retryable)
            return None
        if side is Side.DECODE:
            # Its first tokens are its confirmation to the prefill worker: from here on that side frees itself.
            self._open.discard(Side.PREFILL)
        if event.tokens.finish_reason:
            self._open.discard(side)
        if self._waits_for_first:
            self._waits_for_first = False
            self.first_worker.queued_prefill_tokens -= self._uncached_tokens
        return event.tokens

    def _needs(self, side: Side) -> bool:
        """After the first token only the decode worker matters: it may have all KV already, and will say if not."""
        return side is Side.DECODE or self._waits_for_first

    def _key(self, side: Side) -> SubscriptionKey:
        return SubscriptionKey(self.work.request_id, self.work.sampling.choice, side, self.work.number)

    def _sequence(self, timeout_s: float) -> pb.Sequence:
        return pb.Sequence(
            request_id=self.work.request_id,
            choice=self.work.sampling.choice,
            prefill_attempt=self.work.number,
            decode_attempt=self.work.number,
            prompt_token_ids=self.work.prompt_token_ids,
            output_token_ids=self.work.output_token_ids,
            sampling=sampling_to_proto(self.work.sampling),
            timeout_s=timeout_s,
            router_id=self._router_id,
        )

    def _count(self, sign: int) -> None:
        """The router's own corrections to the workers' last heartbeats."""
        if self._waits_for_first:
            self.first_worker.queued_prefill_tokens += sign * self._uncached_tokens
        if self.decode is not None:
            self.decode.decode_rows += sign
