"""One HTTP request and its answer in this API's terms: bounded body, strict JSON, OpenAI's error shape, server-sent
events, disconnects.

A client that goes away cancels its request at once, also while no token comes and also when nothing is streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from .body_budget import BodyBudget
from .errors import Overloaded, ServiceError
from .http_errors import error_headers, error_json
from .http_json import MAX_ECHOED_CHARS, encode_json, parse_json_object
from .http_message import ClientGone, Message

T = TypeVar("T")

BODY_TIMEOUT_S = 60.0
"""For a client to send its body."""
BODY_PART_TIMEOUT_S = 15.0
"""For the next part of it."""
DISCARD_FACTOR = 4
"""An oversized body is read up to this many times the limit, so that a client still sending can read the 413."""
ERROR_SEND_TIMEOUT_S = 5.0
JSON_CONTENT_TYPE = "application/json"
_JSON_BYTES = JSON_CONTENT_TYPE.encode()
_EVENT_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


class PayloadTooLarge(ServiceError):
    """The body is over `RouterConfig.max_body_bytes`."""

    http_status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class WrongContentType(ServiceError):
    """The body does not say that it is JSON."""

    http_status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class BodyTimeout(ServiceError):
    """The body, or its next part, did not come in time."""

    http_status = 408
    type = "timeout"
    code = "body_timeout"


class Exchange:
    """One request being answered. Whoever made it calls `close` in the end: it gives back what the body takes of
    `budget`.
    """

    def __init__(self, message: Message, *, max_body_bytes: int, budget: BodyBudget) -> None:
        self._message = message
        self._max_body_bytes = max_body_bytes
        self._budget = budget
        self._held_bytes = 0
        self.request_id = self.header("x-request-id") or ""

    @property
    def method(self) -> str:
        return self._message.method

    @property
    def path(self) -> str:
        """Percent-decoded, without the query."""
        return self._message.path

    @property
    def started(self) -> bool:
        """Whether the answer has begun."""
        return self._message.started

    @property
    def complete(self) -> bool:
        """Whether it has ended."""
        return self._message.complete

    @property
    def taking(self) -> bool:
        """Whether the client is there and takes what is written."""
        return self._message.taking

    def header(self, name: str) -> str | None:
        """A request header; None if absent."""
        value = self._message.headers.get(name.encode("ascii"))
        return None if value is None else value.decode("latin-1")

    def close(self) -> None:
        """The request is over. Idempotent."""
        self._budget.give_back(self._held_bytes)
        self._held_bytes = 0

    # -- the request ------------------------------------------------------------------------------------------------

    async def read_json(self) -> dict[str, Any]:
        """The body as a JSON object. WrongContentType, PayloadTooLarge, BodyTimeout, Overloaded, or InvalidRequest
        saying what is wrong with it.

        The type must be named: a page in a browser can send any other type, or none, to a router on the same machine
        without asking it first.
        """
        if self._message.headers.get(b"content-type") != _JSON_BYTES:
            self._check_type(self.header("content-type"))
        try:
            body = await self._read_body()
        except TimeoutError:
            raise BodyTimeout(
                f"the request's body did not arrive in time; allowed: {BODY_PART_TIMEOUT_S:g} s for its next part, "
                f"{BODY_TIMEOUT_S:g} s for all of it"
            ) from None
        return parse_json_object(body)

    @staticmethod
    def _check_type(content_type: str | None) -> None:
        if (content_type or "").partition(";")[0].strip().lower() != JSON_CONTENT_TYPE:
            shown = "is missing" if content_type is None else f"{content_type[:MAX_ECHOED_CHARS]!r} is no JSON"
            raise WrongContentType(f"content-type: {shown}; allowed: {JSON_CONTENT_TYPE}", param="content-type")

    async def _read_body(self) -> bytes:
        """TimeoutError."""
        declared = self.header("content-length")
        announced_bytes = int(declared) if declared is not None and declared.isdigit() else 0
        discard_limit_bytes = DISCARD_FACTOR * self._max_body_bytes
        if announced_bytes > discard_limit_bytes:
            raise self._too_large(announced_bytes)
        deadline_s: float | None = None
        parts: list[bytes] = []
        size_bytes, whole = 0, False
        while not whole:
            if self._message.readable:  # as most are from the start
                part, whole = await self._message.read()
            else:
                now_s = asyncio.get_running_loop().time()
                deadline_s = deadline_s or now_s + BODY_TIMEOUT_S
                async with asyncio.timeout_at(min(deadline_s, now_s + BODY_PART_TIMEOUT_S)):
                    part, whole = await self._message.read()
            size_bytes += len(part)
            if size_bytes <= self._max_body_bytes:
                self._budget.take(len(part))
                self._held_bytes += len(part)
                parts.append(part)
            if size_bytes > discard_limit_bytes:
                raise self._too_large(size_bytes)
        if size_bytes > self._max_body_bytes:
            raise self._too_large(size_bytes)
        return b"".join(parts)

    def _too_large(self, size_bytes: int) -> PayloadTooLarge:
        return PayloadTooLarge(f"the request's body has {size_bytes} bytes or more; allowed: {self._max_body_bytes}")

    async def until_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` in this task; the moment the client closes its connection `work` is canceled and ClientGone
        raised.
        """
        task = asyncio.current_task()
        assert task is not None
        message = self._message
        if message.gone:
            work.close()
            raise ClientGone
        message.tell = task.cancel
        try:
            return await work
        except asyncio.CancelledError:
            if message.gone:
                task.uncancel()
                raise ClientGone from None
            raise
        finally:
            message.tell = None

    # -- the answer -------------------------------------------------------------------------------------------------

    async def send_json(self, value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        await self.send_bytes(encode_json(value), JSON_CONTENT_TYPE, status=status, headers=headers)

    async def send_bytes(
        self, body: bytes, content_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole answer of any type; waits for a client that has not taken the one before."""
        if not self.taking:
            await self._message.drain()
        pairs = [(b"content-type", content_type.encode())]
        pairs += [(name.encode("ascii"), value.encode("latin-1")) for name, value in (headers or {}).items()]
        self._message.start(status, (*pairs, *self._echo()), len(body))
        self._message.end(body)

    def start_events(self) -> None:
        """Begins a stream of server-sent events; it leaves with the first of them."""
        self._message.start(200, (*_EVENT_HEADERS, *self._echo()), None)

    def write_events(self, events: bytes) -> None:
        """In one write. Never blocks: whoever writes much looks at `taking`, or waits in `drain`."""
        self._message.write(events)

    async def drain(self) -> None:
        """Waits for a client that takes its events slowly, until it does, or is gone."""
        if not self.taking:
            await self._message.drain()

    def end_events(self, events: bytes) -> None:
        """The last events, in one write with the stream's end."""
        self._message.end(events)

    async def fail(self, error: ServiceError) -> None:
        """Answers with an error: a status where nothing was sent yet, else a last event."""
        if self.complete:
            return
        async with asyncio.timeout(ERROR_SEND_TIMEOUT_S):
            if self.started:
                await self.drain()
                self.end_events(b"data: " + encode_json(error_json(error)) + b"\n\n")
                return
            if isinstance(error, PayloadTooLarge | BodyTimeout | WrongContentType | Overloaded):
                self._message.keep_alive = False  # what is left of the body is not a next request
            await self.send_json(error_json(error), status=error.http_status, headers=error_headers(error))

    def _echo(self) -> tuple[tuple[bytes, bytes], ...]:
        if not self.request_id:
            return ()
        return ((b"x-request-id", self.request_id[:MAX_ECHOED_CHARS].encode("latin-1", "replace")),)
