"""Commands to one worker that wait for their answers: they leave together, one frame for all of one turn of the loop,
and each has a deadline. What nothing waits for leaves with the next frame where one has just left; where the router is
busy all the time, so does everything else (`pace`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

import grpc

from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.rpc import CONTROL_TIMEOUT_S, MAX_CONCURRENT_CALLS, NextFrame, Refusal
from .pace import Pace

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


OnAnswer = Callable[["pb.Answer | Refusal"], None]


class Commands:
    """Those of one life of one worker. Any task sends; the link's own tasks carry frames up and answers down."""

    def __init__(self, worker_id: str, epoch: int) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._last_id = 0
        self._waiting: dict[int, OnAnswer] = {}
        self._outgoing: list[pb.Command] = []
        self._news: asyncio.Future[None] | None = None
        """What the writer waits for."""
        self._left_s = -math.inf
        """When the last frame left, on the monotonic clock."""
        self._pace = Pace(time.monotonic(), time.process_time)
        self._may_leave = False
        self._next_frame = NextFrame(self._wake)
        self._due: deque[tuple[float, int]] = deque()
        """Deadlines, the first first: all commands are given the same time."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def send(self, command: pb.Command, on_answer: OnAnswer, *, at_once: bool = True) -> int:
        """Sends it, in its turn (`Pace`), and returns its id; not `at_once`: where a frame has just left, with the next
        one, which is soon. `on_answer` is called once, maybe at once: with the answer, or with a `Refusal`: the
        worker's, DEADLINE_EXCEEDED, UNAVAILABLE where the stream breaks, RESOURCE_EXHAUSTED where too many wait
        already. It must neither block nor raise.
        """
        self._last_id += 1
        command.id = number = self._last_id
        if len(self._waiting) >= MAX_CONCURRENT_CALLS:
            text = f"{self._worker_id}: {len(self._waiting)} commands wait for an answer"
            on_answer(Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
            return number
        self._waiting[number] = on_answer
        self._keep_time(number)
        self._outgoing.append(command)
        paced = self._next_frame.waits_until(self._left_s + self._pace.gap_s)
        if not paced and (at_once or not self._next_frame.waits(self._left_s)):
            self._wake()
        return number

    def _wake(self) -> None:
        self._next_frame.cancel()
        self._may_leave = True
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def ask(self, command: pb.Command) -> pb.Answer:
        """Sends it and waits for its answer. `Refusal` as above."""
        answered: asyncio.Future[pb.Answer | Refusal] = asyncio.get_running_loop().create_future()
        number = self.send(command, lambda answer: None if answered.done() else answered.set_result(answer))
        try:
            answer = await answered
        finally:
            self._waiting.pop(number, None)
        if isinstance(answer, Refusal):
            raise answer
        return answer

    async def next_frame(self) -> pb.RouterFrame:
        """Waits for commands, and gives all that there are. One reader."""
        while not self._may_leave:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        self._may_leave = False
        self._left_s = time.monotonic()
        self._pace.left(self._left_s)
        commands, self._outgoing = self._outgoing, []
        return pb.RouterFrame(commands=commands)

    def answered(self, answer: pb.Answer) -> None:
        """An answer came; dropped where nobody waits for it any more."""
        on_answer = self._waiting.pop(answer.id, None)
        if on_answer is None:
            return
        if answer.code:
            status = _STATUS.get(answer.code, grpc.StatusCode.UNKNOWN)
            on_answer(Refusal(status, f"{self._worker_id}: {answer.message}"))
        elif answer.epoch != self._epoch:
            text = f"{self._worker_id}: another epoch answered"
            on_answer(Refusal(grpc.StatusCode.FAILED_PRECONDITION, text))
        else:
            on_answer(answer)

    def fail(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        """The stream is broken, or nothing more comes of it: nothing that was asked is answered, and nothing that has
        not left yet leaves.
        """
        self._outgoing.clear()
        self._due.clear()
        self._next_frame.cancel()
        self._may_leave = False
        waiting, self._waiting = self._waiting, {}
        for on_answer in waiting.values():
            on_answer(Refusal(code, f"{self._worker_id}: {message}"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _keep_time(self, number: int) -> None:
        due, loop = self._due, asyncio.get_running_loop()
        while due and due[0][1] not in self._waiting:
            due.popleft()
        due.append((loop.time() + CONTROL_TIMEOUT_S, number))
        if self._timer is None:
            self._timer = loop.call_at(due[0][0], self._expire)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer, now_s = None, loop.time()
        while self._due and (self._due[0][0] <= now_s or self._due[0][1] not in self._waiting):
            on_answer = self._waiting.pop(self._due.popleft()[1], None)
            if on_answer is not None:
                text = f"{self._worker_id}: no answer within {CONTROL_TIMEOUT_S:g} s"
                on_answer(Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text))
        if self._due and self._timer is None:
            self._timer = loop.call_at(self._due[0][0], self._expire)
