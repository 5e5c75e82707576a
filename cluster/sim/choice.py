"""One request in virtual time, from its first try to its end: what `router.choice.ChoiceRun` and `router.attempt` do
with tasks and streams is done here with events, after the same rules (`router.tries`).

1. `begin` a try: the router queues it; `dispatch` sends its halves to the workers that were found.
2. `hear` what a worker says of a half, `turned` what it refuses or loses, `worker_lost` that it is no more.
3. A try that is refused or lost `close`s: what is open at workers is aborted, a prefill whose KV can still be had is
   kept. The next one goes on behind the tokens that were sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

from ...kvtransfer.ticket import Ticket
from ...router.errors import ServiceError
from ...router.placing import Needs, Path
from ...router.slo_classes import Promise
from ...router.tries import FINISHED, REFUSED_WAIT_S, AttemptLost, Tries
from ...router.turns import Spot
from ..types import Handoff, SamplingParams, SequenceSpec, Side, Urgency, seq_id
from .attempt import Half, SentPrompt, Try
from .engine import TOKEN
from .member import SimMember
from .request import Asked, Outcome
from .timeline import Event, Timeline
from .worker_spec import Heard, Turned, WorkerSpec


class ChoiceSpot(Spot):
    """A place in the router's queue."""

    __slots__ = ("choice",)

    def __init__(self, choice: SimChoice, entered_s: float, urgency: Urgency, *, needs_room: bool) -> None:
        super().__init__(entered_s, urgency, needs_room=needs_room)
        self.choice = choice


class Desk(Protocol):
    """The router, as its choices see it."""

    rpc_s: float
    decode_after_prefill: bool

    def queue(self, choice: SimChoice) -> None:
        """The choice's next try waits for workers."""

    def withdraw(self, choice: SimChoice) -> None:
        """It waits no longer."""

    def keys(self, choice: SimChoice, block_size: int) -> tuple[bytes, ...]:
        """Of its prompt's full blocks."""

    def first_token(self, choice: SimChoice) -> None:
        """The request has its first token."""

    def less(self) -> None:
        """Some worker has less to do."""

    def ended(self, choice: SimChoice) -> None:
        """It is answered, or given up."""


