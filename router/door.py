"""What both front ends do at the door: admit while not draining, name models, tokenize, run requests and count.

One `Door` per router process, used from its event loop only. It decides nothing about workers: that is the
`GenerationService` behind it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, cast

from ..cluster.clock import Clock, MonotonicClock
from ..cluster.config import RouterConfig, is_loopback
from ..cluster.metrics import RouterMetrics
from .api_keys import ApiKeys
from .body_budget import MAX_HELD_BYTES, BodyBudget
from .chat_template import render_chat
from .errors import InvalidRequest, ModelNotFound, ServiceError, Unauthenticated, Unavailable
from .params import Limits, show
from .service import Delta, GenerateRequest, GenerationService, ModelCard, Readiness, Tap
from .siblings import Siblings
from .tokenizer_base import Tokenizer

MERGED_DELTAS = 64
"""Deltas of one HTTP request with several prompts that may wait for a slow client; then its prompts are held up."""
INLINE_ENCODE_CHARS = 4096
"""Longer texts, which take milliseconds, are tokenized off the event loop, so that they do not hold up streams."""
LONG_ENCODE_CHARS = 65_536
"""Texts beyond this, and those below it, are tokenized one at a time each, so that neither waits for the other."""
DEADLINE_GRACE_S = 5.0
"""The service ends a request at its deadline; this much later the door does (a client that does not read)."""


def shutting_down() -> Unavailable:
    """What a request inside hears when the router stops without waiting for it."""
    return Unavailable("the router is shutting down", retry_after_s=1.0)


class Door:
    """Shared by the HTTP application and the gRPC servicer. `keys`: what clients must present; None: nothing."""

    def __init__(
        self,
        service: GenerationService,
        tokenizer: Tokenizer,
        config: RouterConfig,
        metrics: RouterMetrics,
        *,
        keys: ApiKeys | None = None,
        clock: Clock | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.service = service
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metrics
        self.draining = False
        self.closing = False
        self.bodies = BodyBudget(max(MAX_HELD_BYTES, 2 * config.max_body_bytes))
        self.siblings = siblings or Siblings(config, metrics)
        self.siblings.watch(self.readiness)
        self._keys = keys or ApiKeys()
        self._on_loopback = is_loopback(config.host)
        self._clock = clock or MonotonicClock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._middle_encodes, self._long_encodes = asyncio.Semaphore(1), asyncio.Semaphore(1)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts the current task as a request inside the router; Unavailable while draining. Never blocks."""
        if self.draining:
            raise Unavailable("the router is draining and takes no new requests", retry_after_s=1.0)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and waits for those inside; False if some remain after `timeout_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends the requests inside, each with an error its client can read; returns when all have left. Idempotent."""
        self.draining = self.closing = True
        for task in list(self._tasks):
            task.cancel()
        await self.drain(DEADLINE_GRACE_S)

    def check_key(self, authorization: str | None) -> None:
        """Unauthenticated unless `knows(authorization)`."""
        if not self.knows(authorization):
            raise Unauthenticated("authorization: missing or wrong; allowed: 'Bearer <key>' with this router's API key")

    def knows(self, authorization: str | None) -> bool:
        """Whether `authorization` is `Bearer <key>` with a key that counts now, or no key is wanted."""
        if not self._keys.wanted:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        return scheme.lower() == "bearer" and self._keys.admit(key.strip())

    @property
    def key_counts(self) -> dict[str, int | None]:
        """See `ApiKeys.counts`."""
        return self._keys.counts

    @property
    def warning(self) -> str:
        """One line for the operator about what keeps all clients out; else empty."""
        return self._keys.warning

    @property
    def wants_host(self) -> bool:
        """Whether requests must come under a name that only this machine has: nothing else keeps strangers out."""
        return not self._keys.wanted and self.config.tls_cert is None and self._on_loopback

    def count_refusal(self, error: ServiceError) -> None:
        """Counts a request that the door itself turned away; the service counts what it refuses."""
        if isinstance(error, InvalidRequest | ModelNotFound | Unauthenticated) or self.draining:
            self.metrics.count_refusal("draining" if self.draining else error.code or error.type)

    def readiness(self) -> Readiness:
        """The service's, or not ready while draining."""
        if self.draining:
            return Readiness(ready=False, reason="draining")
        return self.service.readiness()

    def card(self, model: str | None) -> ModelCard:
        """The model of that name; None: the first one. ModelNotFound, or Unavailable while there is no model at all."""
        cards = self.service.models()
        if not cards:
            raise Unavailable(self.service.readiness().reason or "no worker has joined yet", retry_after_s=1.0)
        if model is None:
            return cards[0]
        for card in cards:
            if card.id == model:
                return card
        served = ", ".join(card.id for card in cards)
        raise ModelNotFound(f"model: {show(model)} does not exist here; allowed: {served}", param="model")

    def limits(self, card: ModelCard) -> Limits:
        """What options of a request to that model are checked against."""
        return Limits(
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=card.max_model_len,
            max_choices=self.config.max_choices,
            max_stop=self.config.max_stop,
            default_max_tokens=self.config.default_max_tokens,
        )

    def timeout_s(self, text: str | None, *, param: str) -> float:
        """A client's own deadline in seconds, at most the router's; the router's if there is none."""
        limit_s = self.config.request_timeout_s
        if text is None:
            return limit_s
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not 0 < timeout_s < math.inf:
            raise InvalidRequest(f"{param}: {show(text)} is no time; allowed: seconds above 0", param=param)
        return min(timeout_s, limit_s)

    def now_s(self) -> float:
        """The router's clock, for the arrival of a request."""
        return self._clock.now_s()

    async def encode(self, text: str, *, add_special: bool, param: str) -> tuple[int, ...]:
        """Token ids of a text read from the field `param`."""
        try:
            if len(text) <= INLINE_ENCODE_CHARS:
                return tuple(self.tokenizer.encode(text, add_special=add_special))
            async with self._long_encodes if len(text) > LONG_ENCODE_CHARS else self._middle_encodes:
                return tuple(await asyncio.to_thread(self.tokenizer.encode, text, add_special=add_special))
        except InvalidRequest as error:
            raise InvalidRequest(f"{param}: {error.message}", param=param) from None

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, param: str, add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Token ids of chat messages, read from the field `param`, in the model's own format; InvalidRequest if
        none.
        """
        try:
            text = render_chat(
                self.tokenizer.chat_template,
                messages,
                bos_text=self.tokenizer.bos_text,
                eos_text=self.tokenizer.eos_text,
                add_generation_prompt=add_generation_prompt,
            )
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=param) from None
        return await self.encode(text, add_special=False, param=param)

    async def run(self, request: GenerateRequest, tap: Tap | None = None) -> AsyncGenerator[Delta, None]:
        """The service's deltas, with the time between tokens observed. Close it (`aclosing`) to cancel the request."""
        last_s: dict[int, float] = {}

        def observe(delta: Delta) -> None:
            if delta.tokens:
                now_s = self._clock.now_s()
                if delta.choice in last_s:
                    self.metrics.observe_inter_token(now_s - last_s[delta.choice], len(delta.tokens))
                last_s[delta.choice] = now_s

        def observed(delta: Delta) -> bool:
            assert tap is not None
            if not tap(delta):
                return False
            observe(delta)
            return True

        offered = None if tap is None else observed
        deltas = cast("AsyncGenerator[Delta, None]", self.service.generate(request, offered))
        async with aclosing(deltas):
            async for delta in deltas:
                observe(delta)
                yield delta

    async def run_all(
        self, requests: Sequence[GenerateRequest], tap: Tap | None = None
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Runs several prompts at once; yields (index in `requests`, delta). The first error ends all of them. `tap`:
        is offered deltas of a prompt that is alone.
        """
        if len(requests) == 1:
            async with aclosing(self.run(requests[0], tap)) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        merged: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(MERGED_DELTAS)

        async def pump(index: int) -> None:
            end: Exception | None = None
            try:
                async with aclosing(self.run(requests[index])) as deltas:
                    async for delta in deltas:
                        await merged.put((index, delta))
            except Exception as error:  # carried over to the reader, which raises it
                end = error
            await merged.put((index, end))

        pumps = [asyncio.create_task(pump(index)) for index in range(len(requests))]
        running = len(pumps)
        try:
            while running:
                index, item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield index, item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
