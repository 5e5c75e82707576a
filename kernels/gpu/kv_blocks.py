"""KV blocks into and out of one contiguous buffer (what a transport sends), and between memories of different shapes
(what a handoff between workers of other TP, PP or block size needs). Bytes are moved, never numbers: any dtype.

A KV memory is [N, L, 2, K, S, D]: blocks, layers, keys and values, kv heads, slots, head dim; a block is one stretch.

The plain loops beside the kernels, `copy_blocks_reference` and `repack_reference`, are what tests hold them against.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu_plans.moves import Part
from .cubin import Build

BLOCK_WORDS = 1024
"""Words of one block that a program copies."""
REPACK_TOKENS = 32
"""Tokens of one head that a program moves."""


@triton.jit
def copy_blocks_kernel(
    source,
    target,
    source_ids,
    target_ids,
    source_stride,
    target_stride,
    words,
    FROM_IDS: tl.constexpr,
    TO_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of one block; strides and `words` in words. A negative id copies nothing."""
    i = tl.program_id(0).to(tl.int64)
    origin, goal = i, i
    if FROM_IDS:
        origin = tl.load(source_ids + i).to(tl.int64)
    if TO_IDS:
        goal = tl.load(target_ids + i).to(tl.int64)
    word = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = word < tl.where((origin < 0) | (goal < 0), 0, words)
    tl.store(
        target + goal * target_stride + word, tl.load(source + origin * source_stride + word, mask=inside), mask=inside
    )


_COUNTS = [
    *("first_token", "tokens", "heads", "source_slots", "target_slots"),
    *(f"{side}_first_{axis}" for side in ("source", "target") for axis in ("layer", "head")),
]
"""What differs from pull to pull and from peer to peer: variants would be compiled while a pull waits."""


