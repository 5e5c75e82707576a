"""The mover: a process beside a worker that moves its KV. `python -m tandem.kvtransfer.mover.process LINK GIFT`, with
the descriptors of two sockets, is started by `kvtransfer.mover.worker` and ends with its worker.

1. `attach`: it maps the worker's KV memory, whose descriptor came through the second socket.
2. `pull`: it pulls a peer's blocks as a worker without a mover would, over gRPC or out of the peer's mapped memory,
   checks them, and writes them where the worker says. Nothing else is ever written. When the call has ended, so has the
   writing.
3. `listen`: it serves the worker's KV port. What may be read, and when, it asks the worker for each pull
   (`_Forwarded`), which answers with references; the bytes it copies out of the mapped memory, under the rule of every
   mapped reader: generations are compared before and after the copy (`kvtransfer.mapped.segment`).

It decides nothing and holds nothing: tickets, leases, credits, blocks are the worker's.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import uvloop

from ...cluster.auth import MemberCredentials
from ...cluster.parent import die_with_parent
from ...cluster.types import BlockRef
from .. import wire
from ..freed_memory import keep_freed_memory
from ..grpc_transport import GrpcKVServer, GrpcKVTransport
from ..layout import KVLayout
from ..mapped.blocks import HostMapper, frames_of
from ..mapped.segment import MappedSegment, take
from ..mapped.transport import MappedKVTransport
from ..ticket import HandoffRefused, Hello, RefusalReason, Ticket
from ..transport import (
    MESSAGE_BYTES,
    BlockFrame,
    BlockRun,
    EndFrame,
    KVSource,
    KVTransport,
    PullRequest,
    RefFrame,
    WrittenBlocks,
)
from .link import Link
from .messages import (
    Progress,
    Pull,
    decode_attach,
    decode_call,
    decode_pull,
    decode_run,
    encode_progress,
)

log = logging.getLogger(__name__)

ASK_S = 60.0
"""How long the worker may take to answer what a peer asks it; the peer's own deadline is shorter."""
SILENCE_S, LOOK_S = 15.0, 1.0
"""A worker that says nothing for so long (it is stopped, it speaks every 2 s) is lost to its peers, as it would be
without a mover by gRPC's pings; how often that is looked at."""
ROOM_BYTES = 4 * 2**20
"""What pages are found for in one turn of the loop: about half a millisecond."""
TELL_BYTES = 64 * 2**20
"""The worker hears of so many written bytes at a time, and of the rest with the end: each time wakes it up."""


