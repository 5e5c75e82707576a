"""Groups whose messages are polled for (NCCL's): one that does not end is given up at its deadline, once, and the next
pair has nothing of it.
"""

from __future__ import annotations

import numpy as np
import pytest
from stand_ins import BREAKS, BREAKS_LATE, DEADLINE_S, HOLDER, READER, SILENT, STEP_S, THROUGH, Two
from tandem.kvtransfer.collective.commands import Failed, Joined, Leave

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
