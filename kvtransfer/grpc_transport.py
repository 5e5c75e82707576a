"""KV over gRPC, on its own port and channels: service `tandem.kv.v1.KV` with raw-byte messages of `kvtransfer.wire`.

Hello, Confirm, Abort are unary; Pull streams from the holder; Session, both ways, is `kvtransfer.collective`'s. A
refusal travels inside the stream as a REFUSED message, so that its reason survives; gRPC's own statuses mean that the
connection, the deadline or the version failed. Flow control is HTTP/2's: a reader that is slow to write holds the
sender, not memory. Every call but Session has a deadline, also at the server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol, cast

import grpc
import grpc.aio

from ..cluster.auth import OPEN, MemberCredentials
from . import wire
from .ticket import HandoffRefused, Hello, Peer, RefusalReason, Ticket
from .transport import MESSAGE_BYTES, BlockFrame, EndFrame, KVFrames, KVSource, KVTransport, PullRequest, RefFrame

log = logging.getLogger(__name__)

SERVICE = "tandem.kv.v1.KV"
MAX_PULL_S = 3600.0
"""Server's own bound on a pull, for clients that send no deadline, or a later one."""
MAX_CALL_S = 60.0
FRAME_BYTES = 2**20
LOOKAHEAD_BYTES = 8 * 2**20
"""What a pull may have on its way beyond what its reader has taken."""


def _options(block_bytes: int, message_bytes: int) -> list[tuple[str, int]]:
    """Both ends: bounds on messages, and pings that find a peer that vanished without a word within 15 s."""
    limit = wire.max_message_bytes(block_bytes, message_bytes)
    return [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        # HTTP/2 frames as big as messages, and room for a few messages of each stream while the reader writes: with
        # the defaults (16 KiB, 64 KiB) the processors are busy with framing and the sender with waiting.
        ("grpc.http2.max_frame_size", FRAME_BYTES),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
    ]


class Sessions(Protocol):
    """Whoever serves sessions between ranks."""

    async def serve(self, said: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]) -> None:
        """One session, until it is over."""


