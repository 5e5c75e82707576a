"""Ranks of two workers in this process, which meet through groups that speak as NCCL's do, without a GPU."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ends import NUM_BLOCKS, PATIENCE_S, split
from tandem.kvtransfer.collective import groups
from tandem.kvtransfer.collective.commands import Answer, Begin, Done, Join, Key, Receive, Send, Stage
from tandem.kvtransfer.collective.memory import HostRankMemory
from tandem.kvtransfer.collective.rank import RankTransfers

DEADLINE_S = 20.0
STEP_S = 3.0
"""By which time goes on with each look at a message that does not end; it stands still otherwise."""
ONE = split()
THROUGH, SILENT, BREAKS, BREAKS_LATE = "goes through", "never ends", "breaks", "breaks when waited for"
HOLDER, READER = 0, 1


class Clock:
    """What `groups` takes for `time`."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)


class Work:
    """One message on its way."""

    def __init__(self, came: Callable[[], bool], how: str, clock: Clock) -> None:
        self._came, self._how, self._clock = came, how, clock

    def is_completed(self) -> bool:
        if self._how == SILENT:
            self._clock.now_s += STEP_S
            return False
        if self._how == BREAKS:
            raise RuntimeError("the peer's connection is gone")
        return self._how == BREAKS_LATE or self._came()

    def wait(self, timeout: timedelta) -> None:
        if self._how == BREAKS_LATE:
            raise RuntimeError("the peer's connection is gone")


class Group:
    """One end of a pair. What follows the two messages of proof goes as `how` says."""

    def __init__(self, rank: int, inboxes: tuple[deque[torch.Tensor], ...], how: str, clock: Clock) -> None:
        self._rank, self._inboxes, self._how, self._clock = rank, inboxes, how, clock
        self._proofs_left = 2
        self.aborted = 0

    def send(self, tensors: list[torch.Tensor], other: int, tag: int) -> Work:
        self._inboxes[other].append(tensors[0].clone())
        return self._work(lambda: True)

    def recv(self, tensors: list[torch.Tensor], other: int, tag: int) -> Work:
        inbox = self._inboxes[self._rank]

        def came() -> bool:
            if inbox:
                tensors[0].copy_(inbox.popleft())
                return True
            return False

        return self._work(came)

    def abort(self) -> None:
        self.aborted += 1

    def _work(self, came: Callable[[], bool]) -> Work:
        self._proofs_left -= 1
        return Work(came, THROUGH if self._proofs_left >= 0 else self._how, self._clock)


class Two:
    """A holder's rank and a reader's. The n-th pair that meets goes as `ways[n]` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ways: str) -> None:
        self._ways = ways
        self.clock = Clock()
        self.groups: tuple[list[Group], list[Group]] = ([], [])
        """By side, in the order of their meetings."""
        self._inboxes = [(deque[torch.Tensor](), deque[torch.Tensor]()) for _ in ways]
        self.synchronized = 0
        """How often a stream was waited for."""
        monkeypatch.setattr(groups, "time", self.clock)
        monkeypatch.setattr(groups, "_group", self._group)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=self._synchronize))
        self.memories = [np.zeros((NUM_BLOCKS, ONE.layout.block_bytes), np.uint8) for _ in (HOLDER, READER)]
        self._heard: list[tuple[int, Answer]] = []
        self._changed = threading.Condition()
        self._both_join = threading.Event()
        begin = Begin(backend="nccl", host="127.0.0.1", timeout_s=DEADLINE_S)
        self.ranks = [
            RankTransfers(HostRankMemory(memoryview(memory).cast("B")), begin, partial(self._hear, side))
            for side, memory in enumerate(self.memories)
        ]

    def meet(self, session: bytes, *proofs: bytes) -> None:
        """Both ranks are told to; `proofs`: of each side, where they differ."""
        self._both_join.clear()
        for side, rank in enumerate(self.ranks):
            proof = proofs[side] if proofs else b"proof"
            facts: dict[str, Any] = {"session": session, "pair": 0, "source": ONE, "target": ONE, "group": "g"}
            rank.handle(Join(**facts, sends=side == HOLDER, proof=proof))
        self._both_join.set()

    def stage(self, session: bytes, blocks: range) -> None:
        """Returns when the holder's rank has copied them."""
        self.ranks[HOLDER].handle(Stage(**self._batch(session), **_tokens(blocks), block_ids=tuple(blocks)))
        self.wait_for(HOLDER, Done, session)

    def move(self, session: bytes, blocks: range) -> None:
        """What was staged is to go to the same places of the reader."""
        facts = self._batch(session)
        self.ranks[READER].handle(Receive(**facts, **_tokens(blocks), block_ids=tuple(blocks), cleared_from=None))
        self.ranks[HOLDER].handle(Send(**facts))

    def wait_moved(self, session: bytes) -> None:
        self.wait_for(READER, Done, session)
        self.wait_for(HOLDER, Done, session, times=2)

    def wait_both(self, kind: type[Any], session: bytes) -> list[Any]:
        return [self.wait_for(side, kind, session) for side in (HOLDER, READER)]

    def wait_for(self, side: int, kind: type[Any], session: bytes, times: int = 1) -> Any:
        """What a rank answers, for the `times`-th time."""

        def found() -> list[Answer]:
            return [a for s, a in self._heard if s == side and isinstance(a, kind) and a.session == session]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= times, PATIENCE_S), f"no {kind.__name__} came"
            return found()[times - 1]

    def close(self) -> None:
        """Returns when no thread is left."""
        for rank in self.ranks:
            rank.close()

    def _batch(self, session: bytes) -> dict[str, Any]:
        return {"session": session, "pair": 0, "batch": 1}

    def _hear(self, side: int, answer: Answer) -> None:
        if isinstance(answer, Key):
            self._both_join.wait()
            self.ranks[1 - side].handle(answer)
            return
        with self._changed:
            self._heard.append((side, answer))
            self._changed.notify_all()

    def _group(self, store: object, rank: int, *_: object) -> Group:
        number = len(self.groups[rank])
        group = Group(rank, self._inboxes[number], self._ways[number], self.clock)
        self.groups[rank].append(group)
        return group

    def _synchronize(self) -> None:
        self.synchronized += 1


def _tokens(blocks: range) -> dict[str, Any]:
    return {"first_token": 0, "end_token": ONE.layout.block_size * len(blocks)}
