"""KV memory without a device: for tests and the simulator."""

from __future__ import annotations

from .layout import KVLayout
from .mapped.segment import KVSegment
from .store import KVStore


class MemoryKVStore(KVStore):
    """`num_blocks` blocks of bytes, block-major."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.segment: KVSegment = KVSegment(layout, num_blocks)
        self._data = self.segment.blocks

    def read_block(self, block_id: int) -> memoryview:
        return self._slot(block_id).toreadonly()

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        if len(payload) != self.layout.block_bytes:
            raise ValueError(f"payload: {len(payload)} bytes, a block has {self.layout.block_bytes}")
        self._slot(block_id)[:] = payload

    def _slot(self, block_id: int) -> memoryview:
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")
        start = block_id * self.layout.block_bytes
        return self._data[start : start + self.layout.block_bytes]
