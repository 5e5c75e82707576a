"""Attention over paged KV from `kernels.gpu_plans`, whose lists of work are not looked at.

Legend: T tokens, R rows, B rows of one length, Q queries of each, H query heads, K kv heads, G = H / K, D head dim, N
blocks in memory, W columns of the block tables, S slots, L keys of a piece.
"""
# ruff: noqa: N803, N806

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch

from ..gpu_plans.decode import DecodePlan
from ..gpu_plans.prefill import PrefillPlan
from ..paged_attention import AttentionPlan, AttentionRow, AttentionShape, paged_attention_reference

Attend = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        Sequence[AttentionRow],
        AttentionShape,
        torch.Tensor,
        torch.Tensor | None,
    ],
    None,
]
"""(queries [T, H, D], layer [N, 2, K, S, D], tables [R, W], R rows, shape, results [T, H, D] to be written, scales
[2, K] of a narrow layer)."""
_PIECE_BYTES = 64 * 2**20
"""Keys, values and scores that are held at a time, where they are of more than one block a row: what is computed with
does not grow with the context, so that a profiled step knows it.
"""


def decode_attention(
    attend: Attend,
    q_BHD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    tables_BW: torch.Tensor,
    plan: DecodePlan,
    shape: AttentionShape,
    out_BHD: torch.Tensor,
    scales_2K: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query a row, at position length - 1; the result of a row of length 0 is 0."""
    lengths = plan.lengths_B.tolist()
    rows = [AttentionRow(index, length - 1, 1, ()) for index, length in enumerate(lengths) if length]
    out_BHD.zero_()
    if len(rows) < len(lengths):
        tables_BW = tables_BW[plan.lengths_B > 0]
    attend(q_BHD, layer_N2KSD, tables_BW, rows, shape, out_BHD, scales_2K)
    return out_BHD


def prefill_attention(
    attend: Attend,
    q_THD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    tables_RW: torch.Tensor,
    plan: PrefillPlan,
    shape: AttentionShape,
    out_THD: torch.Tensor,
    scales_2K: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plan's rows; other tokens of `out_THD` stay as they are."""
    rows = [AttentionRow(offset, start, length, ()) for offset, start, length in plan.rows_R3.tolist()]
    attend(q_THD, layer_N2KSD, tables_RW, rows, shape, out_THD, scales_2K)
    return out_THD


def attend_reference(
    q_THD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    tables_RW: torch.Tensor,
    rows: Sequence[AttentionRow],
    shape: AttentionShape,
    out_THD: torch.Tensor,
    scales_2K: torch.Tensor | None = None,
) -> None:
    """An `Attend`: the formula."""
    named = [dataclasses.replace(row, block_ids=table) for row, table in zip(rows, tables_RW.tolist(), strict=True)]
    plan = AttentionPlan(rows=tuple(named), decode=(), prefill=())
    results = paged_attention_reference(q_THD, layer_N2KSD, plan, shape, scales_2K=scales_2K)
    for row in rows:
        tokens = slice(row.offset, row.offset + row.length)
        out_THD[tokens] = results[tokens].to(out_THD.dtype)


def attend_torch(
    q_THD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    tables_RW: torch.Tensor,
    rows: Sequence[AttentionRow],
    shape: AttentionShape,
    out_THD: torch.Tensor,
    scales_2K: torch.Tensor | None = None,
) -> None:
    """An `Attend`: neighbors of one length together, so that all rows of a decode step are."""
    first = 0
    for length, alike in itertools.groupby(rows, key=lambda row: row.length):
        group = list(alike)
        tables_BW, first = tables_RW[first : first + len(group)], first + len(group)
        places = torch.tensor([(row.offset, row.start) for row in group], device=q_THD.device)
        steps = torch.arange(length, device=q_THD.device)
        tokens_BQ, positions_BQ = (places[:, side, None] + steps for side in (0, 1))
        oldest = 0 if shape.window is None else max(0, min(row.start for row in group) - shape.window + 1)
        blocks = range(oldest // shape.block_size, -(-(max(row.start for row in group) + length) // shape.block_size))
        attended = _attended(q_THD[tokens_BQ].float(), layer_N2KSD, tables_BW, positions_BQ, blocks, shape, scales_2K)
        out_THD[tokens_BQ] = attended.to(out_THD.dtype)


def _attended(
    q_BQHD: torch.Tensor,
    layer_N2KSD: torch.Tensor,
    tables_BW: torch.Tensor,
    positions_BQ: torch.Tensor,
    blocks: range,
    shape: AttentionShape,
    scales_2K: torch.Tensor | None,
) -> torch.Tensor:
    """[B, Q, H, D] float32 -> the same. `blocks`: columns of the tables that any query sees something of. Piece by
    piece with an online softmax (FlashAttention-2, algorithm 1).
    """
    batch, queries, heads, dim = q_BQHD.shape
    size, groups = shape.block_size, shape.num_heads // shape.num_kv_heads
    q = q_BQHD.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3) / math.sqrt(dim)  # [B, K, G*Q, D]
    total = torch.zeros_like(q[..., :1])
    top, acc = torch.full_like(total, -math.inf), torch.zeros_like(q)
    block_bytes = 4 * batch * size * (4 * shape.num_kv_heads * dim + 2 * heads * queries)
    count = max(1, _PIECE_BYTES // block_bytes)
    for first in blocks[::count]:
        ids = tables_BW[:, first : min(first + count, blocks.stop)]
        k, v = _gathered(layer_N2KSD, ids, scales_2K)
        keys = torch.arange(first * size, first * size + k.shape[2], device=q.device)
        hidden_BQL = keys > positions_BQ[..., None]
        if shape.window is not None:
            hidden_BQL |= keys <= positions_BQ[..., None] - shape.window
        v = v.masked_fill(hidden_BQL.all(1)[:, None, :, None], 0.0)  # what is nobody's may be NaN
        scores = q @ k.transpose(2, 3)
        scores.unflatten(2, (groups, queries)).masked_fill_(hidden_BQL[:, None, None], -math.inf)
        peak = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = peak.clamp(min=torch.finfo(peak.dtype).min)  # of a query that has seen nothing yet
        fade, weights = (top - base).exp(), (scores - base).exp()
        total = total * fade + weights.sum(-1, keepdim=True)
        acc, top = acc * fade + weights @ v, peak
    return (acc / total).unflatten(2, (groups, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _gathered(
    layer_N2KSD: torch.Tensor, ids_BW: torch.Tensor, scales_2K: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some columns of the block tables, [B, K, L, D] float32 each."""
    if scales_2K is None:
        k, v = layer_N2KSD[ids_BW].permute(2, 0, 3, 1, 4, 5).flatten(3, 4).float()
        return k, v
    stored = layer_N2KSD.view(torch.uint8)[ids_BW].view(layer_N2KSD.dtype)  # not every torch picks among float8
    k, v = stored.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).float().mul_(scales_2K[:, None, :, None, None])
    return k, v
