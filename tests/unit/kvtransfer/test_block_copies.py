"""Copies of blocks from memory to memory: neighbors in one piece, large blocks in several, nothing beside them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.kvtransfer.mapped import copies
from tandem.kvtransfer.mapped.copies import BlockCopies
from tandem.kvtransfer.neighbors import neighbors

BLOCKS = 9


@pytest.mark.parametrize("piece_bytes", [1, 5, 6, 13, 1000])
@given(data=st.data())
def test_every_block_comes_to_its_place_and_no_other_changes(piece_bytes: int, data: st.DataObject) -> None:
    size = 6
    source = bytes(range(1, BLOCKS * size + 1))
    ids = st.integers(0, BLOCKS - 1)
    target_ids = data.draw(st.lists(ids, max_size=BLOCKS, unique=True))
    first = data.draw(ids)
    run = [(first + index) % BLOCKS for index in range(len(target_ids))]
    drawn = data.draw(st.lists(ids, min_size=len(target_ids), max_size=len(target_ids)))
    source_ids = data.draw(st.sampled_from([run, drawn]))
    target = bytearray(BLOCKS * size)
    expected = bytearray(BLOCKS * size)
    for source_id, target_id in zip(source_ids, target_ids, strict=True):
        expected[target_id * size : (target_id + 1) * size] = source[source_id * size : (source_id + 1) * size]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(copies, "PIECE_BYTES", piece_bytes)
        BlockCopies(memoryview(source), memoryview(target), size).copy(source_ids, target_ids)
    assert target == expected


@pytest.mark.parametrize(("source_ids", "target_ids"), [([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0, 1], [0, 2])])
def test_blocks_that_are_not_there_are_refused_before_anything_is_written(
    source_ids: list[int], target_ids: list[int]
) -> None:
    target = bytearray(2 * 8)
    with pytest.raises(ValueError, match=r"block_ids: .* are not all in"):
        BlockCopies(memoryview(bytes([7]) * 3 * 8), memoryview(target), 8).copy(source_ids, target_ids)
    assert not any(target)


def test_blocks_that_follow_each_other_in_both_memories_are_one_copy() -> None:
    pairs = list(neighbors([4, 5, 6, 8, 0, 1], [0, 1, 2, 3, 4, 6]))
    assert pairs == [(4, 0, 3), (8, 3, 1), (0, 4, 1), (1, 6, 1)]
