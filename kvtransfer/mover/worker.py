"""What a worker has of its mover: the process's life, a `KVTransport` that pulls through it, and the answers to it.

The mover's end is the worker's end: whoever owns the worker hears of it (`on_lost`) and ends it as if its engine had
failed. That way nothing that was under way needs a second story: the worker's requests go on elsewhere. A mover that
does not answer is killed, which ends it the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from ...cluster.auth import MemberCredentials
from ...cluster.processors import processors
from .. import wire
from ..mapped.segment import SegmentError, have_shared_memory
from ..source import SourceDriver
from ..store import KVStore
from ..ticket import HandoffRefused, Hello, Peer, RefusalReason, Ticket
from ..transport import EndFrame, KVFrames, KVTransport, PullRequest, WrittenBlocks
from .link import CANCEL_S, Link
from .messages import Attach, Pull, decode_progress, encode_attach, encode_call, encode_pull, encode_run

log = logging.getLogger(__name__)

ATTACH_S = 60.0
"""From the start of the process: it imports gRPC first, on processors that may have other work."""
CALL_SLACK_S = 1.0
"""What the mover may add to a peer's time."""
PING_S, PONG_S = 2.0, 10.0
"""How often the mover is asked whether it lives, and how long it may take."""
STOP_S = 5.0


class MoverLost(ConnectionError):
    """The mover has ended, or did not start."""


