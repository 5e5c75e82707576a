"""Closed-loop clients for measuring a router alone: they parse no more of an answer than where it ends, so that they
take little of a processor that the workers need.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

from ..proto import tandem_internal_v1_pb2 as internal
from ..proto import tandem_v1_pb2 as pb
from ..proto.tandem_internal_v1_pb2_grpc import WorkerStub
from ..proto.tandem_v1_pb2_grpc import TandemStub
from ..rpc import PROTOCOL_VERSION, open_channel

REQUEST_TIMEOUT_S = 30.0
_EVENT = b"data: {"
_LAST_CHUNK = b"0\r\n\r\n"
_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What every request asks for."""

    prompt_tokens: int
    output_tokens: int
    stream: bool = True


@dataclass(slots=True)
class Tally:
    """What came back."""

    requests: int = 0
    failed: int = 0
    events: int = 0
    """Writes that the client could tell apart: server-sent events, or gRPC messages."""
    ttfts_s: list[float] = field(default_factory=list)


Ask = Callable[[Tally], Awaitable[None]]
"""Sends one request, waits for its end and adds it to the tally."""


async def closed_loop(asks: list[Ask], seconds: float, tally: Tally) -> float:
    """Every one of `asks` sends its next request when its last one has ended, until `seconds` are over. Returns how
    long it took.
    """
    begun_s = time.perf_counter()

    async def run(ask: Ask) -> None:
        while time.perf_counter() - begun_s < seconds:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await ask(tally)

    async with asyncio.TaskGroup() as group:
        for ask in asks:
            group.create_task(run(ask))
    return time.perf_counter() - begun_s


class HttpConnection(asyncio.Protocol):
    """One keep-alive connection to `/v1/completions`."""

    def __init__(self, host: str, model: str, shape: Shape) -> None:
        body = json.dumps(
            {
                "model": model,
                "prompt": [97 + index % 26 for index in range(shape.prompt_tokens)],
                "max_tokens": shape.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": shape.stream,
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self._request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        self._stream = shape.stream
        self._transport: asyncio.WriteTransport | None = None
        self._done: asyncio.Future[None] | None = None
        self._received = bytearray()
        self._first_s = 0.0
        self._events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            text = bytes(self._received[:500]).decode("utf-8", "replace")
            self._done.set_exception(exc or ConnectionError(f"the router closed the connection; it had said {text!r}"))

    def data_received(self, data: bytes) -> None:
        """Counts events; the end is the last chunk, or as many bytes as the head says."""
        events = data.count(_EVENT)
        self._events += events
        if events and not self._first_s:
            self._first_s = time.perf_counter()
        self._received += data
        if self._done is not None and not self._done.done() and self._ended():
            self._done.set_result(None)
        elif self._first_s:
            del self._received[: -len(_LAST_CHUNK)]

    def _ended(self) -> bool:
        if self._first_s:
            return self._received.endswith(_LAST_CHUNK)
        head, found, body = bytes(self._received).partition(_HEAD_END)
        if not found or b"transfer-encoding: chunked" in head:
            return False
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return len(body) >= int(length.partition(b":")[2])

    async def ask(self, tally: Tally) -> None:
        """One request on this connection."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._first_s, self._events = 0.0, 0
        self._received.clear()
        begun_s = time.perf_counter()
        self._transport.write(self._request)
        await self._done
        tally.requests += 1
        tally.events += self._events
        if self._first_s:
            tally.ttfts_s.append(self._first_s - begun_s)
        elif self._stream or b" 200 " not in self._received[:16]:
            tally.failed += 1  # an error is no event

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.close()


async def http_asks(address: str, model: str, shape: Shape, count: int) -> tuple[list[Ask], Callable[[], None]]:
    """`count` connections, and what closes them."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: HttpConnection(address, model, shape), host, int(port)))[1]
        for _ in range(count)
    ]

    def close() -> None:
        for connection in connections:
            connection.close()

    return [connection.ask for connection in connections], close


class GrpcDoor:
    """Calls of `tandem.v1.Tandem/Generate` on a few channels."""

    def __init__(self, address: str, model: str, shape: Shape, channels: int = 4) -> None:
        self._channels = [open_channel(address) for _ in range(channels)]
        self._stubs = [TandemStub(channel) for channel in self._channels]
        self._request = pb.GenerateRequest(model=model)
        self._request.tokens.token_ids.extend(97 + index % 26 for index in range(shape.prompt_tokens))
        self._request.sampling.max_tokens = shape.output_tokens
        self._request.sampling.temperature = 0.0
        self._request.sampling.ignore_eos = True

    def asks(self, count: int) -> list[Ask]:
        """`count` callers, spread over the channels."""
        return [self._asker(self._stubs[index % len(self._stubs)]) for index in range(count)]

    def _asker(self, stub: TandemStub) -> Ask:
        async def ask(tally: Tally) -> None:
            begun_s, first_s, events = time.perf_counter(), 0.0, 0
            async for _ in stub.Generate(self._request, timeout=REQUEST_TIMEOUT_S):
                first_s = first_s or time.perf_counter()
                events += 1
            tally.requests += 1
            tally.events += events
            tally.ttfts_s.append(first_s - begun_s)

        return ask

    async def close(self) -> None:
        """Ends the channels."""
        for channel in self._channels:
            await channel.close()


async def direct_ttfts_s(address: str, epoch: int, shape: Shape, count: int) -> list[float]:
    """From a prompt's submission to its first token, asked of a prefill worker without a router, one by one."""
    ttfts_s: list[float] = []
    async with open_channel(address) as channel:
        stub = WorkerStub(channel)
        attach = internal.RouterFrame(router_id="bench", protocol_version=PROTOCOL_VERSION, epoch=epoch)
        frames = stub.Attach(iter([attach]))
        await frames.read()
        for index in range(count):
            sequence = internal.Sequence(
                request_id=f"direct-{index}",
                prefill_attempt=1,
                prompt_token_ids=[97 + place % 26 for place in range(shape.prompt_tokens)],
                sampling=internal.Sampling(max_tokens=shape.output_tokens),
                timeout_s=REQUEST_TIMEOUT_S,
                router_id="bench",
            )
            begun_s = time.perf_counter()
            call = stub.Prefill(
                internal.PrefillRequest(sequence=sequence, handoff=True, epoch=epoch), timeout=REQUEST_TIMEOUT_S
            )
            await frames.read()
            ttfts_s.append(time.perf_counter() - begun_s)
            await call
        frames.cancel()
    return ttfts_s
