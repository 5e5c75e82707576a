"""The machine's own pace at what a mapped handoff does, measured beside it."""

from __future__ import annotations

import mmap
import time

import numpy as np

from ...kvtransfer.layout import KVGroup, KVLayout
from ...kvtransfer.mapped.segment import KVSegment


class MemoryCopies:
    """The machine's own pace: blocks out of another mapping into memory that was written before, one thread, a call a
    block, every page of both in place. What processors hold of them is what they hold in a handoff: the source has
    just been written, in turn out of as many blocks as a worker has; its target was, when the turn was there last.
    """

    def __init__(self, token_bytes: int, block_size: int, pool_blocks: int) -> None:
        num_blocks = self._pool_blocks = pool_blocks
        group = KVGroup(name="words", num_layers=1, num_kv_heads=1, head_dim=token_bytes // 16, dtype="uint64")
        layout = KVLayout(block_size=block_size, groups=(group,))
        block_bytes = layout.block_bytes
        self._segment = KVSegment(layout, num_blocks)
        source = np.frombuffer(self._segment.blocks, dtype=np.uint8)
        source[:] = 1
        self._source = source.reshape(num_blocks, block_bytes)
        self._mapping = mmap.mmap(self._segment.fileno(), 0, prot=mmap.PROT_READ)
        skipped = self._mapping.size() - source.size
        mapped = np.frombuffer(self._mapping, dtype=np.uint8)[skipped - skipped % mmap.PAGESIZE :][: source.size]
        self._from = mapped.reshape(num_blocks, block_bytes)
        # Page-aligned, as every KV memory is: glibc's memcpy is four times slower on some processors where it is not.
        target = np.frombuffer(mmap.mmap(-1, num_blocks * block_bytes), dtype=np.uint8)
        target[:] = 2
        self._into = target.reshape(num_blocks, block_bytes)
        self._next = 0
        self.seconds(pool_blocks)

    def seconds(self, num_blocks: int) -> float:
        """What copying so many blocks once takes now: the best of three, so that a neighbor's slice of time does not
        make the handoff look good.
        """
        return min(self._once(num_blocks) for _ in range(3))

    def _once(self, num_blocks: int) -> float:
        ids = [(self._next + index) % self._pool_blocks for index in range(num_blocks)]
        self._next = (self._next + num_blocks) % self._pool_blocks
        for block_id in ids:
            self._source[block_id] = 3
        pairs = [(self._into[block_id], self._from[block_id]) for block_id in ids]
        begin_s = time.perf_counter()
        for into, block in pairs:
            into[:] = block
        return time.perf_counter() - begin_s
