"""What routers ask of a worker, as commands of their stream: run here, answered with the stream's next frame.

One task for each prompt, because the engine's answer comes between two steps; credits and aborts are answered in the
turn of the loop that brings them. Credits and refusals leave at once, what the router does not wait for may leave with
the next frame. When the stream ends, what is not answered is canceled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Awaitable
from typing import Protocol

import grpc

from ..proto import tandem_internal_v1_pb2 as pb
from ..rpc import MAX_CONCURRENT_CALLS, Refusal
from .outbox import Outbox, RouterStream

logger = logging.getLogger(__name__)


class CommandHandler(Protocol):
    """What runs a command: each raises `Refusal`, or ValueError for what is wrong everywhere."""

    def run_prefill(self, request: pb.PrefillRequest) -> Awaitable[None]:
        """Admits a prompt."""

    def run_reserve(self, request: pb.ReserveRequest) -> Awaitable[int]:
        """Grants a credit and returns its id; does not wait for anything."""

    def run_decode(self, request: pb.DecodeRequest) -> Awaitable[None]:
        """Redeems a credit."""

    def run_abort(self, request: pb.AbortRequest) -> None:
        """Ends what is named."""


class Commands:
    """Those of one stream."""

    def __init__(self, handler: CommandHandler, outbox: Outbox, stream: RouterStream, epoch: int) -> None:
        self._handler = handler
        self._outbox = outbox
        self._stream = stream
        self._epoch = epoch
        self._tasks: set[asyncio.Task[None]] = set()

    async def read(self, frames: AsyncIterable[pb.RouterFrame]) -> None:
        """Begins every command that comes, until the router ends its half or has a newer stream."""
        async for frame in frames:
            for command in frame.commands:
                if not self._stream.open:
                    return
                await self._begin(command)

    def cancel(self) -> None:
        """The stream is over."""
        for task in self._tasks:
            task.cancel()

    async def _begin(self, command: pb.Command) -> None:
        if command.WhichOneof("kind") in ("reserve", "abort"):
            await self._answer(command)
        elif len(self._tasks) >= MAX_CONCURRENT_CALLS:
            self._refuse(command, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{len(self._tasks)} commands wait already")
        else:
            task = asyncio.create_task(self._answer(command))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, command: pb.Command) -> None:
        if not self._stream.open:  # ended since the command came: its router is gone, nobody would end what began now
            return
        try:
            credit_id = await self._run(command)
        except Refusal as refusal:
            self._refuse(command, refusal.code, refusal.message)
        except ValueError as error:
            self._refuse(command, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as error:  # as gRPC does with a handler that breaks
            logger.exception("a command broke")
            self._refuse(command, grpc.StatusCode.UNKNOWN, f"unexpected {type(error).__name__}: {error}")
        else:
            answer = pb.Answer(id=command.id, epoch=self._epoch, credit_id=credit_id)
            self._outbox.answer(self._stream, answer, at_once=command.HasField("reserve"))

    async def _run(self, command: pb.Command) -> int:
        handler = self._handler
        match command.WhichOneof("kind"):
            case "prefill":
                await handler.run_prefill(command.prefill)
            case "reserve":
                return await handler.run_reserve(command.reserve)
            case "decode":
                await handler.run_decode(command.decode)
            case "abort":
                handler.run_abort(command.abort)
            case _:
                raise ValueError("command: of no kind that this worker knows; allowed: prefill, reserve, decode, abort")
        return 0

    def _refuse(self, command: pb.Command, code: grpc.StatusCode, message: str) -> None:
        number: int = code.value[0]
        answer = pb.Answer(id=command.id, epoch=self._epoch, code=number, message=message)
        self._outbox.answer(self._stream, answer)
