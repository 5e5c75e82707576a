"""The router's connection to one life (epoch) of one worker.

One stream brings everything that worker says to this router; `subscribe` names an inbox for one attempt. The
same stream carries commands up and their answers down (`router.commands`). When it breaks, every subscriber is told at
once (`LinkLost` in its inbox): the worker has ended, or is ending, what it ran for us.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import grpc
from grpc import aio

from ..cluster.auth import OPEN, MemberCredentials
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.proto.tandem_internal_v1_pb2_grpc import WorkerStub
from ..cluster.rpc import PROTOCOL_VERSION, Refusal, open_channel
from ..cluster.types import Side
from .commands import Commands
from .mailbox import Mailbox
from .sent_load import SentLoad

logger = logging.getLogger(__name__)
REATTACH_S = 0.2
ABORT_TRIES = 3


class SubscriptionKey(NamedTuple):
    """Names one attempt at one half of one choice."""

    request_id: str
    choice: int
    side: Side
    attempt: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """Instead of an event: the worker's stream broke."""

    worker_id: str
    side: Side
    message: str
    silent: bool = False
    """The stream was given up because the worker had said nothing for long: others may wait for it as well."""


class WorkerEvent(NamedTuple):
    """An event with the side that it came from."""

    side: Side
    event: pb.Event


class Refused(NamedTuple):
    """Instead of an event: the worker refuses what nobody waited for."""

    side: Side
    refusal: Refusal


Inbox = Mailbox["WorkerEvent | LinkLost | Refused"]


class WorkerLink:
    """Created when a worker's heartbeat shows a new epoch; closed when the next one does, or the router stops."""

    def __init__(
        self,
        *,
        worker_id: str,
        address: str,
        epoch: int,
        router_id: str,
        on_change: Callable[[], None],
        credentials: MemberCredentials = OPEN,
    ) -> None:
        self.worker_id = worker_id
        self.address = address
        self.epoch = epoch
        self.attached = False
        self.sent = SentLoad(on_change)
        """What this router has under way there."""
        self._router_id = router_id
        self._on_change = on_change
        self._closed = False
        self._channel = open_channel(address, credentials)
        self._stub = WorkerStub(self._channel)
        self._inboxes: dict[SubscriptionKey, Inbox] = {}
        self._commands = Commands(worker_id, epoch)
        self._stream: aio.StreamStreamCall | None = None
        self._task = asyncio.create_task(self._run())

    def subscribe(self, key: SubscriptionKey, inbox: Inbox) -> None:
        """From now on that attempt's events go to `inbox`."""
        self._inboxes[key] = inbox

    def unsubscribe(self, key: SubscriptionKey) -> None:
        """Idempotent."""
        self._inboxes.pop(key, None)

    async def reserve(self, request: pb.ReserveRequest) -> pb.ReserveReply:
        """Asks for a credit. `Refusal`."""
        answer = await self._ask(pb.Command(reserve=request))
        return pb.ReserveReply(credit_id=answer.credit_id, epoch=answer.epoch)

    async def prefill(self, request: pb.PrefillRequest) -> None:
        """Submits a prompt. `Refusal`."""
        await self._ask(pb.Command(prefill=request))

    def decode(self, request: pb.DecodeRequest, inbox: Inbox) -> None:
        """Redeems a credit; nobody waits for the answer, and a refusal comes into `inbox`."""

        def on_answer(answer: pb.Answer | Refusal) -> None:
            if isinstance(answer, Refusal):
                inbox.put_nowait(Refused(Side.DECODE, answer))

        if self.attached:
            # The first chunk of the prompt takes longer than this may wait.
            self._commands.send(pb.Command(decode=request), on_answer, at_once=False)
        else:
            on_answer(self._not_attached())

    async def abort(self, request: pb.AbortRequest) -> None:
        """Tells the worker to drop an attempt; retried a few times. A worker that cannot be told has lost our stream,
        and drops everything of ours by itself.
        """
        for _ in range(ABORT_TRIES):
            if not self.attached:
                return
            try:
                await self._ask(pb.Command(abort=request))
                return
            except Refusal as refusal:
                logger.debug("abort: %s", refusal.message)
                await asyncio.sleep(REATTACH_S)

    def give_up(self, message: str) -> None:
        """The worker says nothing though its stream stands: subscribers hear `LinkLost`, and the stream is ended, by
        which the worker, if it ever goes on, learns to drop what it runs for us. A new one is opened at once, and
        stands when the worker answers.
        """
        self._lose(message, silent=True)
        if self._stream is not None:
            self._stream.cancel()

    async def close(self) -> None:
        """Ends the stream and the channel; subscribers hear `LinkLost`. Idempotent."""
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._lose("the worker was replaced or the router stops")
        await self._channel.close()

    async def _ask(self, command: pb.Command) -> pb.Answer:
        if not self.attached:
            raise self._not_attached()
        return await self._commands.ask(command)

    def _not_attached(self) -> Refusal:
        return Refusal(grpc.StatusCode.UNAVAILABLE, f"{self.worker_id}: its stream does not stand")

    async def _run(self) -> None:
        while True:
            try:
                await self._read()
                self._lose("the worker ended the stream")
            except aio.AioRpcError as error:
                logger.info("stream of %s: %s %s", self.worker_id, error.code().name, error.details())
                self._lose(f"stream broken: {error.code().name}")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._closed or (task is not None and task.cancelling()):
                    raise
                self._lose("the stream was given up")
            except Exception as error:
                logger.exception("stream of %s", self.worker_id)
                self._lose(f"stream broken: {type(error).__name__}")
            await asyncio.sleep(REATTACH_S)

    async def _read(self) -> None:
        self._stream = self._stub.Attach()
        await self._stream.write(
            pb.RouterFrame(router_id=self._router_id, protocol_version=PROTOCOL_VERSION, epoch=self.epoch)
        )
        writing = asyncio.create_task(self._write(self._stream))
        try:
            while (frame := await self._stream.read()) is not aio.EOF:
                self._take(frame)
                if frame.leaving:
                    self._leaves()
                    await asyncio.sleep(0)  # who was refused goes on before the end of the stream is told
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)  # a broken stream is told by what reads it

    async def _write(self, stream: aio.StreamStreamCall) -> None:
        while True:
            await stream.write(await self._commands.next_frame())

    def _take(self, frame: pb.StepFrame) -> None:
        if frame.epoch != self.epoch:
            logger.warning("a frame of another epoch of %s is dropped", self.worker_id)
            return
        if not self.attached:
            self.attached = True
            self._on_change()
        for answer in frame.answers:
            self._commands.answered(answer)
        for event in frame.events:
            self._dispatch(event)

    def _leaves(self) -> None:
        """The worker has drained: what it has not answered is refused, and not lost with it."""
        self.attached = False
        self._commands.fail("has drained and leaves", grpc.StatusCode.FAILED_PRECONDITION)
        self._on_change()

    def _dispatch(self, event: pb.Event) -> None:
        side = Side.PREFILL if event.side == pb.SIDE_PREFILL else Side.DECODE
        inbox = self._inboxes.get((event.request_id, event.choice, side, event.attempt))  # type: ignore[call-overload]
        if inbox is not None:
            inbox.put_nowait(WorkerEvent(side, event))

    def _lose(self, message: str, *, silent: bool = False) -> None:
        self.attached = False
        # Before the commands fail: one that was under way is not refused, its worker is lost.
        inboxes, self._inboxes = self._inboxes, {}
        for key, inbox in inboxes.items():
            inbox.put_nowait(LinkLost(self.worker_id, key.side, message, silent))
        self._commands.fail(message)
        self._on_change()
