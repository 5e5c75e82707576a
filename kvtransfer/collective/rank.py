"""One rank's part of KV that travels between workers: a thread for each pair of ranks carries out what it is told.

1. `handle` takes a command and never waits: a worker's loop, or the thread that hears a follower's link, calls it. So
   no transfer waits for a step, and no step for a transfer.
2. A pair's thread meets the other rank, then gathers and sends, or receives and scatters, in the order of its commands;
   a message is begun before the one before it has ended, `UNDER_WAY` of them at most.
3. What was received goes into blocks only if nobody has told to `Forget` it, or to `Leave`: that is answered at once,
   unless blocks are being written just then; the answer means that no more will be.
4. A pair that breaks says `Failed` and is over; its worker ends the session, and makes another.

Staging is bounded by what its worker has under way (`holder`, `reader`), and kept for the next messages within a bound
(`memory`). Loads torch.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ..reshape import Reshape
from .commands import (
    Answer,
    Begin,
    Command,
    Discard,
    Done,
    Failed,
    Forget,
    Forgotten,
    Join,
    Joined,
    Key,
    Leave,
    Left,
    Receive,
    Send,
    Stage,
)
from .groups import PairGroup, PairLost, Rendezvous
from .memory import MessageBuffers, RankMemory
from .plan import PairMap
from .ports import RankPort

log = logging.getLogger(__name__)

UNDER_WAY = 2
"""Messages of a pair that were begun and have not ended."""
MAX_PAIRS = 512
"""Of one rank; a session beyond them is refused by its failure. Those that were left and have not ended count: NCCL
waits for good for a rank that dies while the two meet.
"""
_Wire = tuple[Any, torch.Tensor, "Send | Receive"]


class RankTransfers:
    """See the module. Lives as long as its rank."""

    def __init__(self, memory: RankMemory, begin: Begin, say: Callable[[Answer], None]) -> None:
        """`say`: takes answers, from any thread, and does not wait."""
        self._memory = memory
        self._begin = begin
        self._say = say
        self._buffers = MessageBuffers(memory)
        self._pairs: dict[tuple[bytes, int], _Pair] = {}
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        """Of pairs, also of those that were left and have not ended."""
        self._lock = threading.Lock()

    def handle(self, command: Command) -> None:
        """Takes a command; does not wait. Those for a pair that is gone are ignored."""
        if isinstance(command, Leave):
            with self._lock:
                gone = [self._pairs.pop(name) for name in list(self._pairs) if name[0] == command.session]
            for pair in gone:
                pair.leave()
            self._say(Left(session=command.session))
            return
        name = command.session, command.pair
        if isinstance(command, Join):
            with self._lock:
                threads = {thread for thread in self._threads if thread.is_alive()}
                if len(threads.union(pair.thread for pair in self._pairs.values())) >= MAX_PAIRS:
                    text = f"{MAX_PAIRS} pairs of ranks are open, or were left and have not ended"
                    self._say(Failed(session=command.session, pair=command.pair, message=text))
                    return
                pair = self._pairs[name] = _Pair(self._memory, self._buffers, self._begin, command, self._say)
                self._threads.add(pair.thread)
            return
        told = self._pairs.get(name)
        if told is not None:
            told.take(command)

    def close(self) -> None:
        """Leaves every session, and waits for the threads, bounded: a thread that is inside of a backend when the
        interpreter ends would take the process with it. Idempotent.
        """
        with self._lock:
            for pair in self._pairs.values():
                pair.leave()
            self._pairs.clear()
            threads = tuple(self._threads)
        deadline_s = time.monotonic() + self._begin.timeout_s + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))


class _Pair:
    def __init__(
        self,
        memory: RankMemory,
        buffers: MessageBuffers,
        begin: Begin,
        join: Join,
        say: Callable[[Answer], None],
    ) -> None:
        self._memory = memory
        self._buffers = buffers
        self._begin = begin
        self._join = join
        self._say = say
        self._told: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._group: PairGroup | None = None
        self._map: PairMap | None = None
        self._staged: dict[int, torch.Tensor] = {}
        self._wires: deque[_Wire] = deque()
        self._writing = threading.Lock()
        self._due: set[int] = set()
        """Batches that are to be written."""
        self._left = False
        self._rendezvous = Rendezvous(
            lambda key, value: self._answer(Key, key=key, value=value), timeout_s=begin.timeout_s
        )
        self.thread = threading.Thread(target=self._run, name=f"KV pair {join.pair}", daemon=True)
        self.thread.start()

    def take(self, command: Command) -> None:
        if isinstance(command, Key):
            self._rendezvous.heard(command.key, command.value)
        elif isinstance(command, Forget):
            with self._writing:
                self._due.discard(command.batch)
            self._answer(Forgotten, batch=command.batch)
        else:
            if isinstance(command, Receive) and command.block_ids:
                self._due.add(command.batch)
            self._told.put(command)

    def leave(self) -> None:
        with self._writing:
            self._left = True
        self._rendezvous.end()
        self._told.put(None)

    def _run(self) -> None:
        try:
            with self._stream():
                self._meet()
                while (command := self._next()) is not None and not self._left:
                    self._carry_out(command)
        except Exception as error:  # the pair's end, whatever it was: its worker must hear of it
            if not isinstance(error, PairLost):
                log.exception("a pair of ranks failed unexpectedly")
            if not self._left:
                self._answer(Failed, message=f"{type(error).__name__}: {error}"[:1000])
        finally:
            self._rendezvous.end()
            if self._group is not None:
                self._group.abort()  # first: until then, what is on a wire may still be written into
            self._wires.clear()
            self._staged.clear()

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        """Work on a GPU goes beside the engine's."""
        if self._memory.device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(self._memory.device)  # counts by thread
        beside: Any = torch.cuda.Stream
        return torch.cuda.stream(beside(self._memory.device))

    def _meet(self) -> None:
        join = self._join
        self._map = PairMap(Reshape(join.source, join.target), join.pair)
        self._group = PairGroup(
            self._rendezvous,
            join.group,
            sends=join.sends,
            backend=self._begin.backend,
            device=self._memory.device,
            host=self._begin.host,
            proof=join.proof,
            timeout_s=self._begin.timeout_s,
        )
        self._rendezvous.end()
        self._answer(Joined)

    def _next(self) -> Command | None:
        """The next command; what is under way is ended while there is none."""
        while self._wires:
            try:
                if len(self._wires) < UNDER_WAY:
                    return self._told.get_nowait()
            except queue.Empty:
                pass
            self._finish()
        return self._told.get()

    def _carry_out(self, command: Command) -> None:
        assert self._map is not None
        assert self._group is not None
        match command:
            case Stage():
                rows = self._map.source_rows(command.first_token, command.end_token, command.block_ids)
                message = self._buffers.take(rows.total_bytes)
                self._memory.gather(rows, message)
                self._staged[command.batch] = message
                self._answer(Done, batch=command.batch)
            case Send():
                message = self._staged.pop(command.batch)
                self._wires.append((self._group.send(message), message, command))
            case Discard():
                self._buffers.give(self._staged.pop(command.batch))
            case Receive():
                message = self._buffers.take(self._map.total_bytes(command.first_token, command.end_token))
                self._wires.append((self._group.receive(message), message, command))

    def _finish(self) -> None:
        """Ends the oldest message under way. One that breaks stays there until its group is given up."""
        assert self._group is not None
        work, message, command = self._wires[0]
        self._group.finish(work)
        self._wires.popleft()
        if isinstance(command, Receive):
            self._write(command, message)
        self._buffers.give(message)
        self._answer(Done, batch=command.batch)

    def _write(self, command: Receive, message: torch.Tensor) -> None:
        """Unless it is not wanted any more."""
        assert self._map is not None
        with self._writing:
            if command.batch not in self._due or self._left:
                return
            self._due.discard(command.batch)
            rows = self._map.target_rows(command.first_token, command.end_token, command.block_ids)
            self._memory.scatter(message, rows)
            if command.cleared_from is not None:
                self._memory.clear(self._map.cleared_rows(command.block_ids[-1], command.cleared_from))

    def _answer(self, kind: Any, **values: Any) -> None:
        self._say(kind(session=self._join.session, pair=self._join.pair, **values))


class LocalPort(RankPort):
    """A rank in this process."""

    def __init__(self, memory: RankMemory) -> None:
        self._memory = memory
        self._transfers: RankTransfers | None = None

    def start(self, begin: Begin, hear: Callable[[Answer], None], on_lost: Callable[[str], None]) -> None:
        self._transfers = RankTransfers(self._memory, begin, hear)

    def say(self, command: Command) -> None:
        assert self._transfers is not None
        self._transfers.handle(command)

    def close(self) -> None:
        if self._transfers is not None:
            self._transfers.close()