@triton.jit(do_not_specialize=_COUNTS)
def repack_kernel(
    source,
    target,
    source_ids,
    target_ids,
    source_block,
    source_layer,
    source_side,
    source_head,
    target_block,
    target_layer,
    target_side,
    target_head,
    source_first_layer,
    target_first_layer,
    source_first_head,
    target_first_head,
    heads,
    source_slots,
    target_slots,
    first_token,
    tokens,
    words,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Some tokens of one head of one layer, keys or values. Strides in words; a slot is `words` words."""
    token = first_token + tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1).to(tl.int64)
    head, side, layer = row % heads, (row // heads) % 2, row // heads // 2
    here = token < first_token + tokens
    word = tl.arange(0, BLOCK_WORDS)
    origin = tl.load(source_ids + token // source_slots, mask=here, other=0).to(tl.int64) * source_block
    goal = tl.load(target_ids + token // target_slots, mask=here, other=0).to(tl.int64) * target_block
    origin += (
        (source_first_layer + layer) * source_layer + side * source_side + (source_first_head + head) * source_head
    )
    goal += (target_first_layer + layer) * target_layer + side * target_side + (target_first_head + head) * target_head
    inside = here[:, None] & (word < words)[None, :]
    value = tl.load(source + origin[:, None] + (token % source_slots)[:, None] * words + word[None, :], mask=inside)
    tl.store(target + goal[:, None] + (token % target_slots)[:, None] * words + word[None, :], value, mask=inside)


def gather_blocks(kv: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Blocks `ids` [n] int64 of `kv` [N, …] into one contiguous [n, …]."""
    if out is None:
        out = torch.empty((len(ids), *kv.shape[1:]), dtype=kv.dtype, device=kv.device)
    _copy(kv, out, ids, None, len(ids))
    return out


def scatter_blocks(packed: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor) -> None:
    """A contiguous [n, …] into blocks `ids` [n] int64 of `kv` [N, …]."""
    _copy(packed, kv, None, ids, len(ids))


def copy_blocks(source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor) -> None:
    """Blocks `source_ids` of one memory into blocks `target_ids` of another (or the same: the two must not overlap)."""
    _copy(source, target, source_ids, target_ids, len(source_ids))


def copy_blocks_reference(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor
) -> None:
    """Block by block; negative ids are left out."""
    for origin, goal in zip(source_ids.tolist(), target_ids.tolist(), strict=True):
        if origin >= 0 and goal >= 0:
            target[goal] = source[origin]


def repack(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor, part: Part
) -> None:
    """`part` of blocks `source_ids` of `source` [N, L, 2, K, S, D] into blocks `target_ids` of `target`; both of one
    dtype and head dim, everything else may differ.
    """
    if not part.num_tokens * part.num_layers * part.num_heads:
        return
    _check(source, target, source_ids, target_ids, part)
    origin, goal = _words(source), _words(target)
    words = origin.shape[5]
    assert words == goal.shape[5]
    rows = part.num_layers * 2 * part.num_heads
    repack_kernel[(triton.cdiv(part.num_tokens, REPACK_TOKENS), rows)](
        origin,
        goal,
        source_ids,
        target_ids,
        *origin.stride()[:4],
        *goal.stride()[:4],
        part.source_layer,
        part.target_layer,
        part.source_head,
        part.target_head,
        part.num_heads,
        source.shape[4],
        target.shape[4],
        part.first_token,
        part.num_tokens,
        words,
        BLOCK_TOKENS=REPACK_TOKENS,
        BLOCK_WORDS=triton.next_power_of_2(words),
        num_warps=4,
    )


def repack_reference(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor, part: Part
) -> None:
    """Token by token, layer by layer, head by head."""
    for token in range(part.first_token, part.first_token + part.num_tokens):
        origin = source[int(source_ids[token // source.shape[4]])]
        goal = target[int(target_ids[token // target.shape[4]])]
        for layer in range(part.num_layers):
            for head in range(part.num_heads):
                taken = origin[part.source_layer + layer, :, part.source_head + head, token % source.shape[4]]
                goal[part.target_layer + layer, :, part.target_head + head, token % target.shape[4]] = taken


def _copy(
    source: torch.Tensor,
    target: torch.Tensor,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    count: int,
) -> None:
    assert source.shape[1:] == target.shape[1:]
    assert source.dtype == target.dtype
    if not count:
        return
    assert source[0].is_contiguous()
    assert target[0].is_contiguous()
    origin, goal = (_words(x.flatten(1)) for x in (source, target))
    words = origin.shape[1]
    copy_blocks_kernel[(count, triton.cdiv(words, BLOCK_WORDS))](
        origin,
        goal,
        origin if source_ids is None else source_ids,
        goal if target_ids is None else target_ids,
        origin.stride(0),
        goal.stride(0),
        words,
        FROM_IDS=source_ids is not None,
        TO_IDS=target_ids is not None,
        BLOCK=BLOCK_WORDS,
        num_warps=4,
    )


def _words(x: torch.Tensor) -> torch.Tensor:
    """The same memory in the widest integers that every row of the last dimension is a whole number of."""
    row_bytes = x.shape[-1] * x.element_size()
    fits = [x.storage_offset() * x.element_size(), row_bytes, *(step * x.element_size() for step in x.stride()[:-1])]
    for dtype in (torch.int64, torch.int32, torch.int16):
        if dtype.itemsize >= x.element_size() and not any(size % dtype.itemsize for size in fits):
            return x.view(dtype)
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _check(
    source: torch.Tensor, target: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor, part: Part
) -> None:
    assert source.dtype == target.dtype
    assert source.shape[5] == target.shape[5]
    last = part.first_token + part.num_tokens
    sides = (
        (source, source_ids, part.source_layer, part.source_head),
        (target, target_ids, part.target_layer, part.target_head),
    )
    for memory, ids, layer, head in sides:
        assert layer + part.num_layers <= memory.shape[1]
        assert head + part.num_heads <= memory.shape[3]
        assert last <= len(ids) * memory.shape[4]
        assert memory.stride(5) == 1
        assert memory.stride(4) == memory.shape[5]


_REPACKED = ("block", "layer", "side", "head")
SHIPPED = (
    *(
        Build(
            label=label,
            kernel=copy_blocks_kernel,
            signature={
                **dict.fromkeys(("source", "target", "source_ids", "target_ids"), "*i64"),
                **dict.fromkeys(("source_stride", "target_stride", "words"), "i32"),
            },
            constants={"FROM_IDS": from_ids, "TO_IDS": to_ids, "BLOCK": BLOCK_WORDS},
            num_warps=4,
            divisible=("source_stride", "target_stride", "words"),
        )
        for label, from_ids, to_ids in (("gather", True, False), ("scatter", False, True), ("copy", True, True))
    ),
    Build(
        label="256-byte rows",
        kernel=repack_kernel,
        signature={
            **dict.fromkeys(("source", "target", "source_ids", "target_ids"), "*i64"),
            **{f"{side}_{axis}": "i32" for side in ("source", "target") for axis in _REPACKED},
            **{f"{side}_first_{axis}": "i32" for side in ("source", "target") for axis in ("layer", "head")},
            **dict.fromkeys(("heads", "source_slots", "target_slots", "first_token", "tokens", "words"), "i32"),
        },
        constants={"BLOCK_TOKENS": REPACK_TOKENS, "BLOCK_WORDS": 32},
        num_warps=4,
        divisible=(*(f"{side}_{axis}" for side in ("source", "target") for axis in _REPACKED), "words"),
    ),
)
