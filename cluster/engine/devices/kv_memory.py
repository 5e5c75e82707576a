"""KV memory of a device that computes in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....kvtransfer.layout import KVGroup, KVLayout
from ....kvtransfer.mapped.segment import KVSegment
from ....kvtransfer.store import KVStore
from ...models.config import ModelConfig

STORED_AS: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
"""Allowed dtypes of KV, and numpy's for their bits."""


class HostKVStore(KVStore):
    """KV memory that other processes may map, seen without a copy as one array and as bytes."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Zeroed memory for `num_blocks` blocks of a layout with one group."""
        (group,) = layout.groups
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (num_blocks, group.num_layers, 2, group.num_kv_heads, layout.block_size, group.head_dim)
        self.segment: KVSegment = KVSegment(layout, num_blocks)
        self._bytes = self.segment.blocks
        self.array: NDArray[np.generic] = np.frombuffer(self._bytes, dtype=STORED_AS[group.dtype]).reshape(shape)
        """[block, layer, 2, kv_head, slot, head_dim], writable; bfloat16 as uint16."""

    def commit(self) -> None:
        """Has every page found now, so that no request waits for it."""
        self.segment.commit()

    def close(self) -> None:
        """Closes the memory's descriptor; idempotent."""
        self.segment.close()

    def read_block(self, block_id: int) -> memoryview:
        return self._stretch(block_id).toreadonly()

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        view = memoryview(payload).cast("B")
        if len(view) != self.layout.block_bytes:
            raise ValueError(f"payload: {len(view)} bytes are not one block ({self.layout.block_bytes} bytes)")
        self._stretch(block_id)[:] = view

    def _stretch(self, block_id: int) -> memoryview:
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")
        size = self.layout.block_bytes
        return self._bytes[block_id * size : (block_id + 1) * size]


def kv_layout(config: ModelConfig, dtype: str, block_size: int) -> KVLayout:
    """The KV layout of a model: all layers in one group."""
    group = KVGroup(
        name="layers",
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )
    return KVLayout(block_size=block_size, groups=(group,))
