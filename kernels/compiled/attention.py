"""Causal attention over paged KV (formula and reference: `kernels.paged_attention`), read where it lies.

Legend: G query heads of a kv head, D head dim, P padded head dim (a multiple of 4 W), S slots of a block, n query rows
of an item: its tokens times G.

An *item* is a tile of neighbouring tokens of one sequence, with one kv head. Keys come in chunks of `CHUNK` at absolute
positions. Of each chunk: scores of all n rows (lanes over D), the softmax's running maximum and sum (Milakov and
Gimelshein 2018, algorithm 3), values added to the rescaled outputs key by key. A key that a row does not see has weight
0 exactly, and adds nothing. So a token's result depends on its own position alone: not on the tile, the batch, the
chunk of the prompt, or the thread. With few rows, keys and values are widened in registers, and those of the next chunk
are fetched line by line meanwhile: blocks lie apart, where no processor looks ahead. With more, they are widened once,
into scratch memory that stays in the first-level cache.

`geometry` is the address of int64 fields (`GEOMETRY`); an item is int64 fields too (`ITEM`).
"""

from __future__ import annotations

import math

import numpy as np

from .attention_tile import KEYS, PARTS, join_pairs, score_tile, split_pairs, value_tile
from .simd import (
    VECTOR_BYTES,
    W,
    add,
    fma,
    full,
    load,
    load_bf16_float,
    load_bf16_pairs,
    load_float,
    load_int64,
    load_part,
    max_lanes,
    maximum,
    multiply,
    power_of_two,
    prefetch,
    rint,
    store,
    store_float,
    store_int64,
    store_part,
    subtract,
    sum_lanes,
    to_int,
    where_less,
    zeros,
)
from .target import kernel

CHUNK = 64
"""Keys of a chunk."""
TILE_ROWS = 48
"""Query rows that an item has at most, unless G alone is more."""
_WIDEN_ROWS = 7
"""From this many rows on, a chunk is widened into scratch memory."""
_LOWEST = np.float32(-1e30)
"""A running maximum before the first key: finite, so that exp(-inf - maximum) is 0 and never not a number."""

GEOMETRY = 12
Q, Q_STRIDE, OUT, OUT_STRIDE, TABLES, BLOCK_BYTES, SLOTS, KV_HEADS, GROUP, HEAD_DIM, HALF, WINDOW = range(GEOMETRY)
"""Queries and outputs [T, H * D] float32 (strides in bytes), block tables int64, bytes from one block to the next (all
layers), S, K, G, D, whether the memory is bfloat16, sliding window (0: none)."""

ITEM = 5
ITEM_TOKEN, ITEM_COUNT, ITEM_POSITION, ITEM_TABLE, ITEM_OUT = range(ITEM)
"""Row of the first token's queries, tokens, the first's position, where its block table begins, row of its output."""

_scores_1_half, _scores_2_half, _scores_3_half = (score_tile(rows, True) for rows in (1, 2, 3))
_scores_1, _scores_2, _scores_3 = (score_tile(rows, False) for rows in (1, 2, 3))
_values_1_half, _values_2_half, _values_3_half = (value_tile(rows, True) for rows in (1, 2, 3))
_values_1, _values_2, _values_3 = (value_tile(rows, False) for rows in (1, 2, 3))


