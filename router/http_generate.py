"""`/v1/chat/completions` and `/v1/completions`: from a checked body to requests, and from deltas to one answer or a
stream.

1. Body read and checked, model found, prompts tokenized, `max_tokens` settled: 400 or 404 end here.
2. The service runs every prompt; nothing is sent before the first delta, so that a refusal is still a status (429 or
   503).
3. Streamed: chunks as deltas come, usage if asked for, `[DONE]`; an error after the start is a last event without
   `[DONE]`. Whole: deltas collected, one body.

A client that closes its connection cancels 2 and 3 at once (`Exchange.until_gone`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from .door import DEADLINE_GRACE_S, Door
from .errors import DeadlineExceeded, ServiceError
from .http_exchange import Exchange
from .openai_requests import OpenAICall, parse_chat, parse_completion
from .openai_responses import ChatResponder, CompletionResponder, Responder, Usage, server_sent
from .params import Fields, Limits
from .service import Delta, GenerateRequest
from .slo_classes import HEADERS, Promise, SLOClasses, number_of, parse_promise


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A call that can run."""

    requests: tuple[GenerateRequest, ...]
    responder: Responder
    n: int
    stream: bool
    include_usage: bool
    timeout_s: float


class GenerationEndpoint(ABC):
    """What the two APIs have in common."""

    id_prefix: str
    prompt_field: str
    continues_prompt: bool
    """Whether the output goes on behind the prompt's own text."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._slo_classes = SLOClasses(door.config)

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request."""
        body = await exchange.read_json()
        await exchange.until_gone(lambda: self._run(exchange, body))

    @abstractmethod
    def _parse(self, body: Mapping[str, Any], limits: Limits) -> OpenAICall:
        """The checked body."""

    @abstractmethod
    async def _tokenize(self, call: OpenAICall) -> list[tuple[int, ...]]:
        """Token ids of every prompt."""

    @abstractmethod
    def _responder(self, call: OpenAICall, prompts: list[tuple[int, ...]], common: dict[str, Any]) -> Responder:
        """The shape of the answer."""

    async def _prepare(self, exchange: Exchange, body: Mapping[str, Any]) -> _Prepared:
        arrival_s = self._door.now_s()
        model = body.get("model")
        card = self._door.card(model if isinstance(model, str) and model else None)
        call = self._parse(body, self._door.limits(card))
        timeout_s = self._door.timeout_s(exchange.header("x-request-timeout-s"), param="x-request-timeout-s")
        promise = self._promise(exchange)
        prompts = await self._tokenize(call)
        response_id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        exchange.request_id = exchange.request_id or response_id
        options = call.options
        requests = tuple(
            GenerateRequest(
                request_id=response_id if len(prompts) == 1 else f"{response_id}-{index}",
                prompt_token_ids=ids,
                sampling=options.resolve(len(ids), param=self.prompt_field),
                n=options.n,
                stop=options.stop,
                timeout_s=timeout_s,
                skip_special_tokens=options.skip_special_tokens,
                client_request_id=exchange.request_id,
                continuation=self.continues_prompt,
                promise=promise,
                arrival_s=arrival_s,
            )
            for index, ids in enumerate(prompts)
        )
        common = {
            "response_id": response_id,
            "model": card.id,
            "created_unix_s": int(time.time()),
            "tokenizer": self._door.tokenizer,
            "logprobs": options.sampling.top_logprobs is not None,
            "include_usage": call.include_usage,
        }
        responder = self._responder(call, prompts, common)
        return _Prepared(requests, responder, options.n, call.stream, call.include_usage, timeout_s)

    def _promise(self, exchange: Exchange) -> Promise:
        values = {
            HEADERS.slo_class: exchange.header(HEADERS.slo_class),
            HEADERS.ttft_ms: number_of(exchange.header(HEADERS.ttft_ms)),
            HEADERS.tpot_ms: number_of(exchange.header(HEADERS.tpot_ms)),
        }
        return parse_promise(Fields(values), self._slo_classes, HEADERS)

    async def _run(self, exchange: Exchange, body: Mapping[str, Any]) -> None:
        prepared = await self._prepare(exchange, body)
        usage = Usage(prompt_tokens=sum(len(request.prompt_token_ids) for request in prepared.requests))
        try:
            # The service keeps the deadline; this one is for a client that takes its answer too slowly or not at all.
            async with asyncio.timeout(prepared.timeout_s + DEADLINE_GRACE_S):
                async with aclosing(self._door.run_all(prepared.requests)) as deltas:
                    if prepared.stream:
                        await self._stream(exchange, prepared, deltas, usage)
                        return
                    async for prompt, delta in deltas:
                        usage.add(delta)
                        prepared.responder.collect(prompt * prepared.n + delta.choice, delta)
                await exchange.send_json(prepared.responder.body(usage))
        except TimeoutError:
            raise DeadlineExceeded(f"the answer was not taken within {prepared.timeout_s:g} s") from None

    async def _stream(
        self,
        exchange: Exchange,
        prepared: _Prepared,
        deltas: AsyncGenerator[tuple[int, Delta], None],
        usage: Usage,
    ) -> None:
        responder = prepared.responder
        async for prompt, delta in deltas:
            if not exchange.started:
                await exchange.start_events()
                opening = responder.opening_chunks(len(prepared.requests) * prepared.n)
                await exchange.send_events(server_sent(opening))
            usage.add(delta)
            await exchange.send_events(responder.events(prompt * prepared.n + delta.choice, delta))
        if not exchange.started:
            raise ServiceError("the service ended without an answer")
        if prepared.include_usage:
            await exchange.send_events(server_sent([responder.usage_chunk(usage)]))
        await exchange.end_events(done=True)


class ChatEndpoint(GenerationEndpoint):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    prompt_field = "messages"
    continues_prompt = False

    def _parse(self, body: Mapping[str, Any], limits: Limits) -> OpenAICall:
        return parse_chat(body, limits)

    async def _tokenize(self, call: OpenAICall) -> list[tuple[int, ...]]:
        return [await self._door.encode_chat(call.messages, param=self.prompt_field)]

    def _responder(self, call: OpenAICall, prompts: list[tuple[int, ...]], common: dict[str, Any]) -> Responder:
        return ChatResponder(**common)


class CompletionEndpoint(GenerationEndpoint):
    """`/v1/completions`."""

    id_prefix = "cmpl"
    prompt_field = "prompt"
    continues_prompt = True

    def _parse(self, body: Mapping[str, Any], limits: Limits) -> OpenAICall:
        return parse_completion(body, limits)

    async def _tokenize(self, call: OpenAICall) -> list[tuple[int, ...]]:
        return [
            await self._door.encode(prompt, add_special=True, param=self.prompt_field)
            if isinstance(prompt, str)
            else prompt
            for prompt in call.prompts
        ]

    def _responder(self, call: OpenAICall, prompts: list[tuple[int, ...]], common: dict[str, Any]) -> Responder:
        if not call.echo:
            return CompletionResponder(**common)
        texts = [
            prompt if isinstance(prompt, str) else self._door.tokenizer.decode(ids, skip_special=False)
            for prompt, ids in zip(call.prompts, prompts, strict=True)
        ]
        return CompletionResponder(echoes=[text for text in texts for _ in range(call.options.n)], **common)