class Mover:
    """What the process does, on its one event loop."""

    def __init__(self, gift: socket.socket, on_lost: Callable[[], None]) -> None:
        """`gift`: where the memory's descriptor comes from. `on_lost`: the worker has ended, or wants no mover more."""
        self._gift = gift
        self._segment: MappedSegment | None = None
        self._transport: KVTransport | None = None
        self._credentials = MemberCredentials()
        self._server: GrpcKVServer | None = None
        handlers = {
            "attach": self._attach,
            "listen": self._listen,
            "hello": self._hello,
            "pull": self._pull,
            "confirm": self._confirm,
            "abort": self._abort,
            "stop": self._stop,
            "ping": self._ping,
        }
        self.link = Link("the worker", handlers, on_lost=on_lost)

    async def _attach(self, body: bytes) -> AsyncGenerator[bytes, None]:
        attach = decode_attach(body)
        _, (fd,), _, _ = socket.recv_fds(self._gift, 1, 1)
        layout = KVLayout.from_bytes(attach.layout)
        self._segment = take(fd, nonce=attach.nonce, epoch=0, layout=layout, writable=True)
        self._credentials = attach.credentials
        control = GrpcKVTransport(block_bytes=layout.block_bytes, credentials=attach.credentials)
        self._transport = control
        if attach.transport != "grpc":
            mapper = HostMapper(layout, self._segment.blocks)
            self._transport = MappedKVTransport(control, layout, mapper=mapper, required=attach.transport == "mapped")
        yield b""

    async def _listen(self, body: bytes) -> AsyncGenerator[bytes, None]:
        """`body`: host:port; answers with the port."""
        segment = self._memory()
        host, _, port = body.decode().rpartition(":")
        source = _Forwarded(self.link, segment)
        self._server = GrpcKVServer(
            source, host, int(port), block_bytes=segment.block_bytes, credentials=self._credentials
        )
        try:
            yield str(await self._server.start()).encode()
        except RuntimeError as error:
            raise HandoffRefused(RefusalReason.INVALID, str(error)) from error

    async def _hello(self, body: bytes) -> AsyncGenerator[bytes, None]:
        call = decode_call(body)
        mine = wire.decode_hello(call.message)
        yield wire.encode_hello(await self._peers().hello(call.peer, mine, timeout_s=call.timeout_s))

    async def _confirm(self, body: bytes) -> AsyncGenerator[bytes, None]:
        call = decode_call(body)
        await self._peers().confirm(call.peer, wire.decode_ticket(call.message), timeout_s=call.timeout_s)
        yield b""

    async def _abort(self, body: bytes) -> AsyncGenerator[bytes, None]:
        call = decode_call(body)
        await self._peers().abort(call.peer, wire.decode_ticket(call.message), timeout_s=call.timeout_s)
        yield b""

    async def _pull(self, body: bytes) -> AsyncGenerator[bytes, None]:
        pull = decode_pull(body)
        writer = _Writer(pull, self._memory())
        task = asyncio.create_task(writer.run(self._peers()))
        task.add_done_callback(lambda _: writer.news.set())
        try:
            while True:
                await writer.news.wait()
                writer.news.clear()
                # One piece of news may stand for two: blocks that were written, and a failure behind them.
                if writer.ended or writer.untold_bytes >= TELL_BYTES:
                    progress = writer.tell()
                    yield encode_progress(progress)
                    if progress.end is not None:
                        return
                if task.done() and not writer.ended:
                    await task  # it did not come to the end, and says why
                    return
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _stop(self, body: bytes) -> AsyncGenerator[bytes, None]:
        if self._server is not None:
            await self._server.stop()
        if self._transport is not None:
            await self._transport.close()
        yield b""

    async def _ping(self, body: bytes) -> AsyncGenerator[bytes, None]:
        yield b""

    def _memory(self) -> MappedSegment:
        assert self._segment is not None, "the worker attaches its memory first"
        return self._segment

    def _peers(self) -> KVTransport:
        assert self._transport is not None, "the worker attaches its memory first"
        return self._transport


