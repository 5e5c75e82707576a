"""Commands to one worker that wait for their answers: they leave together, one frame for all of one turn of the loop,
and each has a deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque

import grpc

from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.rpc import CONTROL_TIMEOUT_S, MAX_CONCURRENT_CALLS, Refusal

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Commands:
    """Those of one life of one worker. `ask` from any task; the link's own tasks carry frames up and answers down."""

    def __init__(self, worker_id: str, epoch: int) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[pb.Answer]] = {}
        self._outgoing: list[pb.Command] = []
        self._news: asyncio.Future[None] | None = None
        """What the writer waits for."""
        self._due: deque[tuple[float, int]] = deque()
        """Deadlines, the first first: all commands are given the same time."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def ask(self, command: pb.Command) -> pb.Answer:
        """Sends it and waits for its answer. `Refusal`: the worker's, or DEADLINE_EXCEEDED, or UNAVAILABLE where the
        stream breaks, RESOURCE_EXHAUSTED where too many wait already.
        """
        if len(self._waiting) >= MAX_CONCURRENT_CALLS:
            text = f"{self._worker_id}: {len(self._waiting)} commands wait for an answer"
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        loop = asyncio.get_running_loop()
        self._last_id += 1
        command.id = number = self._last_id
        answered = self._waiting[number] = loop.create_future()
        self._keep_time(loop, number)
        self._outgoing.append(command)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
        try:
            answer: pb.Answer = await answered
        finally:
            self._waiting.pop(number, None)
        if answer.code:
            raise Refusal(_STATUS.get(answer.code, grpc.StatusCode.UNKNOWN), f"{self._worker_id}: {answer.message}")
        if answer.epoch != self._epoch:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"{self._worker_id}: another epoch answered")
        return answer

    async def next_frame(self) -> pb.RouterFrame:
        """Waits for commands, and gives all that there are. One reader."""
        while not self._outgoing:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        commands, self._outgoing = self._outgoing, []
        return pb.RouterFrame(commands=commands)

    def answered(self, answer: pb.Answer) -> None:
        """An answer came; dropped where nobody waits for it any more."""
        waiting = self._waiting.get(answer.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def fail(self, message: str) -> None:
        """The stream is broken: nothing that was asked is answered, and nothing that has not left yet leaves."""
        self._outgoing.clear()
        self._due.clear()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Refusal(grpc.StatusCode.UNAVAILABLE, f"{self._worker_id}: {message}"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _keep_time(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        due = self._due
        while due and due[0][1] not in self._waiting:
            due.popleft()
        due.append((loop.time() + CONTROL_TIMEOUT_S, number))
        if self._timer is None:
            self._timer = loop.call_at(due[0][0], self._expire)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer, now_s = None, loop.time()
        while self._due and (self._due[0][0] <= now_s or self._due[0][1] not in self._waiting):
            _, number = self._due.popleft()
            waiting = self._waiting.get(number)
            if waiting is not None and not waiting.done():
                text = f"{self._worker_id}: no answer within {CONTROL_TIMEOUT_S:g} s"
                waiting.set_exception(Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text))
        if self._due:
            self._timer = loop.call_at(self._due[0][0], self._expire)