def padded_head_dim(head_dim: int) -> int:
    """P."""
    return -(-head_dim // (PARTS * W)) * PARTS * W


def tile_tokens(group: int) -> int:
    """Tokens of an item."""
    return max(1, TILE_ROWS // group)


def scratch_bytes(group: int, head_dim: int) -> int:
    """Scratch memory that `attend` needs, 64-byte aligned."""
    rows = tile_tokens(group) * group
    padded = padded_head_dim(head_dim)
    return 4 * (2 * rows * padded + rows * CHUNK + 3 * (rows + 16) + 2 * CHUNK * padded) + 32 * CHUNK + 64


@kernel
def _stage_queries(
    q: int, stride: int, count: int, group: int, head_dim: int, padded: int, pairs: int, to: int
) -> None:
    """[count, G, D] -> [count * G, P], scaled by 1 / sqrt(D), padded with zeros; pairs: even places of 2 W first."""
    scale = full(np.float32(1.0) / math.sqrt(np.float32(head_dim)))
    for token in range(count):
        for head in range(group):
            source = q + token * stride + 4 * head * head_dim
            target = to + 4 * (token * group + head) * padded
            if pairs:
                for i in range(0, head_dim, 2 * W):
                    even, odd = split_pairs(load(source + 4 * i), load(source + 4 * i + VECTOR_BYTES))
                    store(target + 4 * i, multiply(even, scale))
                    store(target + 4 * i + VECTOR_BYTES, multiply(odd, scale))
            else:
                for i in range(0, padded, W):
                    part = load_part(source + 4 * i, min(W, head_dim - i)) if i < head_dim else zeros()
                    store(target + 4 * i, multiply(part, scale))


@kernel
def _write_outputs(
    sums: int, totals: int, count: int, group: int, head_dim: int, padded: int, pairs: int, out: int, stride: int
) -> None:
    """[count * G, P] divided by its rows' totals -> [count, G, D], in order again."""
    for token in range(count):
        for head in range(group):
            row = token * group + head
            source = sums + 4 * row * padded
            target = out + token * stride + 4 * head * head_dim
            factor = full(np.float32(1.0) / load_float(totals + 4 * row))
            if pairs:
                for i in range(0, head_dim, 2 * W):
                    low, high = join_pairs(load(source + 4 * i), load(source + 4 * i + VECTOR_BYTES))
                    store(target + 4 * i, multiply(low, factor))
                    store(target + 4 * i + VECTOR_BYTES, multiply(high, factor))
            else:
                for i in range(0, head_dim, W):
                    store_part(target + 4 * i, multiply(load(source + 4 * i), factor), min(W, head_dim - i))


@kernel
def _point(
    keys: int,
    to_value: int,
    table: int,
    kv: int,
    block_bytes: int,
    slots: int,
    slot_bytes: int,
    first: int,
    last: int,
    start: int,
) -> None:
    """Addresses of a chunk's keys and, `CHUNK` places behind, values. Keys' places outside first … last-1, and values'
    behind them, repeat an end.
    """
    index = (start + first) // slots
    slot = (start + first) - index * slots
    at = kv + load_int64(table + 8 * index) * block_bytes + slot * slot_bytes
    for place in range(first // KEYS * KEYS, first):
        store_int64(keys + 8 * place, at)
    for place in range(first, last):
        if slot == slots:
            slot = 0
            index += 1
            at = kv + load_int64(table + 8 * index) * block_bytes
        store_int64(keys + 8 * place, at)
        store_int64(keys + 8 * (CHUNK + place), at + to_value)
        slot += 1
        at += slot_bytes
    for place in range(last, CHUNK):
        store_int64(keys + 8 * place, at - slot_bytes)
        store_int64(keys + 8 * (CHUNK + place), at - slot_bytes + to_value)


@kernel
def _widen(table: int, first: int, last: int, head_dim: int, padded: int, half: int, to: int) -> None:
    """Copies a chunk's vectors first … last-1 to `to` [CHUNK, P] as float32, padded with zeros, and points at them."""
    for place in range(first, last):
        source, target = load_int64(table + 8 * place), to + 4 * place * padded
        if half and head_dim == padded:
            for i in range(0, head_dim, 2 * W):
                even, odd = load_bf16_pairs(source + 2 * i)
                store(target + 4 * i, even)
                store(target + 4 * i + VECTOR_BYTES, odd)
        elif half:
            for i in range(0, padded, W):
                store(target + 4 * i, zeros())
            for i in range(head_dim):
                store_float(target + 4 * i, load_bf16_float(source + 2 * i))
        else:
            for i in range(0, padded, W):
                part = load_part(source + 4 * i, min(W, head_dim - i)) if i < head_dim else zeros()
                store(target + 4 * i, part)
    for place in range(first // KEYS * KEYS, (last + KEYS - 1) // KEYS * KEYS):
        store_int64(table + 8 * place, to + 4 * min(max(place, first), last - 1) * padded)


@kernel(inline=True)
def _fetch(table, vector_bytes):  # type: ignore[no-untyped-def]
    """Asks for the `KEYS` vectors that `table` points at."""
    for key in range(KEYS):
        at = load_int64(table + 8 * key)
        for line in range(0, vector_bytes, 64):
            prefetch(at + line)


@kernel
def _score(
    q: int, rows: int, padded: int, half: int, table: int, ahead: int, first: int, last: int, scores: int
) -> None:
    """Scores of all rows and keys first … last-1, at least; tiles of three rows, the rest in two or one. Keys as they
    are stored (`half`): those of table `ahead`, of the next chunk, are fetched meanwhile.
    """
    row = 0
    stride = 4 * padded
    while row < rows:
        left = rows - row
        size = 3 if left == 3 or left > 4 else min(left, 2)
        queries, out = q + row * stride, scores + row * 4 * CHUNK
        for key in range(first // KEYS * KEYS, last, KEYS):
            at, to = table + 8 * key, out + 4 * key
            if half:
                if row == 0:
                    _fetch(ahead + 8 * key, 2 * padded)
                if size == 3:
                    _scores_3_half(queries, stride, at, to, 4 * CHUNK, padded)
                elif size == 2:
                    _scores_2_half(queries, stride, at, to, 4 * CHUNK, padded)
                else:
                    _scores_1_half(queries, stride, at, to, 4 * CHUNK, padded)
            elif size == 3:
                _scores_3(queries, stride, at, to, 4 * CHUNK, padded)
            elif size == 2:
                _scores_2(queries, stride, at, to, 4 * CHUNK, padded)
            else:
                _scores_1(queries, stride, at, to, 4 * CHUNK, padded)
        row += size


@kernel
def _weigh(
    weights: int,
    rows: int,
    padded: int,
    half: int,
    factors: int,
    table: int,
    ahead: int,
    first: int,
    last: int,
    sums: int,
) -> None:
    """Adds the weighted values of keys first … last-1 to the rescaled sums of all rows; tiles and `ahead` as in
    `_score`.
    """
    row = 0
    stride = 4 * padded
    while row < rows:
        left = rows - row
        size = 3 if left == 3 or left > 4 else min(left, 2)
        source, factor = weights + row * 4 * CHUNK, factors + 4 * row
        for i in range(0, padded, PARTS * W):
            offset, to = (2 if half else 4) * i, sums + row * stride + 4 * i
            if half:
                if size == 3:
                    _values_3_half(source, 4 * CHUNK, factor, table, ahead, first, last, offset, to, stride)
                elif size == 2:
                    _values_2_half(source, 4 * CHUNK, factor, table, ahead, first, last, offset, to, stride)
                else:
                    _values_1_half(source, 4 * CHUNK, factor, table, ahead, first, last, offset, to, stride)
            elif size == 3:
                _values_3(source, 4 * CHUNK, factor, table, ahead, first, last, offset, to, stride)
            elif size == 2:
                _values_2(source, 4 * CHUNK, factor, table, ahead, first, last, offset, to, stride)
            else:
                _values_1(source, 4 * CHUNK, factor, table, ahead, first, last, offset, to, stride)
        row += size


@kernel(inline=True)
def _exp(x):  # type: ignore[no-untyped-def]
    """e ** x for x <= 0, within 2 ulp; 0 below -86; NaN of NaN. As `simd.exp`, without what only larger x need."""
    clamped = maximum(full(np.float32(-86.0)), x)  # in this order, NaN stays
    n = rint(multiply(clamped, full(np.float32(1.4426950408889634))))
    r = fma(n, full(np.float32(2.12194440e-4)), fma(n, full(np.float32(-0.693359375)), clamped))
    p = fma(full(np.float32(1.9875691500e-4)), r, full(np.float32(1.3981999507e-3)))
    p = fma(p, r, full(np.float32(8.3334519073e-3)))
    p = fma(p, r, full(np.float32(4.1665795894e-2)))
    p = fma(p, r, full(np.float32(1.6666665459e-1)))
    p = fma(p, r, full(np.float32(5.0000001201e-1)))
    p = add(fma(p, multiply(r, r), r), full(np.float32(1.0)))
    return where_less(x, full(np.float32(-86.0)), zeros(), multiply(p, power_of_two(to_int(n))))


@kernel
def _soften(scores: int, first: int, last: int, maxima: int, totals: int, factors: int) -> None:
    """One row: scores -> weights exp(score - maximum), 0 outside first … last-1; brings running maximum and total up
    to date; writes the factor by which what was summed so far shrinks.
    """
    for place in range(max(0, min(first, CHUNK))):
        store_float(scores + 4 * place, -np.inf)
    for place in range(max(0, last), CHUNK):
        store_float(scores + 4 * place, -np.inf)
    highest = load(scores)
    for i in range(1, CHUNK // W):
        highest = maximum(highest, load(scores + i * VECTOR_BYTES))
    before = load_float(maxima)
    now = max(before, max_lanes(highest))
    shift = full(now)
    total = zeros()
    for i in range(CHUNK // W):
        weight = _exp(subtract(load(scores + i * VECTOR_BYTES), shift))
        store(scores + i * VECTOR_BYTES, weight)
        total = add(total, weight)
    factor = np.float32(1.0)
    if now != before:
        factor = max_lanes(_exp(full(before - now)))
    store_float(maxima, now)
    store_float(factors, factor)
    store_float(totals, load_float(totals) * factor + sum_lanes(total))


@kernel
def attend(geometry: int, kv: int, item: int, head: int, scratch: int) -> None:
    """softmax(q k^T / sqrt(D)) v of one item and kv head `head`. `kv`: block 0 in this layer, [2, K, S, D]."""
    group, head_dim = load_int64(geometry + 8 * GROUP), load_int64(geometry + 8 * HEAD_DIM)
    half, slots = load_int64(geometry + 8 * HALF), load_int64(geometry + 8 * SLOTS)
    window, kv_heads = load_int64(geometry + 8 * WINDOW), load_int64(geometry + 8 * KV_HEADS)
    q_stride, out_stride = load_int64(geometry + 8 * Q_STRIDE), load_int64(geometry + 8 * OUT_STRIDE)
    block_bytes = load_int64(geometry + 8 * BLOCK_BYTES)
    count, start = load_int64(item + 8 * ITEM_COUNT), load_int64(item + 8 * ITEM_POSITION)
    table = load_int64(geometry + 8 * TABLES) + 8 * load_int64(item + 8 * ITEM_TABLE)
    q = load_int64(geometry + 8 * Q) + load_int64(item + 8 * ITEM_TOKEN) * q_stride + 4 * head * group * head_dim
    out = load_int64(geometry + 8 * OUT) + load_int64(item + 8 * ITEM_OUT) * out_stride + 4 * head * group * head_dim
    padded = (head_dim + PARTS * W - 1) // (PARTS * W) * PARTS * W
    rows = count * group
    slot_bytes = (2 if half else 4) * head_dim
    pairs = 1 if half and padded == head_dim else 0
    widen = rows >= _WIDEN_ROWS or padded != head_dim
    keys, ahead = scratch, scratch + 16 * CHUNK
    queries = scratch + 32 * CHUNK
    sums = queries + 4 * rows * padded
    scores = sums + 4 * rows * padded
    wide = scores + 4 * rows * CHUNK
    maxima = wide + 8 * CHUNK * padded
    totals = maxima + 4 * rows
    factors = totals + 4 * rows
    _stage_queries(q, q_stride, count, group, head_dim, padded, pairs, queries)
    for i in range(0, rows * padded, W):
        store(sums + 4 * i, zeros())
    for row in range(rows):
        store_float(maxima + 4 * row, _LOWEST)
        store_float(totals + 4 * row, np.float32(0.0))
    oldest = max(0, start - window + 1) if window else 0
    kv += head * slots * slot_bytes
    to_value, origin = kv_heads * slots * slot_bytes, oldest // CHUNK * CHUNK
    last = min(CHUNK, start + count - origin)
    _point(keys, to_value, table, kv, block_bytes, slots, slot_bytes, oldest - origin, last, origin)
    while last > 0:
        first, after = max(0, oldest - origin), min(CHUNK, start + count - origin - CHUNK)
        if after > 0:
            _point(ahead, to_value, table, kv, block_bytes, slots, slot_bytes, 0, after, origin + CHUNK)
        else:
            ahead = keys
        if widen:
            _widen(keys, first, last, head_dim, padded, half, wide)
            _widen(keys + 8 * CHUNK, first, last, head_dim, padded, half, wide + 4 * CHUNK * padded)
        _score(queries, rows, padded, pairs and not widen, keys, ahead, first, last, scores)
        for token in range(count):
            begin = start + token - window + 1 - origin if window else 0
            end = start + token + 1 - origin
            for row in range(token * group, (token + 1) * group):
                _soften(scores + 4 * row * CHUNK, begin, end, maxima + 4 * row, totals + 4 * row, factors + 4 * row)
        values, next_values = keys + 8 * CHUNK, ahead + 8 * CHUNK
        _weigh(scores, rows, padded, pairs and not widen, factors, values, next_values, first, last, sums)
        keys, ahead = ahead, keys
        origin, last = origin + CHUNK, after
    _write_outputs(sums, totals, count, group, head_dim, padded, pairs, out, out_stride)
