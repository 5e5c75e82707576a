"""The machine's own pace at what a mapped handoff does, measured beside it."""

from __future__ import annotations

import mmap
import time

import numpy as np

from ...kvtransfer.layout import KVGroup, KVLayout
from ...kvtransfer.mapped.segment import KVSegment


class MemoryCopies:
    """The machine's own pace: blocks out of another mapping into memory that was written before, one thread, a call a
    block, every page of both in place.
    """

    def __init__(self, token_bytes: int, block_size: int, num_blocks: int) -> None:
        group = KVGroup(name="words", num_layers=1, num_kv_heads=1, head_dim=token_bytes // 16, dtype="uint64")
        layout = KVLayout(block_size=block_size, groups=(group,))
        block_bytes = layout.block_bytes
        self._segment = KVSegment(layout, num_blocks)
        source = np.frombuffer(self._segment.blocks, dtype=np.uint8)
        source[:] = 1
        self._mapping = mmap.mmap(self._segment.fileno(), 0, prot=mmap.PROT_READ)
        skipped = self._mapping.size() - source.size
        mapped = np.frombuffer(self._mapping, dtype=np.uint8)[skipped - skipped % mmap.PAGESIZE :][: source.size]
        self._from = mapped.reshape(num_blocks, block_bytes)
        # Page-aligned, as every KV memory is: glibc's memcpy is four times slower on some processors where it is not.
        target = np.frombuffer(mmap.mmap(-1, num_blocks * block_bytes), dtype=np.uint8)
        target[:] = 2
        self._into = target.reshape(num_blocks, block_bytes)
        self.seconds()

    def seconds(self) -> float:
        """What copying all blocks once takes now: the best of three, so that a neighbor's slice of time does not make
        the handoff look good.
        """
        return min(self._once() for _ in range(3))

    def _once(self) -> float:
        begin_s = time.perf_counter()
        for into, block in zip(self._into, self._from, strict=True):
            into[:] = block
        return time.perf_counter() - begin_s