class KVMover:
    """One mover process. `spawn`, `attach`, `listen`, `stop` in this order, on one event loop."""

    def __init__(self, process: subprocess.Popen[bytes], gift: socket.socket, *, cancel_s: float = CANCEL_S) -> None:
        """`cancel_s`: how long a call that was cancelled may take to end before the process is killed."""
        self._process = process
        self._gift = gift
        self._source: SourceDriver | None = None
        self._stopping = False
        self._pings: asyncio.Task[None] | None = None
        self.on_lost: Callable[[MoverLost], None] = lambda error: None
        """Called once, on the loop, when the mover ends before `stop`."""
        handlers = {"hello": self._hello, "pull": self._pull, "confirm": self._confirm, "abort": self._abort}
        self._link = Link("the KV mover", handlers, on_lost=self._link_lost, on_stuck=self._kill, cancel_s=cancel_s)
        self.transport: KVTransport = _MoverTransport(self._link)
        """Pulls into the attached memory."""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @classmethod
    async def spawn(cls, *, cancel_s: float = CANCEL_S) -> KVMover:
        """Starts the process, and does not wait for it. OSError if it cannot be started."""
        link, gift, process = _start()
        mover = cls(process, gift, cancel_s=cancel_s)
        await mover._link.join(link)
        return mover

    async def attach(self, store: KVStore, *, transport: str, credentials: MemberCredentials) -> None:
        """Gives it the KV memory; before anybody else is given it, and before its segment is published anew. Raises
        `MoverLost` where it cannot map it, or did not start. `transport`: as `WorkerConfig.transport`.
        """
        if store.segment is None or store.segment.in_device:
            raise MoverLost("the KV mover cannot map this device's memory")
        attach = Attach(
            layout=store.layout.to_bytes(),
            nonce=store.segment.nonce,
            transport=transport,
            credentials=credentials,
        )
        try:
            socket.send_fds(self._gift, [b"K"], [store.segment.lend()])
            await self._link.ask("attach", encode_attach(attach), timeout_s=ATTACH_S)
        except (HandoffRefused, SegmentError, OSError) as error:
            raise MoverLost(f"the KV mover did not start: {error}") from error
        self._pings = asyncio.create_task(self._ping())

    async def listen(self, source: SourceDriver, address: str) -> int:
        """Lets it serve what `source` decides at host:port (0: any free one); returns the port. RuntimeError if it
        cannot bind.
        """
        self._source = source
        try:
            return int(await self._link.ask("listen", address.encode(), timeout_s=ATTACH_S))
        except HandoffRefused as refused:
            raise RuntimeError(f"the KV port cannot be opened: {refused.message}") from refused

    async def stop(self) -> None:
        """Ends the process, and returns when it is gone; idempotent."""
        self._stopping = True
        if self._pings is not None:
            self._pings.cancel()
            await asyncio.gather(self._pings, return_exceptions=True)
        with contextlib.suppress(HandoffRefused):
            await self._link.ask("stop", b"", timeout_s=STOP_S)
        self._link.close()
        self._gift.close()
        try:
            await asyncio.to_thread(self._process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    # Within: its life

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            try:
                await self._link.ask("ping", b"", timeout_s=PONG_S)
            except HandoffRefused as refused:
                if refused.reason is RefusalReason.PEER_LOST:
                    return
                if refused.reason in (RefusalReason.DEADLINE, RefusalReason.LIMIT):
                    await asyncio.sleep(0)  # what has come while this process itself stood still is heard first
                    if self._link.silence_s >= PONG_S:
                        self._kill()
                        return

    def _kill(self) -> None:
        """It does not answer: whatever it holds under way ends with it."""
        log.error("the KV mover (process %d) does not answer and is killed", self.pid)
        self._process.kill()

    def _link_lost(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self.on_lost(MoverLost(f"the KV mover (process {self.pid}) has ended"))

    # Within: what peers ask, through it

    async def _hello(self, body: bytes) -> AsyncGenerator[bytes, None]:
        yield wire.encode_hello(await self._decider().hello(wire.decode_hello(body)))

    async def _pull(self, body: bytes) -> AsyncGenerator[bytes, None]:
        request = wire.decode_pull(body)
        unsent = b""
        async with aclosing(self._decider().open_pull(request, own_reader=True)) as items:
            async for item in items:
                if isinstance(item, EndFrame):
                    yield encode_run(unsent + wire.encode_end(item), time.monotonic())
                    return
                message = wire.encode_refs(request.ticket, item.first_block, item.refs)
                item.verify()
                if item.last:
                    unsent = message
                    continue
                yield encode_run(message, time.monotonic())

    async def _confirm(self, body: bytes) -> AsyncGenerator[bytes, None]:
        await self._decider().confirm(wire.decode_ticket(body))
        yield b""

    async def _abort(self, body: bytes) -> AsyncGenerator[bytes, None]:
        await self._decider().abort_ticket(wire.decode_ticket(body))
        yield b""

    def _decider(self) -> SourceDriver:
        assert self._source is not None, "the mover was not told to listen"
        return self._source


async def spawn_mover(kv_mover: str, *, computes: bool) -> KVMover | None:
    """A mover where `WorkerConfig.kv_mover` wants one; None: the worker's own loop moves its KV. `computes`: the device
    is not a paced one. OSError where it wants one that cannot be.
    """
    if kv_mover == "thread" or (kv_mover == "auto" and not _pays(computes)):
        return None
    if not have_shared_memory():
        raise OSError("kv_mover: 'process' needs memory that processes share (Linux's memfd); allowed here: thread")
    try:
        return await KVMover.spawn()
    except OSError as error:
        if kv_mover == "process":
            raise
        log.warning("no process can be started to move KV (%s): the worker's own loop does it", error)
        return None


async def attach_mover(
    mover: KVMover, kv_mover: str, store: KVStore, *, transport: str, credentials: MemberCredentials
) -> str:
    """As `KVMover.attach`. Where `auto` wanted the mover and it cannot do it, it is ended, and a line for the operator
    returned: the worker's own loop moves its KV. Empty: it is attached.
    """
    try:
        await mover.attach(store, transport=transport, credentials=credentials)
    except MoverLost as error:
        if kv_mover == "process":
            raise
        await mover.stop()
        return f"its own loop moves its KV, not a process beside it: {error}"
    return ""


def _pays(computes: bool) -> bool:
    """Whether `auto` means a process: it can share the memory, finds a processor beside the engine's, and the engine's
    steps are real. Paced workers are run by the dozen on a few processors.
    """
    return computes and processors() > 1 and have_shared_memory()


def _start() -> tuple[socket.socket, socket.socket, subprocess.Popen[bytes]]:
    """The process, and this end of its two sockets. It ends with the thread that calls this: the worker's loop's."""
    link, its_link = socket.socketpair()
    gift, its_gift = socket.socketpair()
    numbers = (its_link.fileno(), its_gift.fileno())
    # What this process imports from, and not the folder that it stands in.
    command = [sys.executable, "-P", "-m", "tandem.kvtransfer.mover.process", *map(str, numbers)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        # A group of its own: Ctrl-C is for the worker, which drains first.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers, process_group=0, env=paths)
    except BaseException:
        link.close()
        gift.close()
        raise
    finally:
        its_link.close()
        its_gift.close()
    return link, gift, process


class _MoverTransport(KVTransport):
    """Calls the mover, which calls the peer."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        return wire.decode_hello(await self._ask("hello", peer, wire.encode_hello(mine), timeout_s))

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        wanted = Pull(peer=peer, request=request, block_ids=request.into, timeout_s=timeout_s)
        async with aclosing(self._link.stream("pull", encode_pull(wanted))) as items:
            async for item in items:
                progress = decode_progress(item)
                if progress.count:
                    begin, now_s = progress.first_block - request.first_block, time.monotonic()
                    yield WrittenBlocks(
                        ticket=request.ticket,
                        first_block=progress.first_block,
                        block_ids=request.into[begin : begin + progress.count],
                        arrived_age_s=now_s - progress.arrived_s,
                        written_age_s=now_s - progress.written_s,
                    )
                if progress.end is not None:
                    yield progress.end
                    return
        raise HandoffRefused(RefusalReason.PEER_LOST, f"the pull from {peer.worker_id} ended before its end frame")

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._ask("confirm", peer, wire.encode_ticket(ticket), timeout_s)

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._ask("abort", peer, wire.encode_ticket(ticket), timeout_s)

    async def close(self) -> None:
        """The mover ends its own connections when it stops."""

    async def _ask(self, method: str, peer: Peer, message: bytes, timeout_s: float) -> bytes:
        return await self._link.ask(method, encode_call(peer, message, timeout_s), timeout_s=timeout_s + CALL_SLACK_S)