@dataclass(slots=True, kw_only=True)
class SimChoice:
    """See the module."""

    timeline: Timeline
    desk: Desk
    asked: Asked
    outcome: Outcome
    promise: Promise
    tries: Tries
    timeout_s: float
    urgency: Urgency = field(default_factory=Urgency)
    tpot_s: float = math.inf
    keys: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    spot: ChoiceSpot | None = None
    deadline: Event | None = None
    now: Try | None = None
    half: Half | None = None
    """Between two tries: the prefill that the next one goes on with."""
    wants: list[SimMember] = field(default_factory=list)
    """Workers that were asked for a credit and gave none."""
    again: Event | None = None
    """When it tries again, while it was refused."""
    over: bool = False

    @property
    def context_tokens(self) -> int:
        """To prefill, or of the half that is kept."""
        outputs = self.outcome.output_tokens if self.half is None else self.half.output_tokens
        return len(self.asked.prompt_token_ids) + outputs

    @property
    def needs(self) -> Needs:
        """What the next try needs."""
        context = self.context_tokens
        return Needs(
            context_tokens=context,
            left_tokens=self.asked.output_tokens + len(self.asked.prompt_token_ids) - context,
            tpot_s=self.tpot_s,
            avoid=self.tries.avoid,
            kv=None if self.half is None else "",
        )

    def begin(self) -> None:
        """The next try."""
        self.again = None
        self.tries.begin()
        self.desk.queue(self)

    # --- out --------------------------------------------------------------------------------------------------------

    def dispatch(
        self, path: Path, prefill: SimMember | None, decode: SimMember | None, credit_id: int, uncached_tokens: int
    ) -> None:
        """Both halves' commands leave: the credit took a round trip, the decode command follows prefill's answer."""
        outcome, number, rpc_s = self.outcome, self.tries.number, self.desk.rpc_s
        half, self.half = self.half, None
        outputs = outcome.output_tokens if half is None else half.output_tokens
        if half is None:
            first = prefill or decode
            assert first is not None
            prompt = SentPrompt(first, uncached_tokens, self.urgency)
            if prefill is not None:
                half = Half(prefill, number, outputs, prompt)
                outcome.prefill_worker = prefill.worker.spec.worker_id
        else:
            prompt, prefill = half.prompt, None
        tried = self.now = Try(number, path, half, decode, credit_id, outputs, prompt, decode is not None)
        outcome.tries += 1
        outcome.path = path.value
        if outcome.dispatched_s is None:
            outcome.dispatched_s = self.timeline.time_s
        if prefill is not None:
            self.timeline.do_after((3 if decode else 1) * rpc_s, partial(self._send_prefill, tried))
        if decode is not None:
            decode.sent.row_begun(self.tpot_s)
            outcome.decode_worker = decode.worker.spec.worker_id
            if not (prefill and self.desk.decode_after_prefill):
                self.timeline.do_after((5 if prefill else 3) * rpc_s, partial(self._send_decode, tried))

    def _send_prefill(self, tried: Try) -> None:
        half = tried.half
        if self.now is not tried or half is None:
            return
        half.keep.submitting()
        half.keep.submitted(handoff=tried.decode is not None)
        handoff = Handoff.OUT if tried.decode is not None else Handoff.NONE
        spec = self._spec(seq_id(self.asked.request_id, 0, Side.PREFILL, half.number), tried, handoff, half.member)
        half.member.worker.prefill(self.asked.request_id, half.number, spec)

    def _send_decode(self, tried: Try) -> None:
        decode, half, name = tried.decode, tried.half, self.asked.request_id
        if self.now is not tried or decode is None:
            return
        handoff = Handoff.NONE if half is None else Handoff.IN
        spec = self._spec(seq_id(name, 0, Side.DECODE, tried.number), tried, handoff, decode)
        ticket = None
        if half is not None:
            source = half.member.worker
            ticket = Ticket(
                request_id=name,
                choice=0,
                prefill_attempt=half.number,
                decode_attempt=tried.number,
                prefill_worker=source.spec.worker_id,
                epoch=source.epoch,
                num_tokens=spec.context_tokens,
                fingerprint="",
            )
        deadline_s = self.asked.arrival_s + self.timeout_s
        decode.worker.decode(name, tried.number, spec, tried.credit_id, ticket, deadline_s)

    def _spec(self, name: str, tried: Try, handoff: Handoff, member: SimMember) -> SequenceSpec:
        asked, worker = self.asked, member.worker.spec
        return SequenceSpec(
            seq_id=name,
            prompt_token_ids=tuple(asked.prompt_token_ids),
            output_token_ids=(TOKEN.token_id,) * tried.output_tokens,
            sampling=_sampling(asked.output_tokens),
            handoff=handoff,
            arrival_s=self.timeline.time_s,
            urgency=self.urgency,
            block_keys=_keys(self, worker),
        )

    # --- in ---------------------------------------------------------------------------------------------------------

    def hear(self, heard: Heard) -> None:
        """Tokens, of a half that is this one's still."""
        tried = self.now
        half = tried.half if tried is not None else self.half
        if heard.side is Side.PREFILL:
            if half is None or half.number != heard.attempt:
                return
            if heard.finished:
                half.keep.ended()
            prompt = half.prompt
        else:
            if tried is None or tried.number != heard.attempt or tried.decode is None:
                return
            if half is not None:
                half.keep.handed_over()
            tried.decode_open = not heard.finished
            prompt = tried.prompt
        self._take(heard)
        if prompt.done():
            self.desk.less()
            if tried is not None and half is not None and self.desk.decode_after_prefill and tried.decode is not None:
                self.timeline.do_after(self.desk.rpc_s, partial(self._send_decode, tried))
        if heard.finished:
            if tried is not None and tried.decode is not None:
                tried.decode.sent.row_ended(self.tpot_s)
                tried.decode = None
            self._end()

    def _take(self, heard: Heard) -> None:
        outcome, now_s = self.outcome, self.timeline.time_s
        if outcome.first_token_s is None:
            outcome.first_token_s = now_s
            outcome.queue_s, outcome.prefill_s = heard.queue_s, heard.prefill_s
            outcome.cached_tokens = heard.cached_tokens
            self.desk.first_token(self)
        elif not outcome.transferred_bytes and heard.transferred_bytes:
            outcome.exposed_transfer_s = heard.exposed_transfer_s
            outcome.transferred_bytes = heard.transferred_bytes
            outcome.decode_queue_s = heard.queue_s
        if heard.tokens > outcome.output_tokens:
            outcome.output_tokens, outcome.last_token_s = heard.tokens, now_s

    def turned(self, turned: Turned) -> None:
        """A worker refused a half, or lost it: `AttemptLost` or `Refusal` of the runtime."""
        tried = self.now
        if tried is None:
            return
        half = tried.half
        if turned.side is Side.PREFILL:
            if half is None or half.number != turned.attempt or half.number != tried.number:
                return
            worker_id = half.member.worker.spec.worker_id
            half.keep.ended()
        else:
            if tried.number != turned.attempt or tried.decode is None:
                return
            worker_id = tried.decode.worker.spec.worker_id
            if turned.lost:
                tried.decode_open = False
                if turned.reason == FINISHED:
                    return
                if half is not None:
                    half.keep.decode_failed(turned.reason)
        if turned.lost:
            self._lose(AttemptLost(turned.reason, turned.reason, retryable=turned.retryable, worker_id=worker_id))
        else:
            self._refused(worker_id)

    def worker_lost(self, member: SimMember, *, silent: bool) -> None:
        """The stream to this life of a worker broke."""
        tried = self.now
        half = tried.half if tried is not None else self.half
        worker_id = member.worker.spec.worker_id
        lost = AttemptLost("worker_lost", f"worker {worker_id} is lost", worker_id=worker_id)
        if half is not None and half.member is member:
            needed = half.keep.worker_lost(prompt_waits=half.prompt.waiting, silent=silent)
            if tried is None or needed:
                self._lose(lost)
                return
        if tried is not None and tried.decode is member:
            if half is not None:
                half.keep.decode_lost()
            self._lose(lost)

    def out_of_time(self) -> None:
        """The request's own time is over."""
        tried = self.now
        if tried is not None and tried.decode is not None:
            name = seq_id(self.asked.request_id, 0, Side.DECODE, tried.number)
            drawn = tried.decode.worker.drawn(name)
            if drawn > self.outcome.output_tokens:
                self.outcome.output_tokens, self.outcome.last_token_s = drawn, self.timeline.time_s
        self.give_up("deadline_exceeded")

    # --- the end of a try -------------------------------------------------------------------------------------------

    def _lose(self, lost: AttemptLost) -> None:
        self.tries.failed(lost.worker_id)
        if self.now is None:
            self._wait_no_longer()
            self._drop_half()
        else:
            self._close(keep_prefill=True)
        told: ServiceError | None = self.tries.lost(lost)
        if told is None:
            self.begin()
        else:
            self.give_up(told.code or told.type)
        self.desk.less()

    def _refused(self, worker_id: str) -> None:
        """Refused before any effect: no try is lost, but the view that led there was old."""
        self.tries.failed(worker_id)
        self._close(keep_prefill=True)
        if self.half is None and self.outcome.first_token_s is None:
            self.outcome.dispatched_s = None  # that was no dispatch: it still waits at the door
        self.again = self.timeline.after(REFUSED_WAIT_S, self.begin)
        self.desk.less()

    def _close(self, *, keep_prefill: bool) -> None:
        """As `Attempt.close`."""
        tried, self.now = self.now, None
        if tried is None:
            return
        half = tried.half
        if half is None:
            tried.prompt.done()
        kept = half if half is not None and keep_prefill and half.keep.serves else None
        if tried.decode is not None:
            tried.decode.sent.row_ended(self.tpot_s)
            if tried.decode_open:
                worker, notify = tried.decode.worker, half is not None and kept is None
                name, number = self.asked.request_id, tried.number
                abort = partial(worker.abort_decode, name, number, notify_holder=notify)
                self.timeline.do_after(self.desk.rpc_s, abort)
        self.half = half
        if kept is None:
            self._drop_half()

    def _drop_half(self) -> None:
        half, self.half = self.half, None
        if half is None:
            return
        half.prompt.done()
        if half.keep.close():
            worker, name = half.member.worker, self.asked.request_id
            self.timeline.do_after(self.desk.rpc_s, partial(worker.abort_prefill, name, half.number))

    def _wait_no_longer(self) -> None:
        if self.again is not None:
            self.again.cancel()
            self.again = None
        if self.spot is not None:
            self.desk.withdraw(self)

    def give_up(self, why: str) -> None:
        """It is not answered to its end."""
        if not self.over:
            self.outcome.failed = why
            self._end()

    def _end(self) -> None:
        self.over = True
        self._close(keep_prefill=False)
        self._drop_half()
        self._wait_no_longer()
        if self.deadline is not None:
            self.deadline.cancel()
        self.desk.ended(self)
        self.desk.less()


@lru_cache(maxsize=4096)
def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _keys(choice: SimChoice, worker: WorkerSpec) -> tuple[bytes, ...]:
    return choice.desk.keys(choice, worker.block_size) if worker.prefix_cache else ()
