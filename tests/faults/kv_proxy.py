"""A man in the middle of one decode worker's KV calls: a real gRPC server that passes `tandem.kv.v1.KV` on to the real
holder, message by message, and holds, changes, repeats or drops what a test wants.

Messages are raw bytes on both sides. BLOCKS and REFS messages are passed on one block at a time, which the protocol
allows, so that a test can name the frame it means. Metadata of a call is passed on unchanged.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
from grpc import aio
from tandem.cluster.types import BlockRef
from tandem.kvtransfer import wire
from tandem.kvtransfer.grpc_transport import SERVICE
from tandem.kvtransfer.ticket import HandoffRefused
from tandem.kvtransfer.transport import EndFrame, RefFrame

CALL_S = 60.0


class What(enum.StrEnum):
    """Messages that can be held or tampered with, in the order of a handoff."""

    HELLO = "hello"
    HELLO_REPLY = "hello_reply"
    PULL = "pull"
    BLOCK = "block"
    END = "end"
    REFUSED = "refused"
    CONFIRM = "confirm"
    ABORT = "abort"


class Cut(Exception):
    """The connection breaks here."""


class EndOfStream(Exception):
    """The stream ends here, without an error."""


class Lost(Exception):
    """Nothing is ever heard of this message again."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message on its way: the `number`-th of its kind through this proxy, from 0."""

    what: What
    number: int
    data: bytes


class Tamper:
    """What is done to messages on their way. The default passes them on."""

    delay_s = 0.0
    """Before each message."""

    def change(self, message: Message) -> list[bytes]:
        """What is sent instead; [] drops it. May raise `Cut`, `EndOfStream` or `Lost`."""
        return [message.data]


class KVProxy:
    """Stands for one holder at an address of its own. `hold` a kind of message, and it waits until `let_go`."""

    def __init__(self, target: str, tamper: Tamper | None = None) -> None:
        self.target = target
        self.tamper = tamper or Tamper()
        self.seen: Counter[What] = Counter()
        """Messages that have come this far, held ones included."""
        self.refusals: list[str] = []
        """Reasons with which the holder ended pulls."""
        self.address = ""
        self._gates = {what: asyncio.Event() for what in What}
        self._allowed: Counter[What] = Counter()
        self._numbers: Counter[What] = Counter()
        self._server: aio.Server | None = None
        self._channel = aio.insecure_channel(target, options=(("grpc.use_local_subchannel_pool", 1),))
        self.let_go()

    async def start(self) -> None:
        """Binds a free port of loopback."""
        server = aio.server(options=(("grpc.so_reuseport", 0),))
        handlers = {
            "Hello": grpc.unary_unary_rpc_method_handler(self._hello),
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull),
            "Confirm": grpc.unary_unary_rpc_method_handler(self._confirm),
            "Abort": grpc.unary_unary_rpc_method_handler(self._abort),
            "Session": grpc.stream_stream_rpc_method_handler(self._session),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._server = server
        self.address = f"127.0.0.1:{port}"

    async def close(self) -> None:
        """Breaks what still passes; idempotent."""
        self.let_go()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
            await self._channel.close()

    def hold(self, what: What, after: int = 0) -> None:
        """From now on messages of this kind wait, but for `after` more of them."""
        self._gates[what].clear()
        self._allowed[what] = after

    def let_go(self) -> None:
        """Everything passes."""
        for gate in self._gates.values():
            gate.set()

    # The calls

    async def _hello(self, data: bytes, context: aio.ServicerContext) -> bytes:
        reply = await self._unary(What.HELLO, "Hello", data, context)
        changed = await self._pass(What.HELLO_REPLY, reply, context)
        return changed[0]

    async def _confirm(self, data: bytes, context: aio.ServicerContext) -> bytes:
        return await self._unary(What.CONFIRM, "Confirm", data, context)

    async def _abort(self, data: bytes, context: aio.ServicerContext) -> bytes:
        return await self._unary(What.ABORT, "Abort", data, context)

    async def _unary(self, what: What, method: str, data: bytes, context: aio.ServicerContext) -> bytes:
        """Every message that comes out of the tampering is sent on; the last one's answer is the answer."""
        reply = b""
        for message in await self._pass(what, data, context):
            call = self._channel.unary_unary(f"/{SERVICE}/{method}")
            try:
                reply = await call(message, timeout=CALL_S, metadata=_metadata(context))
            except aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
        return reply

    async def _pull(self, data: bytes, context: aio.ServicerContext) -> None:
        try:
            for request in await self._pass(What.PULL, data, context):
                async for what, part in self._parts(request, context):
                    for out in await self._pass(what, part, context):
                        await context.write(out)
        except EndOfStream:
            return

    async def _session(self, said: AsyncIterator[bytes], context: aio.ServicerContext) -> None:
        """Passes as it is: what comes of it is bytes between ranks, which nobody stands amid."""
        call = self._channel.stream_stream(f"/{SERVICE}/Session")(said, metadata=_metadata(context))
        try:
            async for message in call:
                await context.write(message)
        except aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        finally:
            call.cancel()

    async def _parts(self, request: bytes, context: aio.ServicerContext) -> AsyncIterator[tuple[What, bytes]]:
        call = self._channel.unary_stream(f"/{SERVICE}/Pull")(request, timeout=CALL_S, metadata=_metadata(context))
        try:
            async for message in call:
                try:
                    frames = wire.decode_frames(message)
                except HandoffRefused as refusal:
                    self.refusals.append(refusal.reason.value)
                    yield What.REFUSED, message
                    continue
                for frame in frames:
                    if isinstance(frame, EndFrame):
                        yield What.END, wire.encode_end(frame)
                    elif isinstance(frame, RefFrame):
                        ref = BlockRef(frame.block_id, frame.generation)
                        yield What.BLOCK, wire.encode_refs(frame.ticket, frame.block_index, [ref])
                    else:
                        yield What.BLOCK, wire.encode_blocks([frame])
        except aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        finally:
            call.cancel()

    async def _pass(self, what: What, data: bytes, context: aio.ServicerContext) -> list[bytes]:
        """Waits at the gate, then tampers."""
        await asyncio.sleep(self.tamper.delay_s)
        self.seen[what] += 1
        gate = self._gates[what]
        if not gate.is_set():
            if self._allowed[what] > 0:
                self._allowed[what] -= 1
            else:
                await gate.wait()
        number = self._numbers[what]
        self._numbers[what] += 1
        try:
            return self.tamper.change(Message(what, number, data))
        except Cut:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was cut")
            raise AssertionError("context.abort returned") from None
        except Lost:
            await asyncio.sleep(CALL_S)
            raise


def _metadata(context: aio.ServicerContext) -> tuple[tuple[str, str | bytes], ...]:
    """The call's metadata without what gRPC itself adds."""
    own = ("user-agent", "grpc-", ":")
    return tuple((key, value) for key, value in context.invocation_metadata() or () if not key.startswith(own))
