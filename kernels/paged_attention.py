"""Causal attention of a ragged batch over paged KV, with grouped query heads and an optional sliding window.

Legend: T tokens of the step, B decode rows, N blocks in memory, H query heads, K kv heads (query head h reads kv head
h // (H/K)), S slots of a block, D head dim, L gathered key positions.

`plan_attention` arranges a step once; `paged_attention_cpu` then runs per layer. A row is a stretch of one sequence:
`length` queries at positions start … start+length-1, each seeing every position up to its own (with a window W: the
last W of them, its own included). Rows of one token are gathered together, in groups of similar context so that
padding stays small and a group's keys and values stay in cache; longer rows go one by one, in tiles of queries, each
tile over no more keys than its last query sees. Keys and values always come from the paged memory, also those of this
step, so that nothing depends on how a prompt was cut. Products, sums and softmax are float32.
"""
# ruff: noqa: N803, N806, N815

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_GROUP_BYTES = 4 * 2**20
"""Gathered float32 keys and values of one group of decode rows: what stays in cache between the copy and the products
(32 rows of 256 to 512 tokens took a fifth to a half less time than with 8 or 16 MiB)."""
_TILE_QUERIES = 64
_TILE_BYTES = 8 * 2**20
"""Scores of one tile of prefill queries."""


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One stretch: `offset` of its first token in the step, position `start` of it, `length` tokens, block table."""

    offset: int
    start: int
    length: int
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What planning must know about a model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one token with the same number of gathered blocks."""

    tokens_B: torch.Tensor | None
    """Where the rows lie among the step's tokens; None: they are all of them, in order."""
    blocks: torch.Tensor
    """[B * blocks per row] ids, row by row."""
    mask_B11L: torch.Tensor | None
    """0 or -inf to add to the scores; None: every gathered position counts."""
    size: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries first … first+count-1 of a stretch over gathered keys low … high-1."""

    first: int
    count: int
    low: int
    high: int
    causal: torch.Tensor
    """[count, count], added to the scores of the last `count` keys."""
    expired: torch.Tensor | None
    """[count, n], added to the scores of the first n keys: those that leave the window within the tile."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A row of several tokens."""

    offset: int
    blocks: torch.Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A step's attention, ready to run in every layer."""

    rows: tuple[AttentionRow, ...]
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Views of scratch memory for the keys and values of some block tables of equal length."""

    stored: torch.Tensor
    """[rows * blocks, 2, K, S, D], as in memory."""
    by_head: torch.Tensor
    """The same, seen as [2, rows, K, blocks, S, D]."""
    wide: torch.Tensor
    """[2, rows, K, blocks, S, D] float32, contiguous."""
    k: torch.Tensor
    """`wide`'s keys, [rows * K, L, D]."""
    k_transposed: torch.Tensor
    v: torch.Tensor


class Workspace:
    """Scratch memory for `paged_attention_cpu`, one per model; what it holds is valid until the next layer.

    It grows to its high-water mark: large tensors made anew every layer cost a page fault per 4 KiB. The views are kept
    too: at batch 1 making them in every layer costs as much as the products.
    """

    _MAX_VIEWS = 64

    def __init__(self) -> None:
        self._stored = torch.empty(0)
        self._wide = torch.empty(0)
        self._views: dict[tuple[int, int, torch.Size], Gathered] = {}

    def gathered(self, layer_N2KSD: torch.Tensor, blocks: int, rows: int) -> Gathered:
        """Room for `blocks` blocks of a layer, in `rows` tables."""
        key = (blocks, rows, layer_N2KSD.shape[1:])
        views = self._views.get(key)
        if views is None or views.stored.dtype != layer_N2KSD.dtype:
            views = self._views[key] = self._make(layer_N2KSD, blocks, rows)
        return views

    def _make(self, layer_N2KSD: torch.Tensor, blocks: int, rows: int) -> Gathered:
        _, two, heads, slots, dim = layer_N2KSD.shape
        count = blocks * two * heads * slots * dim
        grows = self._wide.numel() < count or self._stored.dtype != layer_N2KSD.dtype
        if grows:
            self._stored = torch.empty(count, dtype=layer_N2KSD.dtype)
            self._wide = torch.empty(count)
        if grows or len(self._views) >= self._MAX_VIEWS:
            self._views.clear()  # views of the old memory would keep it alive
        per_row = blocks // rows
        stored = self._stored[:count].view(blocks, two, heads, slots, dim)
        wide = self._wide[:count].view(two, rows, heads, per_row, slots, dim)
        k, v = wide.view(two, rows * heads, per_row * slots, dim)
        by_head = stored.view(rows, per_row, two, heads, slots, dim).permute(2, 0, 3, 1, 4, 5)
        return Gathered(stored, by_head, wide, k, k.transpose(1, 2), v)


