"""The load generator: sends requests when they are due, whatever the answers do, and notes when every piece came.

It shares the machine with what it measures, so it is thin: one asyncio protocol over httptools per request, which
stamps pieces of the stream as they arrive and reads them as JSON only after the end.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from ..tls import ClientTLS
from .datasets import BenchRequest
from .report import RequestRecord

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_LEAD_S = 0.05  # between drawing up the run and its first request


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to send. `endpoint` is CHAT or COMPLETIONS; token ids can only go to the latter."""

    base_url: str
    model: str
    endpoint: str = COMPLETIONS
    api_key: str | None = None
    tls: ClientTLS = field(default_factory=ClientTLS)
    temperature: float | None = None
    """None: the server's default."""
    timeout_s: float = 600.0
    secure: ssl.SSLContext | None = field(default=None, init=False, compare=False)
    """Read from `tls` once, not for each of thousands of requests."""
    headers: tuple[tuple[str, str], ...] = ()
    """More of them, for every request."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url: {self.base_url!r} is not allowed; allowed: http://host:port")
        if self.endpoint not in (CHAT, COMPLETIONS):
            raise ValueError(f"endpoint: {self.endpoint!r} is not allowed; allowed: {COMPLETIONS}, {CHAT}")
        object.__setattr__(self, "secure", self.tls.context_for(self.base_url))
        for name, value in self.headers:
            if not (name and (name + value).isascii() and (name + value).isprintable() and not set(name) & set(": ")):
                raise ValueError(f"header: {name!r}: {value!r} cannot be sent; allowed: a token, and printable ASCII")


class StreamFailed(Exception):
    """The request did not come to its proper end."""


class _Exchange(asyncio.Protocol):
    """One request and its streamed answer: events with the time at which their last byte came."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self.events: list[tuple[float, bytes]] = []
        self.status = 0
        self._request = request
        self._done = done
        self._buffer = b""
        self._now_s = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(StreamFailed(f"the answer is not HTTP ({error})"))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(StreamFailed(f"the connection ended early ({error})" if error else "the connection ended early"))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Called by the parser with every piece of the body."""
        *events, self._buffer = (self._buffer + body).split(b"\n\n")
        self.events.extend((self._now_s, event) for event in events)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._buffer.strip():
            self.events.append((self._now_s, self._buffer))
        self._end(None)

    def _end(self, error: StreamFailed | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)
        if self._transport is not None:
            self._transport.close()


async def send(target: Target, request: BenchRequest, due_s: float) -> RequestRecord:
    """Sends one request now and follows its answer to the end. Never raises for what the server does: see `error`."""
    wire = _wire(target, request)
    parts = urlsplit(target.base_url)
    secure = target.secure
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    exchange = _Exchange(wire, done)
    sent_s = time.monotonic()
    error = ""
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(target.timeout_s):
            port = parts.port or (443 if secure else 80)
            transport, _ = await loop.create_connection(lambda: exchange, parts.hostname or "", port, ssl=secure)
            await done
    except TimeoutError:
        error = f"no end within {target.timeout_s:g} s"
    except (OSError, StreamFailed) as failure:
        error = str(failure) or type(failure).__name__
    finally:
        if transport is not None:
            transport.close()
        if done.done() and not done.cancelled():
            done.exception()  # seen: an answer that broke off after the timeout is no surprise
    return read_events(exchange.status, exchange.events, error, due_s=due_s, sent_s=sent_s)


def read_events(
    status: int, events: Sequence[tuple[float, bytes]], error: str, *, due_s: float, sent_s: float
) -> RequestRecord:
    """Makes a record from the events of a stream, each with its time. Pure.

    A piece of output is an event with a choice that carries text or an end; the chat stream's opening event, which only
    names the role, is none. Output tokens are those of the usage event, or the pieces where the server sends none.
    """
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] = {}
    finished = False
    if status and status != 200:
        body = b"\n\n".join(event for _, event in events)
        error = error or f"HTTP {status}: {_error_message(body)}"
        events = ()
    for when_s, event in events:
        data = event.strip().removeprefix(b"data:").strip()
        if not data or data.startswith(b":"):
            continue
        if data == b"[DONE]":
            finished = True
            continue
        message = _event(data)
        if message is None:
            error = error or "an event is not what such a stream is made of"
            break
        if message.get("error"):
            error = error or _error_message(data)
            continue
        usage = message.get("usage") or usage
        for choice in message.get("choices") or ():
            delta = choice.get("delta")
            text = choice.get("text") if delta is None else delta.get("content")
            opening = delta is not None and "role" in delta and not text and not choice.get("finish_reason")
            if not opening:
                times.append(when_s)
                texts.append(text or "")
    if not error and not finished:
        error = "the stream had no end"
    return RequestRecord(
        due_s=due_s,
        sent_s=sent_s,
        first_token_s=times[0] if times else None,
        last_token_s=times[-1] if times else None,
        chunk_times_s=tuple(times),
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", len(times)),
        text="".join(texts),
        error=error,
    )


def _event(data: bytes) -> dict[str, Any] | None:
    """An event as an object, whose choices and usage have the types that such streams have; None: it is none."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    choices, usage = message.get("choices") or [], message.get("usage") or {}
    if not isinstance(choices, list) or not all(isinstance(part, dict) for part in [usage, *choices]):
        return None
    deltas = [choice if choice.get("delta") is None else choice["delta"] for choice in choices]
    if not all(isinstance(delta, dict) for delta in deltas):
        return None
    texts = [delta.get(name) for delta in deltas for name in ("text", "content")]
    counts = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    well_typed = all(isinstance(text, str | None) for text in texts) and all(type(count) is int for count in counts)
    return message if well_typed else None


