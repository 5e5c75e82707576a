"""Writes one token's keys and values into its slot of the paged KV memory (reference: `kernels.kv_write`).

    x      address of a token's keys, float32 [K, D], its values [K, D] right behind them
    slot   address of the token's slot in the keys of kv head 0, in a layer of a block: [2, K, S, D] bfloat16 or float32

Rounded to nearest, ties to even, once: attention reads from this memory only.
"""

from __future__ import annotations

from .simd import W, load, load_float, store, store_bf16, store_bf16_float, store_float
from .target import kernel


@kernel
def kv_write(x: int, slot: int, kv_heads: int, head_dim: int, head_bytes: int, half: int) -> None:
    """Keys of all heads, then values; `head_bytes`: from one kv head's slots to the next's."""
    whole = head_dim // W * W
    for head in range(2 * kv_heads):
        source, target = x + 4 * head * head_dim, slot + head * head_bytes
        for i in range(0, whole, W):
            if half:
                store_bf16(target + 2 * i, load(source + 4 * i))
            else:
                store(target + 4 * i, load(source + 4 * i))
        for i in range(whole, head_dim):
            if half:
                store_bf16_float(target + 2 * i, load_float(source + 4 * i))
            else:
                store_float(target + 4 * i, load_float(source + 4 * i))
