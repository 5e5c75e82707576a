"""The memory seam of the handoff: how a transport reads and writes one block of KV, whatever device holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .layout import KVLayout
from .mapped.segment import KVSegment


class KVStore(ABC):
    """KV memory of one engine, addressed by block id. Calls come from transport threads while the engine computes; a
    caller may touch only blocks that it holds in the engine's block pool.
    """

    layout: KVLayout
    num_blocks: int
    segment: KVSegment | None = None
    """The memory itself, where it is host memory laid out to be shared; None: it is not."""

    @abstractmethod
    def read_block(self, block_id: int) -> memoryview:
        """The block's bytes (length `layout.block_bytes`), without a copy where the device allows it. Does not block
        for long. The view is valid only while the caller holds the block.
        """

    @abstractmethod
    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        """Overwrites the block. ValueError if `payload` is not exactly `layout.block_bytes` long."""
