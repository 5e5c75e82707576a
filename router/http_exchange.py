"""One HTTP request and its answer on ASGI: bounded body, strict JSON, OpenAI's error shape, server-sent events,
disconnects.

Written on ASGI itself, not on Starlette's request and response classes, for two reasons: a client that goes away
must cancel its request at once, also while no token comes and also when nothing is streamed; and a stream costs one
`send` a delta.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.types import Message, Receive, Scope, Send

from .body_budget import MAX_HELD_BYTES, BodyBudget
from .errors import InvalidRequest, Overloaded, ServiceError
from .params import json_kind

T = TypeVar("T")

BODY_TIMEOUT_S = 60.0
"""For a client to send its body."""
BODY_PART_TIMEOUT_S = 15.0
"""For the next part of it."""
DISCARD_FACTOR = 4
"""An oversized body is read up to this many times the limit, so that a client still sending can read the 413."""
ERROR_SEND_TIMEOUT_S = 5.0
MAX_ECHOED_CHARS = 128
MAX_JSON_DEPTH = 64
"""Lists and objects inside each other; the deepest of a legitimate request (a tool's schema) stays well below."""
JSON_CONTENT_TYPE = "application/json"


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


class Gone:
    """Whether the client has left, told by its connection: a task that waits for ASGI's message costs every request."""

    __slots__ = ("seen", "tell")

    def __init__(self) -> None:
        self.seen = False
        self.tell: Callable[[], object] | None = None

    def leave(self) -> None:
        """The connection is lost. Once."""
        self.seen = True
        if self.tell is not None:
            self.tell()


GONE = "tandem.gone"
"""Where in an ASGI scope the connection puts it."""


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


def encode_json(value: object) -> bytes:
    """Compact JSON in UTF-8. What a client sent may be in it: integers beyond 64 bits and lone surrogates, which orjson
    refuses, go the long way.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def error_json(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": str(error.message),
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: ServiceError) -> dict[str, str]:
    """Retry-After (whole seconds, RFC 9110 §10.2.3) and OpenAI's retry-after-ms, where the error says when; a 429 that
    does not would be the same the next time, and says that to OpenAI's clients.
    """
    if error.retry_after_s is None:
        return {"x-should-retry": "false"} if error.http_status == 429 else {}
    retry_after_s = max(error.retry_after_s, 0.0)
    return {
        "retry-after": str(max(math.ceil(retry_after_s), 1)),
        "retry-after-ms": str(math.ceil(retry_after_s * 1000)),
    }


class Exchange:
    """One request being answered, on a connection that puts `GONE` into the scope.

    Whoever made it calls `close` in the end: it gives back what the body takes of `budget`.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, max_body_bytes: int, budget: BodyBudget | None = None
    ) -> None:
        self._receive = receive
        self._send = send
        self._gone: Gone = scope[GONE]
        self._max_body_bytes = max_body_bytes
        self._budget = budget or BodyBudget(MAX_HELD_BYTES)
        self._held_bytes = 0
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.started = False
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.request_id = self.header("x-request-id") or ""

    def header(self, name: str) -> str | None:
        """A request header; None if absent."""
        value = self._headers.get(name.encode("ascii"))
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
        content_type = self.header("content-type")
        if (content_type or "").partition(";")[0].strip().lower() != JSON_CONTENT_TYPE:
            shown = "is missing" if content_type is None else f"{content_type[:MAX_ECHOED_CHARS]!r} is no JSON"
            raise WrongContentType(f"content-type: {shown}; allowed: {JSON_CONTENT_TYPE}", param="content-type")
        try:
            body = await self._read_body(asyncio.get_running_loop().time() + BODY_TIMEOUT_S)
        except TimeoutError:
            raise BodyTimeout(
                f"the request's body did not arrive in time; allowed: {BODY_PART_TIMEOUT_S:g} s for its next part, "
                f"{BODY_TIMEOUT_S:g} s for all of it"
            ) from None
        return parse_json_object(body)

    async def _read_body(self, deadline_s: float) -> bytes:
        """`deadline_s`: on the loop's clock. TimeoutError."""
        loop = asyncio.get_running_loop()
        declared = self.header("content-length")
        announced_bytes = int(declared) if declared is not None and declared.isdigit() else 0
        discard_limit_bytes = DISCARD_FACTOR * self._max_body_bytes
        if announced_bytes > discard_limit_bytes:
            raise self._too_large(announced_bytes)
        parts: list[bytes] = []
        size_bytes = 0
        while True:
            async with asyncio.timeout_at(min(deadline_s, loop.time() + BODY_PART_TIMEOUT_S)):
                message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size_bytes += len(part)
            if size_bytes <= self._max_body_bytes:
                self._budget.take(len(part))
                self._held_bytes += len(part)
                parts.append(part)
            if size_bytes > discard_limit_bytes:
                raise self._too_large(size_bytes)
            if not message.get("more_body", False):
                break
        if size_bytes > self._max_body_bytes:
            raise self._too_large(size_bytes)
        return b"".join(parts)

    def _too_large(self, size_bytes: int) -> PayloadTooLarge:
        return PayloadTooLarge(f"the request's body has {size_bytes} bytes or more; allowed: {self._max_body_bytes}")

    async def until_gone(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs `work` in this task; the moment the client closes its connection `work` is canceled and ClientGone
        raised.

        Call it after the body was read: until then a message may be part of it.
        """
        task = asyncio.current_task()
        assert task is not None
        gone = self._gone
        if gone.seen:
            raise ClientGone
        gone.tell = task.cancel
        try:
            return await work()
        except asyncio.CancelledError:
            if gone.seen:
                task.uncancel()
                raise ClientGone from None
            raise
        finally:
            gone.tell = None

    # -- the answer -------------------------------------------------------------------------------------------------

    async def send_json(self, value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        await self.send_bytes(encode_json(value), "application/json", status=status, headers=headers)

    async def send_bytes(
        self, body: bytes, content_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole answer of any type."""
        await self._start(status, {"content-type": content_type, "content-length": str(len(body)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def start_events(self) -> None:
        """Begins a stream of server-sent events."""
        await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def send_events(self, events: bytes) -> None:
        """In one write."""
        if events:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_events(self, *, done: bool) -> None:
        """Ends the stream; with OpenAI's `[DONE]` where it was complete."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if done else b""})

    async def fail(self, error: ServiceError) -> None:
        """Answers with an error: a status where nothing was sent yet, else a last event."""
        async with asyncio.timeout(ERROR_SEND_TIMEOUT_S):
            if self.started:
                await self.send_events(b"data: " + encode_json(error_json(error)) + b"\n\n")
                await self.end_events(done=False)
                return
            headers = error_headers(error)
            if isinstance(error, PayloadTooLarge | BodyTimeout | WrongContentType | Overloaded):
                headers["connection"] = "close"  # what is left of the body is not a next request
            await self.send_json(error_json(error), status=error.http_status, headers=headers)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        pairs = [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
        if self.request_id:
            pairs.append((b"x-request-id", self.request_id[:MAX_ECHOED_CHARS].encode("latin-1", "replace")))
        message: Message = {"type": "http.response.start", "status": status, "headers": pairs}
        await self._send(message)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) that UTF-8 can carry: no NaN, no infinity, no lone surrogates, no key twice in one
    object, at most MAX_JSON_DEPTH levels. InvalidRequest otherwise.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
            check_depth(value)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"body: not UTF-8 at byte {error.start}; allowed: a JSON object in UTF-8") from None
    except RecursionError:
        raise InvalidRequest(f"body: JSON nested too deeply; allowed: {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise InvalidRequest(f"body: not valid JSON: {error}; allowed: a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"body: is {json_kind(value)}; allowed: a JSON object")
    if b"\\u" in body:  # only an escape can smuggle one in
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("body: has a lone surrogate (\\ud800 to \\udfff); allowed: Unicode text") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0][:MAX_ECHOED_CHARS]!r} comes twice in one object")
    return value


def check_depth(value: object, levels: int = MAX_JSON_DEPTH) -> None:
    """RecursionError where lists and objects are nested deeper than `levels`: what reads them afterwards recurses."""
    layer = [value]
    while layer:
        if levels < 0:
            raise RecursionError
        levels -= 1
        inside: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                inside.extend(child for child in item.values() if isinstance(child, dict | list))
            elif isinstance(item, list):
                inside.extend(child for child in item if isinstance(child, dict | list))
        layer = inside
