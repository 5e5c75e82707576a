"""One choice of one request, as one readable coroutine: place, submit, stream, and clean up in one `finally`.

1. `Dispatcher.place` waits for workers and a credit.
2. `Attempt.submit` dispatches both halves.
3. Tokens come in, become text (`OutputStream`) and go out as deltas, the first from the prefill worker, the rest from
   the decode worker: in the call that brings them (`_hear`), so that no task is woken for a token. What ends something
   wakes the coroutine.
4. Whatever way this ends, the attempt's other half is told.

When a worker is lost, a new attempt goes on behind the tokens already sent: prompt and output stay apart, and a token
depends only on seed, choice and index, so the client sees nothing but time. While the prefill that was begun can still
be taken from where it is, the new attempt is a decode attempt only. A request that was under way waits for workers to
come back until its deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from ..cluster.clock import Clock
from ..cluster.messages import plain_tokens_from_proto, tokens_from_proto
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.rpc import Refusal
from ..cluster.types import FinishReason, Timings
from .attempt import Attempt, PrefillHalf, Work
from .dispatch import Dispatcher, Standing
from .errors import DeadlineExceeded, InvalidRequest
from .output import OutputChunk, OutputGap, OutputStream
from .placing import NoWorkers, Path
from .service import Delta, GenerateRequest
from .tries import REFUSED_WAIT_S, AttemptLost, Tries

logger = logging.getLogger(__name__)
WORKER_ERRORS = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED})
"""Not refusals: the worker's code broke, and will break again. They cost a try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceTools:
    """What a choice needs of its router."""

    dispatcher: Dispatcher
    clock: Clock
    max_attempts: int
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    """Runs a clean-up in the background, bounded, until it is done."""
    at_end_of_turn: Callable[[Callable[[], None]], None]
    """See `Turn`."""
    on_lost: Callable[[AttemptLost, Path, bool], None]
    """An attempt was lost on this path; True: another one follows."""
    on_kept: Callable[[], None]
    """A decode attempt goes on with the prefill of an attempt before."""


