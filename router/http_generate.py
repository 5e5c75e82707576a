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
from collections.abc import Mapping
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

DONE = b"data: [DONE]\n\n"
"""OpenAI's last event of a stream that is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A call that can run."""

    requests: tuple[GenerateRequest, ...]
    responder: Responder
    n: int
    stream: bool
    include_usage: bool
    due_s: float
    """When the client must have taken the answer, on the door's clock."""
    usage: Usage


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
        await exchange.until_gone(self._run(exchange, body))

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
        return _Prepared(
            requests=requests,
            responder=responder,
            n=options.n,
            stream=call.stream,
            include_usage=call.include_usage,
            due_s=arrival_s + timeout_s + DEADLINE_GRACE_S,
            usage=Usage(prompt_tokens=sum(map(len, prompts))),
        )

    def _promise(self, exchange: Exchange) -> Promise:
        values = {
            HEADERS.slo_class: exchange.header(HEADERS.slo_class),
            HEADERS.ttft_ms: number_of(exchange.header(HEADERS.ttft_ms)),
            HEADERS.tpot_ms: number_of(exchange.header(HEADERS.tpot_ms)),
        }
        return parse_promise(Fields(values), self._slo_classes, HEADERS)

    async def _run(self, exchange: Exchange, body: Mapping[str, Any]) -> None:
        prepared = await self._prepare(exchange, body)
        answer = _Stream(exchange, prepared) if prepared.stream else _Whole(exchange, prepared)
        broken: list[Exception] = []

        def tap(delta: Delta) -> bool:
            if not exchange.taking or broken:
                return False
            try:
                answer.take(delta.choice, delta)
            except Exception as error:
                broken.append(error)
                return False  # the delta comes again below, where the error is raised
            return True

        async with aclosing(self._door.run_all(prepared.requests, tap)) as deltas:
            async for prompt, delta in deltas:
                if broken:
                    raise broken[0]
                answer.take(prompt * prepared.n + delta.choice, delta)
                if not (exchange.taking or exchange.complete):
                    await self._wait_for_client(exchange, prepared.due_s)
        await answer.end()

    async def _wait_for_client(self, exchange: Exchange, due_s: float) -> None:
        """The service keeps the request's deadline; this is for a client that takes its answer too slowly or not at
        all.
        """
        try:
            async with asyncio.timeout(due_s - self._door.now_s()):
                await exchange.drain()
        except TimeoutError:
            raise DeadlineExceeded("the answer was not taken within the request's time") from None


class _Whole:
    """An answer that leaves when it is complete."""

    def __init__(self, exchange: Exchange, prepared: _Prepared) -> None:
        self._exchange = exchange
        self._responder = prepared.responder
        self._usage = prepared.usage

    def take(self, choice: int, delta: Delta) -> None:
        """Keeps it."""
        self._usage.add(delta)
        self._responder.collect(choice, delta)

    async def end(self) -> None:
        """Sends all of it."""
        await self._exchange.send_json(self._responder.body(self._usage))


class _Stream:
    """An answer that leaves as it comes. The client is told the end with the last choice's last delta: it need not wait
    until the service has put its things away.
    """

    def __init__(self, exchange: Exchange, prepared: _Prepared) -> None:
        self._exchange = exchange
        self._responder = prepared.responder
        self._usage = prepared.usage
        self._include_usage = prepared.include_usage
        self._choices = self._unfinished = len(prepared.requests) * prepared.n

    def take(self, choice: int, delta: Delta) -> None:
        """Sends it in one write, with what belongs before the first one and behind the last."""
        self._usage.add(delta)
        events = self._responder.events(choice, delta)
        if not self._exchange.started:
            self._exchange.start_events()
            events = server_sent(self._responder.opening_chunks(self._choices)) + events
        if delta.finish_reason is None:
            self._exchange.write_events(events)
            return
        self._unfinished -= 1
        if self._unfinished:
            self._exchange.write_events(events)
            return
        if self._include_usage:
            events += server_sent([self._responder.usage_chunk(self._usage)])
        self._exchange.end_events(events + DONE)

    async def end(self) -> None:
        """The service has nothing more to say."""
        if not self._exchange.complete:
            raise ServiceError("the service ended without an answer")


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
