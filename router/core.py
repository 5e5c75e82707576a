"""The router's core: one checked request in, deltas out. Joins admission, placement, choices, metrics and the
waterfall log.

A request's `n` choices are `n` sequences with the same prompt. The first is dispatched alone; the others follow its
first token, so that their prompt is a prefix-cache hit instead of being computed n times.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import replace
from typing import Any

from ..cluster.clock import Clock
from ..cluster.config import RouterConfig
from ..cluster.events import RequestOutcome, WaterfallLog
from ..cluster.metrics import RouterMetrics
from ..cluster.types import Role, Timings, Urgency
from .admission import Admission
from .attainment import Attainment
from .attempt import Work
from .choice import ChoiceRun, ChoiceTools
from .describe import describe
from .dispatch import Dispatcher, Standing
from .errors import DeadlineExceeded, Overloaded, ServiceError
from .mailbox import Mailbox
from .members import Membership
from .output import OutputStream
from .placement import missing, pair
from .placer import Placer
from .placing import Path
from .service import Delta, GenerateRequest, GenerationService, ModelCard, Readiness, Tap
from .slo_classes import Promise, SLOClasses
from .tokenizer_base import Tokenizer
from .tries import AttemptLost
from .turn import Turn

logger = logging.getLogger(__name__)
MAX_CLEANUPS = 4096


class RouterCore(GenerationService):
    """One per router process; lives on its event loop."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        router_id: str,
        members: Membership,
        tokenizer: Tokenizer,
        metrics: RouterMetrics,
        log: WaterfallLog,
        clock: Clock,
        card: ModelCard,
        attainment: Attainment | None = None,
    ) -> None:
        """`attainment`: what is to follow the requests; None: one of its own."""
        self._config = config
        self._members = members
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._card = self._shown_card = card
        self._default_promise = SLOClasses(config).promise()
        self._admission = Admission(config.max_waiting)
        self._attainment = attainment or Attainment(clock.now_s())
        self._in_flight = 0
        self._cleanups: set[asyncio.Task[None]] = set()
        placer = Placer(
            members,
            router_id=router_id,
            local_threshold_tokens=config.local_prefill_threshold_tokens,
            spawn=self._spawn,
        )
        self._dispatcher = Dispatcher(placer, members, clock=clock, unready_wait_s=config.unready_wait_s)
        metrics.watch_queue(self._dispatcher.waiting_by_class)
        self._tools = ChoiceTools(
            dispatcher=self._dispatcher,
            clock=clock,
            max_attempts=config.max_attempts,
            spawn=self._spawn,
            at_end_of_turn=Turn().at_end,
            on_lost=self._on_lost,
            on_kept=metrics.count_prefill_kept,
        )

    # --- the service ------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest, tap: Tap | None = None) -> AsyncGenerator[Delta, None]:
        """See `GenerationService.generate`."""
        arrival_s = self._clock.now_s() if request.arrival_s is None else request.arrival_s
        key = f"{request.request_id}:{secrets.token_hex(4)}"
        promise = request.promise or self._default_promise
        standing = self._admit(request, promise, key, arrival_s)
        self._count_in_flight(+1)
        deltas: Mailbox[Delta | None] = Mailbox()  # bounded by n x max_tokens
        if tap is not None:
            deltas.tap = lambda delta: delta is not None and delta.finish_reason is None and tap(delta)
        task = asyncio.create_task(self._run_choices(request, promise, standing, key, arrival_s, deltas))
        task.add_done_callback(lambda _: self._ended(standing, deltas))
        unfinished = request.n
        outcome, reason = RequestOutcome.CANCELED, ""
        try:
            while (delta := await next_delta(deltas)) is not None:
                unfinished -= delta.finish_reason is not None
                if not unfinished:  # a client that leaves with its answer has not cancelled
                    outcome = RequestOutcome.ANSWERED
                yield delta
            await task
        except ServiceError as error:
            outcome, reason = RequestOutcome.FAILED, error.code or error.type
            raise
        finally:
            self._admission.leave(key)
            self._count_in_flight(-1)
            if not task.done():
                if outcome is RequestOutcome.CANCELED:
                    self._metrics.count_canceled()
                task.cancel()
            self._attainment.end(key, outcome, self._clock.now_s())
            self._record_end(request, outcome, reason)
            await asyncio.gather(task, return_exceptions=True)

    def _ended(self, standing: Standing, deltas: Mailbox[Delta | None]) -> None:
        """The request's task is over, whoever still waits for that: its place is free, and its reader hears the end."""
        if standing.spot is not None:
            self._dispatcher.leave(standing.spot)
        deltas.put_nowait(None)

    def _record_end(self, request: GenerateRequest, outcome: RequestOutcome, reason: str) -> None:
        self._log.record_end(
            request_id=request.request_id,
            client_request_id=request.client_request_id,
            outcome=outcome,
            reason=reason,
        )

    def _admit(self, request: GenerateRequest, promise: Promise, key: str, arrival_s: float) -> Standing:
        """Lets the request in, with a place in the queue, or raises `Overloaded`."""
        ttft_s = math.inf if promise.ttft_s is None else promise.ttft_s
        work = self._work(request, promise, arrival_s + ttft_s)
        outlook = self._dispatcher.outlook(work)
        forecast = outlook.forecast
        if forecast is not None and promise.effective_ttft_s(forecast.idle_s) > ttft_s:
            work = self._work(request, promise, arrival_s + promise.effective_ttft_s(forecast.idle_s), work)
            forecast = self._dispatcher.outlook(work).forecast
        now_s = self._clock.now_s()
        idle_tpot_s = self._dispatcher.idle_tpot_s(work.context_tokens)
        self._attainment.arrive(key, promise, arrival_s)
        try:
            self._admission.enter(
                key,
                now_s,
                promise=promise,
                forecast=forecast,
                elapsed_s=max(0.0, now_s - arrival_s),
                idle_tpot_s=idle_tpot_s,
            )
        except Overloaded as refusal:
            self._metrics.count_refusal(refusal.code or refusal.type)
            self._attainment.end(key, RequestOutcome.REFUSED, now_s)
            self._record_end(request, RequestOutcome.REFUSED, refusal.code or refusal.type)
            raise
        tpot_s = promise.effective_tpot_s(idle_tpot_s)
        spot = self._dispatcher.expect(work, outlook.cost_tokens)
        return Standing(urgency=work.urgency, tpot_s=tpot_s, block_keys=work.block_keys, spot=spot)

    @staticmethod
    def _work(request: GenerateRequest, promise: Promise, deadline_s: float, before: Work | None = None) -> Work:
        """The first attempt at the first choice, as far as the door needs it."""
        return Work(
            request_id=request.request_id,
            number=1,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=(),
            sampling=request.sampling,
            urgency=Urgency(slo_class=promise.slo_class, share=promise.share, deadline_s=deadline_s),
            block_keys={} if before is None else before.block_keys,
        )

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        self._metrics.set_in_flight(self._in_flight)

    def models(self) -> tuple[ModelCard, ...]:
        """The one model this router serves; its context is what every worker can hold."""
        lengths = [member.status.max_model_len for member in self._members.members() if member.status.max_model_len]
        shortest = min(lengths, default=self._card.max_model_len)
        if shortest != self._shown_card.max_model_len:
            self._shown_card = replace(self._card, max_model_len=shortest)
        return (self._shown_card,)

    def readiness(self) -> Readiness:
        """Ready: a prefill and a decode worker whose KV matches, or a mixed worker, can take work now."""
        workers: list[dict[str, object]] = []
        for member in self._members.members():
            state = self._members.why_not_routable(member) or "ready"
            heard_ago_s = self._clock.now_s() - member.heard_s
            workers.append({**describe(member.status), "state": state, "heartbeat_age_s": heard_ago_s})
        return Readiness(ready=not (reason := self._why_not_ready()), reason=reason, workers=tuple(workers))

    def _why_not_ready(self) -> str:
        prefill, decode = self._members.routable(Role.PREFILL), self._members.routable(Role.DECODE)
        if self._members.routable(Role.MIXED) or all(pair(prefill, decode)):
            return ""
        return f"no {missing(prefill, decode)} is ready"

    # --- one request ------------------------------------------------------------------------------------------------

    async def _run_choices(
        self,
        request: GenerateRequest,
        promise: Promise,
        standing: Standing,
        key: str,
        arrival_s: float,
        deltas: Mailbox[Delta | None],
    ) -> None:
        """All choices of a request, under its deadline; the first failure ends the others."""
        first_token = asyncio.Event()

        def on_first_token() -> None:
            self._admission.first_token(key, self._clock.now_s())
            self._attainment.first_token(key)
            first_token.set()

        async def follow(choice: int) -> None:
            await first_token.wait()
            await self._run_choice(
                request, choice, promise, replace(standing, spot=None), key, arrival_s, deltas, lambda: None
            )

        try:
            async with asyncio.timeout(request.timeout_s):
                first = self._run_choice(request, 0, promise, standing, key, arrival_s, deltas, on_first_token)
                if request.n == 1:
                    await first
                    return
                async with asyncio.TaskGroup() as group:
                    group.create_task(first)
                    for choice in range(1, request.n):
                        group.create_task(follow(choice))
        except TimeoutError:
            late = DeadlineExceeded(f"the request did not finish within its {request.timeout_s:g} s")
            self._metrics.count_failure(late.code or late.type)
            raise late from None
        except (Exception, BaseExceptionGroup) as error:
            raise self._first_error(error) from None

    async def _run_choice(
        self,
        request: GenerateRequest,
        choice: int,
        promise: Promise,
        standing: Standing,
        key: str,
        arrival_s: float,
        deltas: Mailbox[Delta | None],
        on_first: Callable[[], None],
    ) -> None:
        output = OutputStream(
            self._tokenizer,
            stop=request.stop,
            min_tokens=request.sampling.min_tokens,
            skip_special=request.skip_special_tokens,
            continuation=request.continuation,
        )
        run = ChoiceRun(self._tools, request, choice, output, deltas.put_nowait, on_first, arrival_s, standing)
        timings = await run.run()
        kept = self._record(request, choice, promise, timings, str(output.finish_reason), run.attempts)
        self._attainment.choice_ended(key, kept)

    def _record(
        self,
        request: GenerateRequest,
        choice: int,
        promise: Promise,
        timings: Timings,
        finish_reason: str,
        tries: int,
    ) -> bool:
        """Whether the choice kept both promises."""
        prompt_tokens = len(request.prompt_token_ids)
        kept = self._metrics.observe_choice(
            timings,
            prompt_tokens=prompt_tokens,
            finish_reason=finish_reason,
            slo=promise.slo,
            slo_class=promise.slo_class,
            choice=choice,
        )
        self._log.record(
            request_id=request.request_id,
            client_request_id=request.client_request_id,
            choice=choice,
            timings=timings,
            prompt_tokens=prompt_tokens,
            finish_reason=finish_reason,
            attempts=tries,
        )
        return kept

    def _first_error(self, error: BaseException) -> BaseException:
        """The error that a client is told: of a group, the first that is not a consequence of another."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, ServiceError):
            self._metrics.count_failure(error.code or error.type)
        elif not isinstance(error, asyncio.CancelledError):
            logger.error("a request failed", exc_info=error)
            self._metrics.count_failure("internal")
            return ServiceError(f"internal error: {type(error).__name__}")
        return error

    def _on_lost(self, lost: AttemptLost, path: Path, again: bool) -> None:
        if again:
            self._metrics.count_retry(lost.reason)
        if path is Path.SPLIT:
            self._metrics.count_handoff_failure(lost.reason)

    # --- end --------------------------------------------------------------------------------------------------------

    def _spawn(self, cleanup: Coroutine[Any, Any, None]) -> None:
        """Runs a clean-up to its end, whatever becomes of the request it belongs to."""
        if len(self._cleanups) >= MAX_CLEANUPS:
            logger.warning("too many clean-ups under way; the workers' leases will do it")
            cleanup.close()
            return
        task = asyncio.create_task(cleanup)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def close(self) -> None:
        """Waits for the clean-ups (each has a deadline of its own); idempotent."""
        while self._cleanups:
            await asyncio.wait(self._cleanups)
        self._log.close()


async def next_delta(deltas: Mailbox[Delta | None]) -> Delta | None:
    """The next delta, with those of the same choice that wait right behind it: a client that reads slowly, or a router
    that is busy, gets fewer and larger ones.
    """
    delta = await deltas.get()
    parts: list[Delta] = []
    while delta is not None and delta.finish_reason is None and not deltas.empty():
        following = deltas.peek()
        if following is None or following.choice != delta.choice:
            break
        parts.append(delta)
        delta = deltas.get_nowait()
    if delta is None or not parts:
        return delta
    parts.append(delta)
    tokens = tuple(token for part in parts for token in part.tokens)
    return replace(delta, text="".join([part.text for part in parts]), tokens=tokens)