class GrpcKVServer:
    """Serves one `KVSource`. Create, start and stop on one event loop."""

    def __init__(
        self,
        source: KVSource,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        block_bytes: int,
        message_bytes: int = MESSAGE_BYTES,
        max_pulls: int = 4096,
        credentials: MemberCredentials = OPEN,
        sessions: Sessions | None = None,
    ) -> None:
        """`sessions`: serves those in which ranks of two workers meet (`kvtransfer.collective`)."""
        self._credentials = credentials
        self._sessions = sessions
        self._source = source
        self._host = host
        self._port = port
        self._block_bytes = block_bytes
        self._message_bytes = message_bytes
        self._max_pulls = max_pulls
        self._pulls = 0
        self._server: grpc.aio.Server | None = None

    @property
    def pulls(self) -> int:
        """Pull streams open now."""
        return self._pulls

    async def start(self) -> int:
        """Binds and serves; returns the port. RuntimeError if it cannot bind."""
        options = [
            *_options(self._block_bytes, self._message_bytes),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.so_reuseport", 0),
        ]
        server = self._credentials.server(options, self._max_pulls + 1024)
        handlers = {
            "Hello": grpc.unary_unary_rpc_method_handler(self._hello),
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull),
            "Confirm": grpc.unary_unary_rpc_method_handler(self._confirm),
            "Abort": grpc.unary_unary_rpc_method_handler(self._abort),
        }
        if self._sessions is not None:
            handlers["Session"] = grpc.stream_stream_rpc_method_handler(self._session)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self._credentials.listen(server, f"{self._host}:{self._port}")
        await server.start()
        self._server = server
        return port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuses new calls, gives open ones `grace_s`, then cancels them; idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)

    async def _hello(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            return wire.encode_hello(await self._source.hello(wire.decode_hello(data)))

        return await _answer(answer)

    async def _confirm(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            await self._source.confirm(wire.decode_ticket(data))
            return wire.encode_ack()

        return await _answer(answer)

    async def _abort(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            await self._source.abort_ticket(wire.decode_ticket(data))
            return wire.encode_ack()

        return await _answer(answer)

    async def _session(self, said: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        assert self._sessions is not None
        await self._sessions.serve(said, context.write)

    async def _pull(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """Writes messages until the end frame; a refusal is the last message. Cancelled when the reader goes away, or
        its deadline has come.
        """
        if self._pulls >= self._max_pulls:
            refusal = HandoffRefused(RefusalReason.LIMIT, f"{self._max_pulls} pulls are open")
            await context.write(wire.encode_refused(refusal))
            return
        self._pulls += 1
        try:
            async with _bounded(context):
                try:
                    await self._send(wire.decode_pull(data), context)
                except HandoffRefused as refusal:
                    await context.write(wire.encode_refused(refusal))
        finally:
            self._pulls -= 1

    async def _send(self, request: PullRequest, context: grpc.aio.ServicerContext) -> None:
        unsent = b""
        async with aclosing(self._source.open_pull(request)) as items:
            async for item in items:
                if isinstance(item, EndFrame):
                    await context.write(unsent + wire.encode_end(item))
                    return
                if request.mapped:
                    message = wire.encode_refs(request.ticket, item.first_block, item.refs)
                    if item.last:  # both in one message: another would cost as much as the first
                        item.verify()
                        unsent = message
                        continue
                else:
                    message = wire.encode_blocks(item.frames)
                item.verify()
                await context.write(message)


@asynccontextmanager
async def _bounded(context: grpc.aio.ServicerContext) -> AsyncGenerator[None, None]:
    """Ends a stream after `MAX_PULL_S` where its client's deadline, which gRPC keeps on both sides, does not before.

    A write may be under way then that the client does not take. gRPC takes no message beside it, but a status, where
    the stream's head is not part of that write.
    """
    left_s = context.time_remaining()
    if left_s is not None and left_s <= MAX_PULL_S:
        yield
        return
    await context.send_initial_metadata(())
    try:
        async with asyncio.timeout(MAX_PULL_S):
            yield
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the pull took too long")


async def _answer(answer: Callable[[], Awaitable[bytes]]) -> bytes:
    """The answer to a unary call, or its refusal as a message."""
    try:
        async with asyncio.timeout(MAX_CALL_S):
            return await answer()
    except HandoffRefused as refusal:
        return wire.encode_refused(refusal)


@dataclass(slots=True)
class _Channel:
    channel: grpc.aio.Channel
    calls: int = 0


class GrpcKVTransport(KVTransport):
    """Reader's end. Keeps one channel per peer address, at most `max_channels` idle ones."""

    def __init__(
        self,
        *,
        block_bytes: int,
        message_bytes: int = MESSAGE_BYTES,
        max_channels: int = 64,
        credentials: MemberCredentials = OPEN,
    ) -> None:
        self._credentials = credentials
        self._block_bytes = block_bytes
        self._message_bytes = message_bytes
        self._max_channels = max_channels
        self._channels: OrderedDict[str, _Channel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        return wire.decode_hello_reply(await self._call(peer, "Hello", wire.encode_hello(mine), timeout_s))

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        async with aclosing(self.messages(peer, request, timeout_s=timeout_s)) as messages:
            async for message in messages:
                frames = wire.decode_frames(message)
                if isinstance(frames[0], RefFrame):
                    raise HandoffRefused(RefusalReason.CORRUPT, "references came where bytes were due")
                if isinstance(frames[0], EndFrame):
                    yield replace(frames[0], transport="grpc")
                    return
                yield cast("tuple[BlockFrame, ...]", frames)
        raise _cut_short(peer)

    async def references(
        self, peer: Peer, request: PullRequest, *, timeout_s: float
    ) -> AsyncGenerator[tuple[RefFrame, ...] | EndFrame, None]:
        """Like `pull`, where the blocks come as references: `request.mapped` is set."""
        async with aclosing(self.messages(peer, request, timeout_s=timeout_s)) as messages:
            async for message in messages:
                came_s = time.monotonic()
                frames = wire.decode_frames(message)
                if isinstance(frames[0], BlockFrame):
                    raise HandoffRefused(RefusalReason.CORRUPT, "bytes came where references were due")
                refs = tuple(frame for frame in frames if isinstance(frame, RefFrame))
                if refs:
                    yield refs
                if isinstance(end := frames[-1], EndFrame):
                    # It was here while the blocks before it were copied.
                    age_s = end.prefill_end_age_s + time.monotonic() - came_s
                    yield replace(end, prefill_end_age_s=age_s)
                    return
        raise _cut_short(peer)

    async def messages(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """The messages of a pull as they come."""
        with self._channel(peer) as channel:
            method = channel.unary_stream(f"/{SERVICE}/Pull")
            call = method(wire.encode_pull(request), timeout=max(0.0, timeout_s))
            try:
                async for message in call:
                    yield message
            except grpc.aio.AioRpcError as error:
                raise _refusal_of(error, peer) from error
            finally:
                call.cancel()

    @contextmanager
    def session(self, peer: Peer) -> Iterator[tuple[AsyncIterator[bytes], Callable[[bytes], Awaitable[None]]]]:
        """A stream both ways, for as long as both live: what the peer says, and how to say something to it. The former
        raises `HandoffRefused`; the latter does nothing once the stream has ended.
        """
        with self._channel(peer) as channel:
            call = channel.stream_stream(f"/{SERVICE}/Session")()

            async def said() -> AsyncGenerator[bytes, None]:
                try:
                    async for message in call:
                        yield message
                except grpc.aio.AioRpcError as error:
                    raise _refusal_of(error, peer) from error

            async def say(message: bytes) -> None:
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(message)

            try:
                yield said(), say
            finally:
                call.cancel()

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        wire.decode_ack(await self._call(peer, "Confirm", wire.encode_ticket(ticket), timeout_s))

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        wire.decode_ack(await self._call(peer, "Abort", wire.encode_ticket(ticket), timeout_s))

    async def close(self) -> None:
        channels = [held.channel for held in self._channels.values()]
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)

    async def _call(self, peer: Peer, method: str, message: bytes, timeout_s: float) -> bytes:
        with self._channel(peer) as channel:
            try:
                answer: bytes = await channel.unary_unary(f"/{SERVICE}/{method}")(message, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                raise _refusal_of(error, peer) from error
        return answer

    @contextmanager
    def _channel(self, peer: Peer) -> Iterator[grpc.aio.Channel]:
        """The peer's channel, counted as in use."""
        held = self._channels.get(peer.kv_address)
        if held is None:
            options = [
                *_options(self._block_bytes, self._message_bytes),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 1000),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_retries", 0),
                ("grpc.enable_http_proxy", 0),
            ]
            held = self._channels[peer.kv_address] = _Channel(self._credentials.channel(peer.kv_address, options))
        self._channels.move_to_end(peer.kv_address)
        held.calls += 1
        try:
            yield held.channel
        finally:
            held.calls -= 1
            self._drop_idle()

    def _drop_idle(self) -> None:
        """Closes the least recently used idle channels beyond the bound: addresses of workers that are gone."""
        surplus = len(self._channels) - self._max_channels
        for address in [a for a, held in self._channels.items() if held.calls == 0][: max(0, surplus)]:
            task = asyncio.ensure_future(self._channels.pop(address).channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _cut_short(peer: Peer) -> HandoffRefused:
    return HandoffRefused(RefusalReason.PEER_LOST, f"{peer.worker_id} ended the stream before the end frame")


def _refusal_of(error: grpc.aio.AioRpcError, peer: Peer) -> HandoffRefused:
    """GRPC's status in this protocol's words."""
    code = error.code()
    reason = {
        grpc.StatusCode.DEADLINE_EXCEEDED: RefusalReason.DEADLINE,
        grpc.StatusCode.RESOURCE_EXHAUSTED: RefusalReason.LIMIT,
        grpc.StatusCode.UNIMPLEMENTED: RefusalReason.VERSION_MISMATCH,
    }.get(code, RefusalReason.PEER_LOST)
    return HandoffRefused(reason, f"{peer.worker_id} at {peer.kv_address}: {code.name}: {error.details()}")
