"""Ragged batches over paged KV for the tests of both attention kernels: what nobody may read is NaN, or no block."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tandem.kernels.paged_attention import AttentionRow, AttentionShape, paged_attention_reference, plan_attention

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Batch:
    """Tensors on the device, rows and shape of a step."""

    shape: AttentionShape
    rows: tuple[AttentionRow, ...]
    q: torch.Tensor
    layer: torch.Tensor
    """A layer of a memory of three, as the engine sees it: strided."""
    tables: torch.Tensor

    def check(self, out: torch.Tensor, layer: torch.Tensor | None = None) -> None:
        """Against the reference over `layer` (the batch's own by default)."""
        cpu = (self.layer if layer is None else layer).cpu()
        expected = paged_attention_reference(self.q.cpu(), cpu, plan_attention(self.rows, self.shape), self.shape)
        bound = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(out.cpu().float(), expected, rtol=bound, atol=bound)


def batch(
    stretches: Sequence[tuple[int, int]],
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Rows of (start, length), their blocks scattered. A row of length 0 is in the tables and in no row."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(start + length) // shape.block_size) for start, length in stretches]
    ids = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    kv = torch.full((len(ids), 3, 2, shape.num_kv_heads, shape.block_size, shape.head_dim), math.nan)
    tables = torch.full((len(stretches), max(counts) + 1), -(2**20), dtype=torch.int32)
    rows, offset = [], 0
    for index, ((start, length), count) in enumerate(zip(stretches, counts, strict=True)):
        oldest = 0 if shape.window is None else max(0, start - shape.window + 1)
        blocks = [ids.pop() for _ in range(count)]
        for position in range(oldest, start + length):
            where = (blocks[position // shape.block_size], 1, slice(None), slice(None), position % shape.block_size)
            kv[where] = torch.randn(2, shape.num_kv_heads, shape.head_dim, generator=generator)
        seen = slice(oldest // shape.block_size, count)
        tables[index, seen] = torch.tensor(blocks[seen], dtype=torch.int32)
        if length:
            rows.append(AttentionRow(offset, start, length, blocks))
        offset += max(length, 1)
    wide = torch.randn(offset, shape.num_heads + 2, shape.head_dim, generator=generator)
    q = wide.to(device, dtype)[:, : shape.num_heads]  # as the projection of queries, keys and values leaves them
    return Batch(shape, tuple(rows), q, kv.to(device, dtype)[:, 1], tables.to(device))


def narrowed(given: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The batch's layer in int8 or float8 with scales [2, K]; and what that layer then holds, as float32."""
    wide = given.layer.float().nan_to_num(0.0)
    largest = wide.abs().amax(dim=(0, 3, 4))
    top = 127.0 if dtype == torch.int8 else 448.0
    scales = largest / top
    scaled = wide / scales[None, :, :, None, None]
    stored = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return stored, scales, stored.float() * scales[None, :, :, None, None]


def far_apart(blocks: torch.Tensor, stride: int) -> torch.Tensor:
    """The same [N, 2, K, S, D], `stride` elements from block to block; on a CPU only what is written takes memory."""
    rest = torch.empty(blocks.shape[1:]).stride()
    extent = (len(blocks) - 1) * stride + blocks[0].numel()
    if blocks.is_cuda:
        flat = torch.empty(extent, dtype=blocks.dtype, device=blocks.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        flat = torch.frombuffer(mmap.mmap(-1, extent * blocks.element_size(), flags=flags), dtype=blocks.dtype)
    apart = flat.as_strided(blocks.shape, (stride, *rest))
    apart.copy_(blocks)
    return apart
