"""The `tandem.internal.v1.Worker` gRPC service: reads messages, asks the shell and the services, answers. No policy."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import grpc
from grpc import aio

from ..proto import tandem_internal_v1_pb2 as pb
from ..proto.tandem_internal_v1_pb2_grpc import WorkerServicer
from ..rpc import PROTOCOL_VERSION, Refusal, abort_with
from .commands import Commands
from .outbox import RouterStream
from .services import DecodeHandler, PrefillHandler
from .shell import WorkerShell

logger = logging.getLogger(__name__)
Reply = TypeVar("Reply")
MAX_LEAVE_S = 86400.0
INTRODUCTION_S = 5.0
"""How long a router may take to say who it is on a stream that it has opened."""


class Servicer(WorkerServicer):
    """One instance per worker process."""

    def __init__(self, shell: WorkerShell, prefill: PrefillHandler, decode: DecodeHandler) -> None:
        self._shell = shell
        self._prefill = prefill
        self._decode = decode

    async def Attach(
        self, request_iterator: AsyncIterator[pb.RouterFrame], context: aio.ServicerContext
    ) -> AsyncIterator[pb.StepFrame]:
        """The router's one stream; when it ends, by whatever cause, its sequences end too."""
        request = await self._introduction(request_iterator, context)
        if request.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol_version: {request.protocol_version} is not {PROTOCOL_VERSION}, which this worker speaks",
            )
        if request.epoch != self._shell.facts.epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"epoch: the router means an earlier life of worker {self._shell.facts.worker_id}",
            )
        if not request.router_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "router_id: empty")
        if self._shell.failure is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the engine has failed: {self._shell.failure}")
        # A router opens a new stream when its old one broke, and has given up what it had asked for, though this side
        # may not have noticed yet.
        self._router_gone(request.router_id)
        stream = self._shell.outbox.attach(request.router_id)
        commands = Commands(self, self._shell.outbox, stream, self._shell.facts.epoch)
        reading = asyncio.create_task(commands.read(request_iterator))
        reading.add_done_callback(lambda task: _reading_ended(stream, task))
        try:
            # An empty frame says that the worker knows this router now: the router waits for it before it submits.
            yield pb.StepFrame(epoch=self._shell.facts.epoch)
            while (frame := await stream.next_frame()) is not None:
                yield frame
        finally:
            reading.cancel()
            commands.cancel()
            if self._shell.outbox.detach(stream):
                self._router_gone(request.router_id)

    async def _introduction(
        self, frames: AsyncIterator[pb.RouterFrame], context: aio.ServicerContext
    ) -> pb.RouterFrame:
        try:
            async with asyncio.timeout(INTRODUCTION_S):
                return await anext(frames, pb.RouterFrame())
        except TimeoutError:
            text = f"router_id: no first frame within {INTRODUCTION_S:g} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)
            raise AssertionError("context.abort returned") from None

    def _router_gone(self, router_id: str) -> None:
        self._shell.router_gone(router_id)
        self._decode.router_gone(router_id)

    # --- commands: in a stream, or one by one -----------------------------------------------------------------------

    async def run_prefill(self, request: pb.PrefillRequest) -> None:
        """See `CommandHandler`."""
        self._shell.check_takes_work(self._prefill, request.sequence.router_id, request.epoch)
        await self._prefill.prefill(request)

    async def run_reserve(self, request: pb.ReserveRequest) -> int:
        """See `CommandHandler`."""
        self._shell.check_takes_work(self._decode, request.router_id, request.epoch)
        return await self._decode.reserve(request)

    async def run_decode(self, request: pb.DecodeRequest) -> None:
        """See `CommandHandler`."""
        self._shell.check_takes_work(self._decode, request.sequence.router_id, request.epoch)
        await self._decode.decode(request)

    def run_abort(self, request: pb.AbortRequest) -> None:
        """The halves that are named: a mixed worker may run either. Attempts count from 1."""
        if request.prefill_attempt:
            self._prefill.abort(request)
        if request.decode_attempt:
            self._decode.abort(request)

    async def Prefill(self, request: pb.PrefillRequest, context: aio.ServicerContext) -> pb.SubmitReply:
        """Admits a prompt."""
        await _or_refuse(self.run_prefill(request), context)
        return pb.SubmitReply(epoch=self._shell.facts.epoch)

    async def Reserve(self, request: pb.ReserveRequest, context: aio.ServicerContext) -> pb.ReserveReply:
        """Grants a credit."""
        credit_id = await _or_refuse(self.run_reserve(request), context)
        return pb.ReserveReply(credit_id=credit_id, epoch=self._shell.facts.epoch)

    async def Decode(self, request: pb.DecodeRequest, context: aio.ServicerContext) -> pb.SubmitReply:
        """Redeems a credit."""
        await _or_refuse(self.run_decode(request), context)
        return pb.SubmitReply(epoch=self._shell.facts.epoch)

    async def Abort(self, request: pb.AbortRequest, context: aio.ServicerContext) -> pb.AbortReply:
        """Ends what is named."""
        self.run_abort(request)
        return pb.AbortReply()

    async def Status(self, request: pb.StatusRequest, context: aio.ServicerContext) -> pb.WorkerStatus:
        """The same as a heartbeat."""
        return self._shell.status()

    async def Drain(self, request: pb.DrainRequest, context: aio.ServicerContext) -> pb.DrainReply:
        """From now on new work is refused; with `exit` the process ends when what runs has ended, or the time is up."""
        if request.exit:
            timeout_s = request.timeout_s
            if not (math.isfinite(timeout_s) and 0 <= timeout_s <= MAX_LEAVE_S):
                text = f"timeout_s: {timeout_s} is not allowed; allowed: 0 to {MAX_LEAVE_S:g}"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
            if self._shell.on_leave is None:
                text = f"exit: worker {self._shell.facts.worker_id} has no process of its own that could end"
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
            else:
                self._shell.on_leave(timeout_s)
        self._shell.begin_drain()
        return pb.DrainReply()


def _reading_ended(stream: RouterStream, task: asyncio.Task[None]) -> None:
    """Whose commands cannot be read any more shall not send them into the void: its stream ends."""
    error = None if task.cancelled() else task.exception()
    if error is None:
        return
    if stream.open:
        logger.error("the commands of router %s cannot be read", stream.router_id, exc_info=error)
    stream.close()


async def _or_refuse(answer: Awaitable[Reply], context: aio.ServicerContext) -> Reply:
    try:
        return await answer
    except Refusal as refusal:
        await abort_with(context, refusal)
    except ValueError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise AssertionError("context.abort returned") from error
