"""Blocks out of one host memory into another, at the pace of the machine's own copy."""

from __future__ import annotations

from collections.abc import Sequence

from ..neighbors import neighbors

PIECE_BYTES = 384 * 2**10
"""Of one call. Smaller ones pay for the call; from the size of a processor's second-level cache on, glibc copies in
another way, which is a fifth to a third slower on AMD's."""


class BlockCopies:
    """From one memory of blocks, which lie one after another, into another one with blocks of the same size."""

    def __init__(self, source: memoryview, target: memoryview, block_bytes: int) -> None:
        """`target`: writable."""
        self._source = source
        self._target = target
        self._block_bytes = block_bytes

    def copy(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Each block to where it belongs, and nothing else. ValueError, and nothing is written, if there is no such
        block.
        """
        for ids, memory in ((source_ids, self._source), (target_ids, self._target)):
            blocks = len(memory) // self._block_bytes
            if ids and not 0 <= min(ids) <= max(ids) < blocks:
                raise ValueError(f"block_ids: {min(ids)}…{max(ids)} are not all in 0…{blocks - 1}")
        size, source, target = self._block_bytes, self._source, self._target
        for source_id, target_id, count in neighbors(source_ids, target_ids):
            ahead, end = (target_id - source_id) * size, (source_id + count) * size
            for begin in range(source_id * size, end, PIECE_BYTES):
                stop = min(begin + PIECE_BYTES, end)
                target[begin + ahead : stop + ahead] = source[begin:stop]
