"""One try at one choice: the workers it was placed on, what they say, and what must be undone if it ends early.

The two halves end apart. A prefill (`PrefillHalf`) lives until some decode worker has made its first step from the KV
that the prefill worker holds: when a decode worker is lost before that, the next attempt takes the half along, and
nothing is computed twice. Decode attempts count up; those that share a prefill share its number and its tokens, so that
their tickets differ in the decode attempt alone and the holder serves the newest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..cluster.clock import Clock
from ..cluster.messages import sampling_to_proto, urgency_to_proto
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.rpc import Refusal
from ..cluster.types import SamplingParams, Side, Urgency
from .link import Inbox, LinkLost, Refused, SubscriptionKey, WorkerEvent, WorkerLink
from .mailbox import Mailbox
from .placing import Needs, Path
from .tries import FINISHED, AttemptLost, PrefillKeep


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an attempt is to compute."""

    request_id: str
    number: int
    """Counts the attempts at this choice from 1: the decode attempt, and the prefill attempt where `half` is None."""
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    """Tokens already sent to the client when the prefill was begun; the attempt goes on behind them."""
    sampling: SamplingParams
    urgency: Urgency = field(default_factory=Urgency)
    """Its place in queues; the deadline is that of its first token, on the router's clock."""
    tpot_s: float = math.inf
    """What it is promised as time per output token; inf: nothing."""
    avoid: frozenset[str] = frozenset()
    """Workers that refused or failed the try before: asked again only where there are no others."""
    half: PrefillHalf | None = None
    """The prefill of an attempt before, to be gone on with; None: a new one."""
    waits_until_s: float | None = None
    """On the router's clock: a request that was under way waits so long for workers to come back. None: it is at the
    door still."""
    block_keys: dict[int, list[bytes]] = field(default_factory=dict)
    """Of the context, by block size, as the placer comes to need them."""
    wants: set[WorkerLink] = field(default_factory=set)
    """Decode workers that were asked for a credit and gave none: for a moment they keep back what it waits for."""

    @property
    def context_tokens(self) -> int:
        """Tokens to prefill."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def needs(self) -> Needs:
        """What `placing` looks at."""
        return Needs(
            context_tokens=self.context_tokens,
            left_tokens=self.sampling.max_tokens - len(self.output_token_ids),
            tpot_s=self.tpot_s,
            avoid=self.avoid,
            kv=None if self.half is None else self.half.fingerprint,
        )

    def abort_request(self, router_id: str, *, prefill_attempt: int = 0, decode_attempt: int = 0) -> pb.AbortRequest:
        """Ends these attempts and all before them; 0: nothing of that half."""
        return pb.AbortRequest(
            request_id=self.request_id,
            choice=self.sampling.choice,
            prefill_attempt=prefill_attempt,
            decode_attempt=decode_attempt,
            router_id=router_id,
        )


class _QueuedPrompt:
    """The router's own correction to a worker's last heartbeat: a prompt that it sent there and has no token of yet."""

    def __init__(self, link: WorkerLink, tokens: int, urgency: Urgency) -> None:
        self._link, self._tokens = link, tokens
        self._patient_tokens = 0 if math.isfinite(urgency.deadline_s) else tokens
        self.waiting = True
        link.sent.prompt_sent(tokens, self._patient_tokens)

    def done(self) -> None:
        """Its first token is here, or nobody waits for it; idempotent."""
        if self.waiting:
            self.waiting = False
            self._link.sent.prompt_done(self._tokens, self._patient_tokens)


class PrefillHalf:
    """A prefill and the KV that comes of it, on one life of one worker. Belongs to one attempt at a time, or to the
    choice between two.
    """

    def __init__(
        self, work: Work, link: WorkerLink, *, router_id: str, kv_address: str, fingerprint: str, uncached_tokens: int
    ) -> None:
        self.work = work
        self.link = link
        self.kv_address = kv_address
        self.fingerprint = fingerprint
        self.prompt = _QueuedPrompt(link, uncached_tokens, work.urgency)
        self.keep = PrefillKeep()
        self._router_id = router_id
        self._inbox: Inbox = Mailbox()

    @property
    def attempt(self) -> int:
        """The prefill attempt."""
        return self.work.number

    def listen(self, inbox: Inbox) -> None:
        """From now on its events go to `inbox`, first those that nobody has heard yet."""
        older, self._inbox = self._inbox, inbox
        while not older.empty():
            item = older.get_nowait()
            if item.side is Side.PREFILL:
                inbox.put_nowait(item)
        self.link.subscribe(self._key(), inbox)

    async def submit(self, sequence: pb.Sequence, *, handoff: bool) -> None:
        """Dispatches it. `Refusal`."""
        self.keep.submitting()
        await self.link.prefill(pb.PrefillRequest(sequence=sequence, handoff=handoff, epoch=self.link.epoch))
        self.keep.submitted(handoff=handoff)

    async def next_event(self) -> pb.TokensEvent:
        """Its next tokens, while no decode worker is found. `AttemptLost` as soon as it has nothing to serve."""
        while True:
            item = await self._inbox.get()
            assert not isinstance(item, Refused), "only decode workers refuse so, and nobody listens for those here"
            if (tokens := self.take(item)) is not None:
                return tokens
            if not self.keep.serves:
                text = f"prefill worker {self.link.worker_id} was lost before its KV was taken"
                raise AttemptLost("worker_lost", text, worker_id=self.link.worker_id)

    def take(self, item: WorkerEvent | LinkLost) -> pb.TokensEvent | None:
        """Its tokens, if that is what the item brings. `AttemptLost` when it has failed and is still needed."""
        worker_id = self.link.worker_id
        if isinstance(item, LinkLost):
            if self.keep.worker_lost(prompt_waits=self.prompt.waiting, silent=item.silent):
                text = f"prefill worker {worker_id}: {item.message}"
                raise AttemptLost("worker_lost", text, worker_id=worker_id)
            return None
        if item.event.HasField("failed"):
            failed = item.event.failed
            self.keep.ended()
            if self.prompt.waiting or failed.reason == "deadline":
                raise AttemptLost(failed.reason, failed.message, retryable=failed.retryable, worker_id=worker_id)
            return None
        if item.event.tokens.finish_reason:
            self.keep.ended()
        self.prompt.done()
        return item.event.tokens

    def handed_over(self) -> None:
        """A decode worker has made its first step from the KV."""
        self.keep.handed_over()
        self.prompt.done()

    def close(self, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """Unsubscribes, and aborts it in the background unless it ended by itself; idempotent."""
        self.prompt.done()
        self.link.unsubscribe(self._key())
        if self.keep.close():
            spawn(self.link.abort(self.work.abort_request(self._router_id, prefill_attempt=self.attempt)))

    def _key(self) -> SubscriptionKey:
        return SubscriptionKey(self.work.request_id, self.work.sampling.choice, Side.PREFILL, self.attempt)


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
        clock: Clock,
        half: PrefillHalf | None = None,
        decode: WorkerLink | None = None,
        credit: pb.ReserveReply | None = None,
        uncached_tokens: int = 0,
    ) -> None:
        """`half`: new, or of an attempt before. `uncached_tokens`: what the decode worker itself is to prefill."""
        assert half is not None or decode is not None
        assert (decode is None) == (credit is None), "a decode worker takes part by its credit"
        self.work = work
        self.path = path
        self.half = half
        self.decode = decode
        self._router_id = router_id
        self._clock = clock
        self._credit = credit
        self._inbox: Inbox = Mailbox()  # bounded by the request's max_tokens: a worker sends no more
        self.asked = ""
        """The worker that was asked last; the one that refused if `submit` raises `Refusal`."""
        self._decode_open = decode is not None  # a credit binds the decode side from the start
        self._decoding = False
        """Whether the decode worker has sent tokens."""
        own = _QueuedPrompt(self.first_worker, uncached_tokens, work.urgency) if half is None else half.prompt
        self._prompt = own
        if decode is not None:
            decode.sent.row_begun(work.tpot_s)

    @property
    def prefill(self) -> WorkerLink | None:
        """The prefill worker."""
        return self.half.link if self.half is not None else None

    @property
    def first_worker(self) -> WorkerLink:
        """The worker that computes the prompt."""
        worker = self.prefill or self.decode
        assert worker is not None
        return worker

    async def submit(self, timeout_s: float) -> None:
        """Dispatches prefill, if it is a new one, then decode, which starts to pull while prefill computes. `Refusal`
        or `AttemptLost`. The decode worker's answer is not waited for, the first token may come before it: its refusal
        is `next_event`'s.
        """
        sequence = self._sequence(timeout_s)
        if self.decode is not None:
            self.decode.subscribe(self._decode_key(), self._inbox)
        if self.half is not None:
            self.half.listen(self._inbox)
            if self.half.work is self.work:
                self.asked = self.half.link.worker_id
                try:
                    await self.half.submit(sequence, handoff=self.decode is not None)
                except Refusal:
                    for _ in self.events_here():  # a stream that broke meanwhile is told here: lost, not refused
                        pass
                    raise
        if self.decode is None or self._credit is None:
            return
        request = pb.DecodeRequest(sequence=sequence, credit_id=self._credit.credit_id, epoch=self._credit.epoch)
        if self.half is not None:
            request.peer.worker_id = self.half.link.worker_id
            request.peer.epoch = self.half.link.epoch
            request.peer.kv_address = self.half.kv_address
        self.asked = self.decode.worker_id
        self.decode.decode(request, self._inbox)

    async def next_event(self) -> pb.TokensEvent:
        """The next tokens. `AttemptLost` when the side that they must come from has failed; the decode worker's
        `Refusal`.
        """
        while True:
            if (tokens := self._heard(await self._inbox.get())) is not None:
                return tokens

    def offer(self, take: Callable[[pb.TokensEvent], bool]) -> None:
        """From now on tokens that end nothing are offered to `take` in the call that brings them, while `next_event`
        waits; what it leaves (False) is that one's.
        """

        def tap(item: WorkerEvent | LinkLost | Refused) -> bool:
            if not isinstance(item, WorkerEvent) or item.event.WhichOneof("kind") != "tokens":
                return False
            tokens: pb.TokensEvent | None = item.event.tokens
            if item.event.tokens.finish_reason:
                return False
            if not (self._decoding and item.side is Side.DECODE):  # else it says nothing new of the halves
                tokens = self._heard(item)
            return tokens is not None and take(tokens)

        self._inbox.tap = tap

    def events_here(self) -> Iterator[pb.TokensEvent]:
        """Those that need not be waited for. Raises what `next_event` raises."""
        while not self._inbox.empty():
            if (tokens := self._heard(self._inbox.get_nowait())) is not None:
                yield tokens

    def _heard(self, item: WorkerEvent | LinkLost | Refused) -> pb.TokensEvent | None:
        if isinstance(item, Refused):
            raise item.refusal
        if item.side is Side.PREFILL and self.half is not None:
            return self.half.take(item)
        return self._take_decode(item)

    def close(
        self, spawn: Callable[[Coroutine[Any, Any, None]], None], *, keep_prefill: bool = False
    ) -> PrefillHalf | None:
        """Unsubscribes and aborts every side that has not ended by itself; aborts run in the background, bounded.
        Once. `keep_prefill`: not the prefill, where a decode worker may still get its KV: it is returned, and whoever
        called closes it or makes the next attempt with it.
        """
        if self.half is None:
            self._prompt.done()
        kept = self.half if keep_prefill and self.half is not None and self.half.keep.serves else None
        if self.decode is not None:
            self.decode.sent.row_ended(self.work.tpot_s)
            self.decode.unsubscribe(self._decode_key())
            if self._decode_open:
                # Named, the prefill attempt ends on its holder too: the decode worker tells it.
                ended = self.half.attempt if self.half is not None and kept is None else 0
                abort = self.work.abort_request(self._router_id, prefill_attempt=ended, decode_attempt=self.work.number)
                spawn(self.decode.abort(abort))
            self._decode_open = False
        if kept is not None:
            kept.listen(Mailbox())
        elif self.half is not None:
            self.half.close(spawn)
        return kept

    def _take_decode(self, item: WorkerEvent | LinkLost) -> pb.TokensEvent | None:
        assert self.decode is not None
        worker_id = self.decode.worker_id
        if isinstance(item, LinkLost):
            # It stays open: the stream may be back, and what was submitted meanwhile runs on it.
            if self.half is not None:
                self.half.keep.decode_lost()
            raise AttemptLost("worker_lost", f"decode worker {worker_id}: {item.message}", worker_id=worker_id)
        if item.event.HasField("failed"):
            failed = item.event.failed
            self._decode_open = False
            if failed.reason == FINISHED:
                # The first token ended the choice, so there is nothing to pull; it may still be on its way to us.
                return None
            if self.half is not None:
                self.half.keep.decode_failed(failed.reason)
            raise AttemptLost(failed.reason, failed.message, retryable=failed.retryable, worker_id=worker_id)
        if self.half is not None:
            self.half.handed_over()
        if item.event.tokens.finish_reason:
            self._decode_open = False
        self._prompt.done()
        self._decoding = True
        return item.event.tokens

    def _prefill_attempt(self) -> int:
        return self.half.attempt if self.half is not None else self.work.number

    def _decode_key(self) -> SubscriptionKey:
        return SubscriptionKey(self.work.request_id, self.work.sampling.choice, Side.DECODE, self.work.number)

    def _sequence(self, timeout_s: float) -> pb.Sequence:
        return pb.Sequence(
            request_id=self.work.request_id,
            choice=self.work.sampling.choice,
            prefill_attempt=self._prefill_attempt(),
            decode_attempt=self.work.number,
            prompt_token_ids=self.work.prompt_token_ids,
            output_token_ids=self.work.output_token_ids,
            sampling=sampling_to_proto(self.work.sampling),
            timeout_s=timeout_s,
            router_id=self._router_id,
            urgency=urgency_to_proto(self.work.urgency, self._clock.now_s()),
        )