class ChoiceRun:
    """The state of one choice; `run` is called once."""

    def __init__(
        self,
        tools: ChoiceTools,
        request: GenerateRequest,
        choice: int,
        output: OutputStream,
        emit: Callable[[Delta], None],
        on_first_token: Callable[[], None],
        arrival_s: float,
        standing: Standing,
    ) -> None:
        self._tools = tools
        self._standing = standing
        self._spot = standing.spot
        self._request = request
        self._sampling = replace(request.sampling, choice=choice) if choice else request.sampling
        self._read = plain_tokens_from_proto if request.sampling.top_logprobs is None else tokens_from_proto
        self._output = output
        self._emit = emit
        self._on_first_token = on_first_token
        self._arrival_s = arrival_s
        self._deadline_s = arrival_s + request.timeout_s
        self._sent: list[int] = []
        self._unsent: list[OutputChunk] = []
        self._broken: Exception | None = None
        """What went wrong with tokens that were taken where they arrived, to be raised in the task."""
        self._times = _Times()
        self._tries = Tries(max_attempts=tools.max_attempts, deadline_s=self._deadline_s, timeout_s=request.timeout_s)
        self._path = Path.SPLIT
        self._prefill_worker = self._decode_worker = ""
        self._half: PrefillHalf | None = None
        """Between two attempts: the prefill that the next one goes on with."""

    @property
    def attempts(self) -> int:
        """Tries that began, the last one included."""
        return self._tries.lost_total + 1

    async def run(self) -> Timings:
        """Streams the choice to its end and returns its waterfall. Raises `ServiceError`."""
        try:
            return await self._run()
        finally:
            self._drop_half()

    async def _run(self) -> Timings:
        while True:
            self._tries.begin()
            try:
                return await self._attempt()
            except AttemptLost as lost:
                self._give_up_or_log(lost)
            except Refusal as refusal:
                # Refused before any effect: no try is lost, but the view that led there was old.
                if refusal.code is grpc.StatusCode.INVALID_ARGUMENT:
                    raise InvalidRequest(refusal.message) from refusal
                if refusal.code in WORKER_ERRORS:
                    self._give_up_or_log(AttemptLost("worker_error", refusal.message))
                    continue
                logger.debug("%s: refused: %s", self._request.request_id, refusal.message)
                if self._half is None:
                    self._times.refused()
                await asyncio.sleep(REFUSED_WAIT_S)

    async def _attempt(self) -> Timings:
        attempt = await (self._place() if self._half is None else self._place_behind(self._half))
        if attempt is None:
            return self._timings()
        self._placed(attempt)
        failed = False
        try:
            self._times.dispatched(self._tools.clock.now_s())
            attempt.offer(self._hear)
            await attempt.submit(self._remaining_s())
            while not self._output.finished:
                self._take_all(await attempt.next_event(), attempt.events_here())
            return self._timings()
        except (Refusal, AttemptLost) as error:
            failed = True
            self._tries.failed(error.worker_id if isinstance(error, AttemptLost) else attempt.asked)
            raise
        finally:
            self._half = attempt.close(self._tools.spawn, keep_prefill=failed)

    def _placed(self, attempt: Attempt) -> None:
        self._path = attempt.path
        self._prefill_worker = attempt.first_worker.worker_id
        self._decode_worker = attempt.decode.worker_id if attempt.decode is not None else ""
        if self._half is not None:
            self._half = None  # it is the attempt's now
            self._tools.on_kept()

    async def _place(self) -> Attempt:
        work = self._work()
        try:
            spot, self._spot = self._spot, None
            return await self._tools.dispatcher.place(work, spot)
        except NoWorkers as none:
            if (told := self._tries.nobody_came(none)) is none:
                raise
            raise told from none

    async def _place_behind(self, half: PrefillHalf) -> Attempt | None:
        """Looks for a decode worker and hears the prefill meanwhile. None: its first token has ended the choice;
        `AttemptLost`: it has nothing to serve any more.
        """
        placing = asyncio.create_task(self._place())
        attempt: Attempt | None = None
        try:
            while not placing.done():
                hearing = asyncio.create_task(half.next_event())
                try:
                    await asyncio.wait({placing, hearing}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    hearing.cancel()
                    await asyncio.gather(hearing, return_exceptions=True)
                if hearing.cancelled():
                    continue
                self._take_all(hearing.result())
                if self._output.finished:
                    return None
            attempt = placing.result()
            return attempt
        except AttemptLost:
            self._drop_half()
            raise
        finally:
            if attempt is None:
                placing.cancel()
                [found] = await asyncio.gather(placing, return_exceptions=True)
                if isinstance(found, Attempt):
                    found.close(self._tools.spawn)

    def _drop_half(self) -> None:
        if self._half is not None:
            self._half.close(self._tools.spawn)
            self._half = None

    def _hear(self, event: pb.TokensEvent) -> bool:
        """Takes tokens in the call that brought them, while the task waits. False: the task must look, because they
        end the choice or cannot be taken.
        """
        try:
            self._take(event)
        except Exception as error:
            self._broken = error
            return False
        if self._output.finished:
            return False
        if len(self._unsent) == 1:
            self._tools.at_end_of_turn(self._send)
        return True

    def _take_all(self, event: pb.TokensEvent, more: Iterable[pb.TokensEvent] = ()) -> None:
        """Tokens arrived, maybe more than one step's: to text, to the client, to the waterfall."""
        try:
            if (broken := self._broken) is not None:
                self._broken = None
                raise broken
            self._take(event)
            for event in more:
                self._take(event)
        finally:
            self._send()

    def _take(self, event: pb.TokensEvent) -> None:
        now_s = self._tools.clock.now_s()
        self._times.heard(event)
        tokens = self._read(event.tokens)
        finish = FinishReason(event.finish_reason) if event.finish_reason else None
        stop_token_id = event.stop_token_id if event.HasField("stop_token_id") else None
        try:
            chunk = self._output.push(event.index, tokens, finish, stop_token_id)
        except OutputGap as gap:
            raise AttemptLost("output_gap", str(gap)) from gap
        if not chunk.tokens and not chunk.text and chunk.finish_reason is None:
            return
        if not self._sent:
            self._times.first_token_s = now_s
            self._on_first_token()
        self._sent += [token.token_id for token in chunk.tokens]
        self._times.last_token_s = now_s
        self._unsent.append(chunk)

    def _send(self) -> None:
        """To the client, in one delta: a router that falls behind sends together what has come together."""
        if not self._unsent:
            return
        chunks = self._unsent
        last = chunks[-1]
        alone = len(chunks) == 1
        self._emit(
            Delta(
                choice=self._sampling.choice,
                text=last.text if alone else "".join([chunk.text for chunk in chunks]),
                tokens=last.tokens if alone else tuple(token for chunk in chunks for token in chunk.tokens),
                finish_reason=last.finish_reason,
                stop_reason=last.stop_reason,
                timings=self._timings() if last.finish_reason is not None else None,
            )
        )
        self._unsent = []  # not before they have left: who breaks there leaves them to the next call

    def _work(self) -> Work:
        return Work(
            request_id=self._request.request_id,
            number=self._tries.number,
            prompt_token_ids=self._request.prompt_token_ids,
            # A ticket counts the tokens of its prefill: what came since is dropped when it comes again.
            output_token_ids=self._half.work.output_token_ids if self._half is not None else tuple(self._sent),
            sampling=self._sampling,
            urgency=self._standing.urgency,
            tpot_s=self._standing.tpot_s,
            block_keys={} if self._sent else self._standing.block_keys,
            avoid=self._tries.avoid,
            half=self._half,
            waits_until_s=self._tries.waits_until_s,
        )

    def _remaining_s(self) -> float:
        remaining_s = self._deadline_s - self._tools.clock.now_s()
        if remaining_s <= 0:
            raise DeadlineExceeded(f"the request's {self._request.timeout_s:g} s ran out before it was dispatched")
        return remaining_s

    def _give_up_or_log(self, lost: AttemptLost) -> None:
        told = self._tries.lost(lost)
        self._tools.on_lost(lost, self._path, told is None)
        if told is not None:
            raise told from lost
        number = self._tries.lost_total
        logger.info("%s attempt %d: %s: %s", self._request.request_id, number, lost.reason, lost.message)

    def _timings(self) -> Timings:
        """The waterfall as of now; complete with the last delta."""
        times, now_s = self._times, self._times.last_token_s
        prefill = times.prefill or pb.PrefillTimings()
        decode = times.decode or pb.DecodeTimings()
        split = self._path is Path.SPLIT
        return Timings(
            queue_s=max(0.0, times.dispatched_s - self._arrival_s) + prefill.queue_s,
            prefill_s=prefill.prefill_s,
            ttft_s=times.first_token_s - self._arrival_s,
            transfer_s=decode.transfer_s if split else 0.0,
            exposed_transfer_s=decode.exposed_transfer_s if split else 0.0,
            decode_queue_s=decode.queue_s if split else 0.0,
            decode_s=now_s - times.first_token_s,
            e2e_s=now_s - self._arrival_s,
            prefill_worker=self._prefill_worker,
            decode_worker=self._decode_worker,
            path=self._path.value,
            transferred_bytes=decode.transferred_bytes if split else 0,
            transport=decode.transport if split else "",
            slo_class=self._standing.urgency.slo_class,
            cached_tokens=prefill.cached_tokens,
            output_tokens=len(self._sent),
        )


class _Times:
    """What a choice's waterfall is made of, on the router's clock but for the workers' own durations."""

    def __init__(self) -> None:
        self.dispatched_s = 0.0
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.prefill: pb.PrefillTimings | None = None
        self.decode: pb.DecodeTimings | None = None

    def dispatched(self, now_s: float) -> None:
        """Of the first attempt only: what comes after is not queueing at the door."""
        self.dispatched_s = self.dispatched_s or now_s

    def refused(self) -> None:
        """That was no dispatch: the choice still waits at the door."""
        if not self.first_token_s:
            self.dispatched_s = 0.0

    def heard(self, event: pb.TokensEvent) -> None:
        """Keeps the durations that came with the first tokens of a side."""
        if event.HasField("prefill") and self.prefill is None:
            self.prefill = event.prefill
        if event.HasField("decode"):
            self.decode = event.decode