def plan_attention(rows: Sequence[AttentionRow], shape: AttentionShape) -> AttentionPlan:
    """Arranges rows into decode groups and prefill tiles. Pure; one call per step."""
    singles = [row for row in rows if row.length == 1]
    prefill = tuple(_plan_stretch(row, shape) for row in rows if row.length > 1)
    decode: list[DecodeGroup] = []
    spans = {id(row): _span(row, shape) for row in singles}
    pending = sorted(singles, key=lambda row: spans[id(row)][1] - spans[id(row)][0], reverse=True)
    block_bytes = 2 * shape.num_kv_heads * shape.block_size * shape.head_dim * 4
    while pending:
        first, last = spans[id(pending[0])]
        width = last - first
        size = max(1, min(len(pending), _GROUP_BYTES // (width * block_bytes)))
        group, pending = pending[:size], pending[size:]
        if not decode and not pending and not prefill:
            group = list(rows)  # the usual decode step: all rows in one group, in their order
        decode.append(_plan_group(group, [spans[id(row)] for row in group], width, shape, len(rows)))
    return AttentionPlan(rows=tuple(rows), decode=tuple(decode), prefill=prefill)


def _span(row: AttentionRow, shape: AttentionShape) -> tuple[int, int]:
    """First block that the row's first query sees, and the block after its last query's."""
    oldest = 0 if shape.window is None else max(0, row.start - shape.window + 1)
    return oldest // shape.block_size, -(-(row.start + row.length) // shape.block_size)


def _plan_group(
    rows: Sequence[AttentionRow],
    spans: Sequence[tuple[int, int]],
    width: int,
    shape: AttentionShape,
    step_rows: int,
) -> DecodeGroup:
    ids: list[int] = []
    for row, (first, last) in zip(rows, spans, strict=True):
        ids.extend(row.block_ids[first:last])
        ids.extend([row.block_ids[first]] * (width - last + first))  # padding is masked, and never another's KV
    bases = torch.tensor([[first * shape.block_size] for first, _ in spans])
    queries = torch.tensor([[row.start] for row in rows])
    keys_BL = bases + torch.arange(width * shape.block_size)
    hidden = keys_BL > queries
    if shape.window is not None:
        hidden |= keys_BL <= queries - shape.window
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)[:, None, None, :] if hidden.any() else None
    in_order = len(rows) == step_rows and all(row.offset == index for index, row in enumerate(rows))
    tokens = None if in_order else torch.tensor([row.offset for row in rows])
    return DecodeGroup(tokens_B=tokens, blocks=torch.tensor(ids), mask_B11L=mask, size=len(rows))


def _plan_stretch(row: AttentionRow, shape: AttentionShape) -> Stretch:
    first_block, last_block = _span(row, shape)
    base = first_block * shape.block_size
    widest = row.start + row.length - base
    count = max(1, min(_TILE_QUERIES, _TILE_BYTES // (4 * shape.num_heads * widest)))
    triangle = torch.full((count, count), -math.inf).triu_(1)
    tiles = []
    for first in range(0, row.length, count):
        size = min(count, row.length - first)
        position = row.start + first
        low = base if shape.window is None else max(base, position - shape.window + 1)
        high = position + size
        expired = None
        if shape.window is not None and (columns := high - shape.window - low) > 0:
            queries = torch.arange(position, high)[:, None]
            keys = torch.arange(low, low + columns)
            expired = torch.zeros(size, columns).masked_fill_(keys <= queries - shape.window, -math.inf)
        tile = Tile(first, size, low - base, high - base, triangle[:size, :size], expired)
        tiles.append(tile)
    blocks = torch.tensor(list(row.block_ids[first_block:last_block]))
    return Stretch(offset=row.offset, blocks=blocks, tiles=tuple(tiles))


def paged_attention_cpu(
    q_THD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    plan: AttentionPlan,
    shape: AttentionShape,
    workspace: Workspace,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of every token of the step: [T, H, D] float32 -> [T, H, D] float32."""
    q_THD = q_THD * (1.0 / math.sqrt(shape.head_dim))
    if len(plan.decode) == 1 and plan.decode[0].tokens_B is None:
        return _decode(q_THD, layer_N2KSD, plan.decode[0], shape, workspace)
    out_THD = torch.empty_like(q_THD)
    for group in plan.decode:
        assert group.tokens_B is not None
        picked = q_THD.index_select(0, group.tokens_B)
        out_THD.index_copy_(0, group.tokens_B, _decode(picked, layer_N2KSD, group, shape, workspace))
    for stretch in plan.prefill:
        _prefill(q_THD, layer_N2KSD, stretch, shape, workspace, out_THD)
    return out_THD


def _gather(
    layer_N2KSD: torch.Tensor,
    blocks: torch.Tensor,
    rows: int,
    workspace: Workspace,
) -> Gathered:
    """Keys and values of `rows` block tables of equal length, widened and contiguous per head."""
    views = workspace.gathered(layer_N2KSD, blocks.numel(), rows)
    torch.index_select(layer_N2KSD, 0, blocks, out=views.stored)
    views.wide.copy_(views.by_head)
    return views


def _decode(
    q_BHD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    group: DecodeGroup,
    shape: AttentionShape,
    workspace: Workspace,
) -> torch.Tensor:
    kv = _gather(layer_N2KSD, group.blocks, group.size, workspace)
    q = q_BHD.reshape(group.size * shape.num_kv_heads, -1, shape.head_dim)  # [B*K, H/K, D]
    scores = torch.bmm(q, kv.k_transposed)
    if group.mask_B11L is not None:
        scores.view(group.size, shape.num_kv_heads, -1, scores.shape[-1]).add_(group.mask_B11L)
    return torch.bmm(scores.softmax(-1), kv.v).view(group.size, shape.num_heads, shape.head_dim)


def _prefill(
    q_THD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    stretch: Stretch,
    shape: AttentionShape,
    workspace: Workspace,
    out_THD: torch.Tensor,
) -> None:
    kv = _gather(layer_N2KSD, stretch.blocks, 1, workspace)
    heads, dim = shape.num_kv_heads, shape.head_dim
    for tile in stretch.tiles:
        first = stretch.offset + tile.first
        q = q_THD[first : first + tile.count].view(tile.count, heads, -1, dim).permute(1, 2, 0, 3)
        q = q.reshape(heads, -1, dim)  # [K, H/K * count, D]
        keys, values = kv.k[:, tile.low : tile.high], kv.v[:, tile.low : tile.high]
        scores = torch.bmm(q, keys.transpose(1, 2))
        by_query = scores.view(heads, -1, tile.count, tile.high - tile.low)
        by_query[..., -tile.count :].add_(tile.causal)
        if tile.expired is not None:
            by_query[..., : tile.expired.shape[1]].add_(tile.expired)
        attended = torch.bmm(scores.softmax(-1), values).view(heads, -1, tile.count, dim)
        out_THD[first : first + tile.count] = attended.permute(2, 0, 1, 3).reshape(tile.count, -1, dim)


def paged_attention_reference(
    q_THD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    plan: AttentionPlan,
    shape: AttentionShape,
    workspace: Workspace | None = None,
    scales_2K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token by token and head by head, as the formula says; what a narrow memory holds, times `scales_2K`."""
    out_THD = torch.zeros_like(q_THD, dtype=torch.float32)
    per_group = shape.num_heads // shape.num_kv_heads
    for row in plan.rows:
        for t in range(row.length):
            position = row.start + t
            oldest = 0 if shape.window is None else max(0, position - shape.window + 1)
            where = [divmod(p, shape.block_size) for p in range(oldest, position + 1)]
            slots = torch.stack([layer_N2KSD[row.block_ids[b], :, :, s].float() for b, s in where])  # [L, 2, K, D]
            if scales_2K is not None:
                slots *= scales_2K[:, :, None]
            for head in range(shape.num_heads):
                k_LD, v_LD = slots[:, 0, head // per_group], slots[:, 1, head // per_group]
                scores = k_LD @ q_THD[row.offset + t, head].float() / math.sqrt(shape.head_dim)
                out_THD[row.offset + t, head] = scores.softmax(0) @ v_LD
    return out_THD