async def run_load(
    target: Target,
    requests: Sequence[BenchRequest],
    arrivals_s: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[RequestRecord], None] | None = None,
) -> list[RequestRecord]:
    """Sends every request at its arrival time and returns the records in that order.

    The loop is open unless `max_concurrency` holds requests back; what it holds back shows as lateness.
    """
    room = asyncio.Semaphore(max_concurrency or len(requests))
    begin_s = time.monotonic() + _LEAD_S

    async def one(request: BenchRequest, due_s: float) -> RequestRecord:
        async with room:
            record = await send(target, request, due_s)
        if on_done is not None:
            on_done(record)
        return record

    async with asyncio.TaskGroup() as group:
        tasks = []
        for request, arrival_s in zip(requests, arrivals_s, strict=True):
            due_s = begin_s + arrival_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            while time.monotonic() < due_s:  # noqa: ASYNC110  (uvloop rounds to milliseconds, downwards too)
                await asyncio.sleep(0)
            tasks.append(group.create_task(one(request, due_s)))
    return [task.result() for task in tasks]


def _wire(target: Target, request: BenchRequest) -> bytes:
    """The HTTP request as bytes."""
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.endpoint == CHAT:
        if not isinstance(request.prompt, str):
            raise ValueError(f"endpoint: {CHAT} takes text, not token ids; use {COMPLETIONS}")
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    if request.ignore_eos:
        body["ignore_eos"] = True
    if target.temperature is not None:
        body["temperature"] = target.temperature
    data = json.dumps(body).encode()
    parts = urlsplit(target.base_url)
    head = [
        f"POST {parts.path.rstrip('/')}{target.endpoint} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(data)}",
        "Connection: close",
    ]
    if target.api_key:
        head.append(f"Authorization: Bearer {target.api_key}")
    head += [f"{name}: {value}" for name, value in target.headers]
    return "\r\n".join([*head, "", ""]).encode() + data


def _error_message(body: bytes) -> str:
    try:
        error = json.loads(body.strip().removeprefix(b"data:")).get("error")
    except (ValueError, AttributeError):
        return body[:200].decode("utf-8", "replace")
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message).split())
