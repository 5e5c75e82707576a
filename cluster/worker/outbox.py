"""What a worker tells its routers: one frame per step per router, not one message per token.

Events are collected per router and leave together when the step's events have all been handled (`flush`). A router that
does not read is cut off at a bounded number of frames: its stream ends, and with it what it had asked for.
"""

from __future__ import annotations

import asyncio
import math
import time

from ..proto import tandem_internal_v1_pb2 as pb
from ..rpc import NextFrame

MAX_BUFFERED_FRAMES = 4096
MAX_MERGED_FRAMES = 64
"""Frames that a router did not read yet and that leave as one."""


class RouterStream:
    """One attached router's frames, in order. `None` in the queue ends the stream."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.frames: asyncio.Queue[pb.StepFrame | None] = asyncio.Queue(MAX_BUFFERED_FRAMES + 1)
        self.answers: list[pb.Answer] = []
        """To its commands; leave with the next frame."""
        self.open = True
        self.left_s = -math.inf
        """When the last frame was pushed, on the monotonic clock."""

    async def next_frame(self) -> pb.StepFrame | None:
        """The next frame; what waits behind it, because the router did not read it, comes in one with it. None: the
        stream has ended.
        """
        frame = await self.frames.get()
        for _ in range(MAX_MERGED_FRAMES):
            if frame is None or self.frames.empty():
                break
            following = self.frames.get_nowait()
            if following is None:
                self.frames.put_nowait(None)  # for the next call
                break
            frame.events.extend(following.events)
            frame.answers.extend(following.answers)
            frame.leaving |= following.leaving
        return frame

    def push(self, frame: pb.StepFrame) -> bool:
        """False, and the stream closed, when the router is too far behind."""
        if self.frames.qsize() >= MAX_BUFFERED_FRAMES:
            self.close()
            return False
        self.frames.put_nowait(frame)
        return True

    def close(self) -> None:
        """Ends the stream after what is buffered; idempotent."""
        if self.open:
            self.open = False
            self.frames.put_nowait(None)


class Outbox:
    """The streams of all attached routers. Lives on the worker's event loop."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._streams: dict[str, RouterStream] = {}
        self._pending: dict[str, list[pb.Event]] = {}
        self._flushing = False
        self._next_frame = NextFrame(self.flush)
        """For answers that may wait."""

    def attach(self, router_id: str) -> RouterStream:
        """Opens a stream; an older one of the same router is ended."""
        older = self._streams.get(router_id)
        if older is not None:
            older.close()
        stream = RouterStream(router_id)
        self._streams[router_id] = stream
        return stream

    def detach(self, stream: RouterStream) -> bool:
        """Forgets a stream that ended. True if it was the router's current one."""
        stream.open = False
        if self._streams.get(stream.router_id) is not stream:
            return False
        del self._streams[stream.router_id]
        self._pending.pop(stream.router_id, None)
        return True

    def attached(self, router_id: str) -> bool:
        """Whether that router would hear what happens to its sequences."""
        stream = self._streams.get(router_id)
        return stream is not None and stream.open

    def post(self, router_id: str, event: pb.Event) -> None:
        """Adds an event to the router's next frame; dropped if the router is gone (its sequences are being aborted)."""
        if router_id in self._streams:
            self._pending.setdefault(router_id, []).append(event)

    def answer(self, stream: RouterStream, answer: pb.Answer, *, at_once: bool = True) -> None:
        """Answers a command; leaves in a frame with whatever else there is by the end of this turn of the loop. Not
        `at_once`: where a frame has just left, with the next one, which is soon.
        """
        stream.answers.append(answer)
        if self._flushing:
            return
        if at_once or not self._next_frame.waits(stream.left_s):
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Sends what was posted and answered: one frame per router."""
        self._flushing = False
        self._next_frame.cancel()
        pending, self._pending = self._pending, {}
        now_s = time.monotonic()
        for router_id, stream in self._streams.items():
            events = pending.get(router_id, ())
            if stream.open and (events or stream.answers):
                answers, stream.answers = stream.answers, []
                stream.left_s = now_s
                stream.push(pb.StepFrame(epoch=self._epoch, events=events, answers=answers))

    def leave(self) -> None:
        """Ends every stream of a worker that has drained: routers hear that what was not answered is never begun."""
        self.flush()
        for stream in list(self._streams.values()):
            if stream.open and stream.push(pb.StepFrame(epoch=self._epoch, leaving=True)):
                stream.close()

    def close(self) -> None:
        """Ends every stream."""
        self._next_frame.cancel()
        for stream in list(self._streams.values()):
            stream.close()

    @property
    def most_unread(self) -> int:
        """Frames that the router which is furthest behind has not taken yet."""
        return max((stream.frames.qsize() for stream in self._streams.values()), default=0)

    def __len__(self) -> int:
        return len(self._streams)
