"""What all ranks of a worker, and all workers that hand KV to each other, have in common of narrow KV memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ...kvtransfer.layout import rank_heads
from .parallel.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowKV:
    """How KV of a whole model is held: stored = number / scale, rounded."""

    dtype: str
    """`int8` or `float8_e4m3`, as `KVLayout` names them."""
    scales: bytes
    """Float32 [L, 2, K], little-endian: of layers, of keys and of values, of KV heads."""

    @classmethod
    def by(cls, dtype: str, scales: NDArray[np.float32]) -> NarrowKV:
        """`scales`: [L, 2, K]."""
        return cls(dtype=dtype, scales=scales.astype("<f4").tobytes())

    def digest(self) -> str:
        """Hex; equal where equal numbers are stored alike."""
        return blake2b(self.scales, key=self.dtype.encode(), digest_size=16).hexdigest()

    def part(self, shard: Shard) -> NDArray[np.float32]:
        """[L, 2, K] of a rank's own layers and heads. ValueError for scales of a model of another shape."""
        whole = shard.config
        shape = (whole.num_layers, 2, whole.num_kv_heads)
        if len(self.scales) != 4 * np.prod(shape):
            raise ValueError(f"kv_scales: {len(self.scales) // 4} scales, allowed: {' x '.join(map(str, shape))}")
        scales = np.frombuffer(self.scales, "<f4").reshape(shape)
        heads = rank_heads(whole.num_kv_heads, shard.tensor_parallel, shard.place)
        own = scales[shard.layers.start : shard.layers.stop, :, heads.start : heads.stop]
        return own.astype(np.float32, order="C")
