"""Process groups of two ranks: who is met, who is not, and what the end of one is to the other."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from tandem.kvtransfer.collective import groups
from tandem.kvtransfer.collective.groups import PairGroup, PairLost, Rendezvous

CPU = torch.device("cpu")


class Two:
    """Both ends in this process, each in a thread; what one says the other hears."""

    def __init__(self, *proofs: bytes, timeout_s: float = 5.0) -> None:
        self._proofs = proofs
        self._timeout_s = timeout_s
        self._told = threading.Event()
        self.meetings = [
            Rendezvous(lambda key, value: self._tell(1, key, value), timeout_s=timeout_s),
            Rendezvous(lambda key, value: self._tell(0, key, value), timeout_s=timeout_s),
        ]
        self._told.set()

    def _tell(self, other: int, key: str, value: bytes) -> None:
        self._told.wait()
        self.meetings[other].heard(key, value)

    def end(self, rank: int, backend: str = "gloo") -> PairGroup:
        return PairGroup(
            self.meetings[rank],
            "pair",
            sends=rank == 0,
            backend=backend,
            device=CPU,
            host="127.0.0.1",
            proof=self._proofs[rank],
            timeout_s=self._timeout_s,
        )

    def close(self) -> None:
        for meeting in self.meetings:
            meeting.end()


def test_messages_come_in_the_order_in_which_they_were_sent() -> None:
    two = Two(b"same", b"same")
    with ThreadPoolExecutor(2) as threads:
        sender, receiver = threads.map(two.end, (0, 1))
        sent = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (1, 2**20, 300)]
        came = [torch.empty_like(data) for data in sent]
        works = deque((receiver, receiver.receive(data)) for data in came[:2])
        works.extend((sender, sender.send(data)) for data in sent)
        works.append((receiver, receiver.receive(came[2])))
        while works:
            end, work = works.popleft()
            end.finish(work)
        del end, work  # the connection lives as long as any of them
        assert all(torch.equal(data, whole) for data, whole in zip(came, sent, strict=True))
        waiting = receiver.receive(came[0])
        sender.abort()
        with pytest.raises(PairLost):
            receiver.finish(waiting)
        receiver.abort()
    two.close()


def test_who_does_not_know_the_proof_is_not_met() -> None:
    """A stranger at the data port may take a place in the group; nothing of KV is said to it, or heard of it."""
    two = Two(b"right", b"wrong")

    def try_to_meet(rank: int) -> str:
        with pytest.raises(PairLost) as lost:
            two.end(rank)
        return str(lost.value)

    with ThreadPoolExecutor(2) as threads:
        said = list(threads.map(try_to_meet, (0, 1)))
    assert any("not the other rank" in words for words in said)
    two.close()


def test_a_rank_that_nobody_comes_to_meet_gives_up() -> None:
    two = Two(b"same", b"same", timeout_s=0.2)
    with pytest.raises(PairLost):
        two.end(1)
    two.close()


@pytest.mark.parametrize(("backend", "wait_s"), [("gloo", 3), ("nccl", 5)])
def test_nccl_waits_for_the_others_first_key_as_long_as_for_a_message(
    monkeypatch: pytest.MonkeyPatch, backend: str, wait_s: int
) -> None:
    """While the other one loads its libraries; Gloo only connects."""
    waits = []

    def refused(store: Any, *_: object) -> None:
        waits.append(store.timeout)
        raise RuntimeError("no group")

    monkeypatch.setattr(groups, "_group", refused)
    two = Two(b"same", b"same")
    two.meetings[0].heard("here", b"")
    with pytest.raises(PairLost, match="no group"):
        two.end(0, backend)
    two.close()
    assert waits == [timedelta(seconds=wait_s)]
