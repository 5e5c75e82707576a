"""Groups whose messages are polled for (NCCL's): one that does not end is given up at its deadline, once, and the next
pair has nothing of it.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
import pytest
from ends import PATIENCE_S
from stand_ins import BREAKS, BREAKS_LATE, DEADLINE_S, HOLDER, ONE, READER, SILENT, STEP_S, THROUGH, Two
from tandem.kvtransfer.collective import groups
from tandem.kvtransfer.collective import rank as rank_module
from tandem.kvtransfer.collective.commands import Answer, Begin, Failed, Join, Joined, Key, Leave
from tandem.kvtransfer.collective.memory import HostRankMemory
from tandem.kvtransfer.collective.rank import RankTransfers

BLOCKS = range(3, 7)


@pytest.mark.parametrize("how", [SILENT, BREAKS, BREAKS_LATE])
def test_a_message_that_does_not_end_ends_its_group_and_the_pair_meets_anew(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    two = Two(monkeypatch, how, THROUGH)
    two.memories[HOLDER][:] = np.random.default_rng(1).integers(0, 256, two.memories[HOLDER].shape)
    two.meet(b"first")
    two.wait_both(Joined, b"first")
    begun_s = two.clock.now_s
    two.stage(b"first", BLOCKS)
    two.move(b"first", BLOCKS)
    why = f"a message was not through within {DEADLINE_S:g} s" if how == SILENT else "the peer's connection is gone"
    for failed in two.wait_both(Failed, b"first"):
        assert failed.message == f"PairLost: {why}"
    if how == SILENT:  # each looks until its deadline is over, perhaps one after the other
        assert DEADLINE_S < two.clock.now_s - begun_s <= 2 * (DEADLINE_S + 2 * STEP_S)
    assert not two.memories[READER].any()
    for rank in two.ranks:
        rank.handle(Leave(session=b"first"))

    two.meet(b"second")
    two.wait_both(Joined, b"second")
    waited = two.synchronized
    two.stage(b"second", BLOCKS)
    two.move(b"second", BLOCKS)
    two.wait_moved(b"second")
    np.testing.assert_array_equal(two.memories[READER][BLOCKS], two.memories[HOLDER][BLOCKS])
    assert two.synchronized == waited + 2
    two.close()
    assert [[group.aborted for group in side] for side in two.groups] == [[1, 1], [1, 1]]


def test_a_group_whose_other_end_shows_no_proof_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(monkeypatch, THROUGH)
    two.meet(b"first", b"right", b"wrong")
    for failed in two.wait_both(Failed, b"first"):
        assert "whoever answered is not the other rank" in failed.message
    two.close()
    assert [[group.aborted for group in side] for side in two.groups] == [[1], [1]]


def test_what_is_kept_for_later_messages_is_bounded_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [bytes([number]) for number in range(8)]
    two = Two(monkeypatch, *[THROUGH] * len(sessions))
    most = 3 * two.memories[HOLDER][BLOCKS].nbytes
    for rank in two.ranks:
        rank._buffers._limit_bytes = most
    for session in sessions:
        two.meet(session)
        two.wait_both(Joined, session)
        two.stage(session, BLOCKS)
    for session in sessions:
        two.move(session, BLOCKS)
    for session in sessions:
        two.wait_moved(session)
    assert two.ranks[HOLDER]._buffers.free_bytes == most
    assert 0 < two.ranks[READER]._buffers.free_bytes <= most
    two.close()


def test_pairs_that_were_left_while_they_meet_for_good_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL does not notice that the other rank died meanwhile, and cannot be told: such threads stay, but not ever
    more of them.
    """
    meeting, released = threading.Semaphore(0), threading.Event()

    def meet(*_: object) -> None:
        meeting.release()
        released.wait(PATIENCE_S)
        raise RuntimeError("the other rank is gone")

    monkeypatch.setattr(groups, "_group", meet)
    monkeypatch.setattr(rank_module, "MAX_PAIRS", 2)
    said: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    memory = HostRankMemory(memoryview(bytearray(ONE.layout.block_bytes)))
    ranks = RankTransfers(memory, Begin(backend="nccl", host="", timeout_s=DEADLINE_S), said.put)

    def join(session: bytes) -> None:
        facts: dict[str, Any] = {"session": session, "pair": 0, "source": ONE, "target": ONE, "group": "g"}
        ranks.handle(Join(**facts, sends=True, proof=b"proof"))
        ranks.handle(Key(session=session, pair=0, key="here", value=b""))

    for session in (b"first", b"second"):
        join(session)
        assert meeting.acquire(timeout=PATIENCE_S)
        ranks.handle(Leave(session=session))
    join(b"third")
    while not isinstance(failed := said.get(timeout=PATIENCE_S), Failed):
        pass
    assert failed.message == "2 pairs of ranks are open, or were left and have not ended"
    released.set()
    ranks.close()
    join(b"fourth")
    assert meeting.acquire(timeout=PATIENCE_S)
    ranks.close()