class _Writer:
    """One pull into the worker's memory."""

    def __init__(self, pull: Pull, memory: MappedSegment) -> None:
        self._pull = pull
        self._memory = memory
        self._told = self._written = 0
        """Blocks."""
        self._arrived_s = self._written_s = 0.0
        self._end: EndFrame | None = None
        self.news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """The end of the pull came."""
        return self._end is not None

    @property
    def untold_bytes(self) -> int:
        """Written since `tell`."""
        return (self._written - self._told) * self._memory.block_bytes

    def tell(self) -> Progress:
        """What was written since it was last asked."""
        first, self._told = self._told, self._written
        return Progress(
            first_block=self._pull.request.first_block + first,
            count=self._written - first,
            arrived_s=self._arrived_s,
            written_s=self._written_s,
            end=self._end,
        )

    async def run(self, transport: KVTransport) -> None:
        """Writes until the end came. `HandoffRefused`: why it did not."""
        pull = self._pull
        await self._make_room()
        request = replace(pull.request, into=pull.block_ids)
        async with aclosing(transport.pull(pull.peer, request, timeout_s=pull.timeout_s)) as frames:
            async for came in frames:
                if isinstance(came, EndFrame):
                    self._end = came
                    return
                if isinstance(came, WrittenBlocks):
                    self._take_written(came)
                else:
                    self._write(came)
                self.news.set()

    async def _make_room(self) -> None:
        """Finds the pages of all blocks while prefill computes, not when its KV is here; others have their turns."""
        block_ids = self._pull.block_ids
        most = max(1, ROOM_BYTES // self._memory.block_bytes)
        for start in range(0, len(block_ids), most):
            self._memory.populate(block_ids[start : start + most])
            await asyncio.sleep(0)

    def _write(self, frames: Sequence[BlockFrame]) -> None:
        """Checks blocks that came together and writes them; `HandoffRefused` if they are not those that were due."""
        now_s = time.monotonic()
        wire.check_blocks(frames, self._memory.block_bytes, checksum=self._pull.request.checksum)
        due = self._pull.request.first_block + self._written
        block_ids = self._pull.block_ids[self._written : self._written + len(frames)]
        in_order = [frame.block_index for frame in frames] == list(range(due, due + len(frames)))
        ours = all(frame.ticket == self._pull.request.ticket for frame in frames)
        if not in_order or not ours or len(block_ids) != len(frames):
            raise HandoffRefused(RefusalReason.CORRUPT, f"not the blocks of {self._pull.request.ticket.decode_key}")
        for block_id, frame in zip(block_ids, frames, strict=True):
            self._memory.block(block_id)[:] = frame.payload
        wire.verify_copies(frames)
        self._count(len(frames), now_s, time.monotonic())

    def _take_written(self, came: WrittenBlocks) -> None:
        """Blocks that the transport has checked and written; `HandoffRefused` if they are not those that were due."""
        now_s, due = time.monotonic(), self._pull.request.first_block + self._written
        targets = self._pull.block_ids[self._written : self._written + len(came.block_ids)]
        if (came.ticket, came.first_block, came.block_ids) != (self._pull.request.ticket, due, targets):
            raise HandoffRefused(RefusalReason.CORRUPT, f"not the blocks of {self._pull.request.ticket.decode_key}")
        self._count(len(targets), now_s - came.arrived_age_s, now_s - came.written_age_s)

    def _count(self, blocks: int, arrived_s: float, written_s: float) -> None:
        if self._told == self._written:
            self._arrived_s = arrived_s
        self._written += blocks
        self._written_s = written_s


class _Forwarded(KVSource):
    """The worker's `KVSource` as the mover's KV server has it: decisions are asked for, bytes are read here."""

    def __init__(self, link: Link, memory: MappedSegment) -> None:
        self._link = link
        self._memory = memory
        self._most = min(wire.MAX_BLOCKS_PER_MESSAGE, max(1, MESSAGE_BYTES // memory.block_bytes))

    async def hello(self, theirs: Hello) -> Hello:
        return wire.decode_hello(await self._link.ask("hello", wire.encode_hello(theirs), timeout_s=ASK_S))

    async def open_pull(self, request: PullRequest) -> AsyncGenerator[BlockRun | EndFrame, None]:
        async with aclosing(self._link.stream("pull", wire.encode_pull(request))) as items:
            async for item in items:
                came_s = time.monotonic()
                refs, end = decode_run(item, came_s)
                most = max(1, len(refs)) if request.mapped else self._most
                for start in range(0, len(refs), most):
                    run = self._run_of(request, refs[start : start + most])
                    yield replace(run, last=end is not None and start + most >= len(refs))
                if end is not None:
                    age_s = end.prefill_end_age_s + time.monotonic() - came_s
                    yield replace(end, prefill_end_age_s=age_s)
                    return

    async def confirm(self, ticket: Ticket) -> None:
        await self._link.ask("confirm", wire.encode_ticket(ticket), timeout_s=ASK_S)

    async def abort_ticket(self, ticket: Ticket) -> None:
        await self._link.ask("abort", wire.encode_ticket(ticket), timeout_s=ASK_S)

    def _run_of(self, request: PullRequest, refs: Sequence[RefFrame]) -> BlockRun:
        """Blocks to be copied out of the memory now, or only named where the peer reads them by itself."""
        first, named = refs[0].block_index, tuple(BlockRef(ref.block_id, ref.generation) for ref in refs)
        if request.mapped:
            return BlockRun(first_block=first, frames=(), refs=named, verify=lambda: None)
        frames = frames_of(self._memory, refs)
        verify = frames[0].verify
        assert verify is not None
        if request.checksum:
            frames = tuple(replace(frame, checksum=wire.checksum_of(frame)) for frame in frames)
        return BlockRun(first_block=first, frames=frames, refs=named, verify=verify)


async def _serve(link_fd: int, gift_fd: int) -> None:
    # Without its worker it is of no use: what it was doing, nobody wants any more.
    mover = Mover(socket.socket(fileno=gift_fd), on_lost=lambda: os._exit(0))
    await mover.link.join(socket.socket(fileno=link_fd))
    gc.freeze()
    while True:
        await asyncio.sleep(LOOK_S)
        if mover.link.silence_s > SILENCE_S:
            mover.link.give_up()


def main(arguments: Sequence[str]) -> None:
    """Runs until the link ends. `arguments`: the descriptors of the two sockets."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the worker, which drains and then ends the link
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=os.environ.get("TANDEM_LOG", "WARNING").upper(), format="%(asctime)s %(name)s %(message)s"
    )
    keep_freed_memory()
    link_fd, gift_fd = map(int, arguments)
    uvloop.run(_serve(link_fd, gift_fd))


if __name__ == "__main__":
    main(sys.argv[1:])
