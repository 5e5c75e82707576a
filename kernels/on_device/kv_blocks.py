"""Moves of KV blocks as `kernels.gpu.kv_blocks` has them, by torch's operations: what is moved is held twice meanwhile,
piece by piece. Ids must not be negative. The two memories of `copy_blocks` and `repack` may lie on different devices.

A KV memory is [N, L, 2, K, S, D]: blocks, layers, keys and values, kv heads, slots, head dim.
"""

from __future__ import annotations

import torch

from ..gpu_plans.moves import Part

_PIECE_BYTES = 64 * 2**20


def gather_blocks(kv: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Blocks `ids` [n] int64 of `kv` [N, …] into one contiguous [n, …]."""
    if out is None:
        out = torch.empty((len(ids), *kv.shape[1:]), dtype=kv.dtype, device=kv.device)
    torch.index_select(_as_bytes(kv), 0, ids, out=_as_bytes(out))
    return out


def scatter_blocks(packed: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor) -> None:
    """A contiguous [n, …] into blocks `ids` [n] int64 of `kv` [N, …]."""
    _as_bytes(kv).index_copy_(0, ids, _as_bytes(packed))


def copy_blocks(source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor) -> None:
    """Blocks `source_ids` of one memory into blocks `target_ids` of another (or the same: the two must not overlap)."""
    count = max(1, _PIECE_BYTES // (source[0].numel() * source.element_size()))
    for origin, goal in zip(source_ids.split(count), target_ids.split(count), strict=True):
        packed = gather_blocks(source, origin.to(source.device))
        scatter_blocks(packed.to(target.device), target, goal.to(target.device))


def repack(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor, part: Part
) -> None:
    """`part` of blocks `source_ids` of `source` [N, L, 2, K, S, D] into blocks `target_ids` of `target`; both of one
    dtype and head dim, everything else may differ.
    """
    layers, heads = part.num_layers, part.num_heads
    origin = _as_bytes(source).narrow(1, part.source_layer, layers).narrow(3, part.source_head, heads)
    goal = _as_bytes(target).narrow(1, part.target_layer, layers).narrow(3, part.target_head, heads)
    count = max(1, _PIECE_BYTES // max(1, 2 * layers * heads * origin.shape[5]))
    tokens = range(part.first_token, part.first_token + part.num_tokens)
    for first in tokens[::count]:
        taken = range(first, min(first + count, tokens.stop))
        blocks, slots = _places(taken, source_ids, origin)
        packed = origin[blocks, :, :, :, slots].to(goal.device)
        blocks, slots = _places(taken, target_ids, goal)
        goal[blocks, :, :, :, slots] = packed


def _places(tokens: range, ids: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens' blocks and slots, where the memory lies."""
    index, size = torch.arange(tokens.start, tokens.stop, device=memory.device), memory.shape[4]
    return ids.to(memory.device)[index // size], index % size


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The same memory: not every operation takes every dtype."""
    return x.view(torch.uint8)
