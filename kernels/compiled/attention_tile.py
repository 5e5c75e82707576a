"""Register tiles of attention: a few query rows against four keys, and their weights times values; each one LLVM loop.

    half     keys and values are bfloat16, read as pairs: of 2 W elements first those at even places, then those at odd
             ones. Queries and results stand in that order too (`attention` turns it); else everything is in order.
    table    int64 addresses of a chunk's keys (or values), one a key
    D        head dim, padded to 4 W

A score is D/W vectors of products summed lane by lane, then one tree over the lanes; an output sums over keys in order.
Neither depends on how many rows a tile has, nor on whether keys were widened before (`half` False) or in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from .emit import (
    F32_VECTOR,
    FLOAT,
    I32_VECTOR,
    I64,
    VECTOR_BYTES,
    W,
    emit_fma,
    emit_prefetch,
    f32,
    load_as,
    operation,
    shuffle,
    splat,
    spread,
    store_as,
    widen_bf16_pairs,
)

KEYS = 4
"""Keys of one score tile."""
PARTS = 4
"""Vectors of values of one output tile: it covers 4 W of the head dim."""
_LINE_BYTES = 64


def _pair(b: ir.IRBuilder, address: Any, half: bool) -> tuple[Any, Any]:
    """Two vectors of 2 W stored elements."""
    if half:
        return widen_bf16_pairs(b, load_as(b, address, I32_VECTOR, 2))
    return load_as(b, address, F32_VECTOR, 4), load_as(b, b.add(address, I64(VECTOR_BYTES)), F32_VECTOR, 4)


def _sums(b: ir.IRBuilder, vectors: Sequence[Any]) -> Any:
    """Four vectors -> [4] float32, each one's sum over its lanes, in the tree (0+2)+(1+3) of every four lanes, then
    upper half onto lower half.
    """
    groups = [4 * g for g in range(W // 4)]

    def merged(left: Any, right: Any, lanes: Sequence[int]) -> Any:
        return shuffle(b, left, right, [g + lane + (W - 4 if lane > 3 else 0) for g in groups for lane in lanes])

    pairs = []
    for left, right in (vectors[:2], vectors[2:]):
        pairs.append(b.fadd(merged(left, right, (0, 4, 1, 5)), merged(left, right, (2, 6, 3, 7))))
    total = b.fadd(merged(pairs[0], pairs[1], (0, 1, 4, 5)), merged(pairs[0], pairs[1], (2, 3, 6, 7)))
    lanes = W
    while lanes > 4:
        lanes //= 2
        nothing = ir.Constant(total.type, ir.Undefined)
        low = shuffle(b, total, nothing, range(lanes))
        total = b.fadd(low, shuffle(b, total, nothing, range(lanes, 2 * lanes)))
    return total


@operation(types.UniTuple(f32, 2), f32, f32)
def split_pairs(b, x, y):  # type: ignore[no-untyped-def]
    """2 W neighbouring elements -> those at even places, those at odd places."""
    return shuffle(b, x, y, range(0, 2 * W, 2)), shuffle(b, x, y, range(1, 2 * W, 2))


@operation(types.UniTuple(f32, 2), f32, f32)
def join_pairs(b, even, odd):  # type: ignore[no-untyped-def]
    """The inverse of `split_pairs`."""
    places = [place for lane in range(W) for place in (lane, W + lane)]
    return shuffle(b, even, odd, places[:W]), shuffle(b, even, odd, places[W:])


def score_tile(rows: int, half: bool) -> Any:
    """Kernel function (q, q_stride, table, out, out_stride, D): float32 scores of `rows` queries and the `KEYS` keys at
    `table`, to `KEYS` neighbouring places of each row of `out`. Strides in bytes.
    """

    @intrinsic
    def tile(_context, q, q_stride, table, out, out_stride, head_dim):  # type: ignore[no-untyped-def]
        def generate(context: Any, b: ir.IRBuilder, _signature: Any, values: Sequence[Any]) -> Any:
            q, q_stride, table, out, out_stride, head_dim = values
            keys = [load_as(b, b.add(table, I64(8 * key)), I64, 8) for key in range(KEYS)]
            queries = [b.add(q, b.mul(q_stride, I64(row))) for row in range(rows)]
            before, loop, after = b.block, b.append_basic_block("dims"), b.append_basic_block("scored")
            b.branch(loop)
            b.position_at_end(loop)
            dim = b.phi(I64)
            dim.add_incoming(I64(0), before)
            sums = [[b.phi(F32_VECTOR) for _ in range(KEYS)] for _ in range(rows)]
            new: list[list[Any]] = [[None] * KEYS for _ in range(rows)]
            q_at, k_at = b.mul(dim, I64(4)), b.mul(dim, I64(2 if half else 4))
            for index, key in enumerate(keys):
                first, second = _pair(b, b.add(key, k_at), half)
                for row in range(rows):
                    at = b.add(queries[row], q_at)
                    total = emit_fma(b, load_as(b, at, F32_VECTOR, 4), first, sums[row][index])
                    at = b.add(at, I64(VECTOR_BYTES))
                    new[row][index] = emit_fma(b, load_as(b, at, F32_VECTOR, 4), second, total)
            after_dim = b.add(dim, I64(2 * W))
            dim.add_incoming(after_dim, loop)
            for row in range(rows):
                for index in range(KEYS):
                    sums[row][index].add_incoming(splat(F32_VECTOR, 0.0), before)
                    sums[row][index].add_incoming(new[row][index], loop)
            b.cbranch(b.icmp_signed("<", after_dim, head_dim), loop, after)
            b.position_at_end(after)
            for row in range(rows):
                store_as(b, b.add(out, b.mul(out_stride, I64(row))), _sums(b, new[row]), 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile


def _weigh_parts(
    b: ir.IRBuilder,
    half: bool,
    parts: range,
    weights: Sequence[Any],
    factors: Any,
    table: Any,
    ahead: Any,
    first: Any,
    last: Any,
    offset: Any,
    outs: Sequence[Any],
) -> None:
    """The loop over keys of `value_tile`, for some of its parts; `weights` and `outs` are the rows' addresses."""
    rows = range(len(outs))
    places = [[b.add(out, I64(part * VECTOR_BYTES)) for part in parts] for out in outs]
    start = []
    for row in rows:
        factor = spread(b, load_as(b, b.add(factors, I64(4 * row)), FLOAT, 4), W)
        start.append([b.fmul(load_as(b, place, F32_VECTOR, 4), factor) for place in places[row]])
    before, loop, after = b.block, b.append_basic_block("keys"), b.append_basic_block("weighed")
    b.branch(loop)
    b.position_at_end(loop)
    key = b.phi(I64)
    sums = [[b.phi(F32_VECTOR) for _ in parts] for _ in rows]
    new: list[list[Any]] = [[] for _ in rows]
    at = b.add(load_as(b, b.add(table, b.mul(key, I64(8))), I64, 8), offset)
    if half:
        near = b.add(load_as(b, b.add(ahead, b.mul(key, I64(8))), I64, 8), offset)
        for line in range(parts.start // 2 * VECTOR_BYTES, parts.stop // 2 * VECTOR_BYTES, _LINE_BYTES):
            emit_prefetch(b, b.add(near, I64(line)))
    key_at = b.mul(key, I64(4))
    of_rows = [spread(b, load_as(b, b.add(row, key_at), FLOAT, 4), W) for row in weights]
    for pair in range(parts.start // 2, parts.stop // 2):
        for value in _pair(b, b.add(at, I64(pair * VECTOR_BYTES * (1 if half else 2))), half):
            for row in rows:
                new[row].append(emit_fma(b, of_rows[row], value, sums[row][len(new[row])]))
    next_key = b.add(key, I64(1))
    key.add_incoming(first, before)
    key.add_incoming(next_key, loop)
    for row in rows:
        for index, total in enumerate(sums[row]):
            total.add_incoming(start[row][index], before)
            total.add_incoming(new[row][index], loop)
    b.cbranch(b.icmp_signed("<", next_key, last), loop, after)
    b.position_at_end(after)
    for row in rows:
        for place, value in zip(places[row], new[row], strict=True):
            store_as(b, place, value, 4)


def value_tile(rows: int, half: bool) -> Any:
    """Kernel function (weights, weights_stride, factors, table, ahead, first, last, offset, out, out_stride): of each
    row out = out * factor + sum over keys first … last-1 of weight[key] * value[key], for 4 W of the head dim.

    `weights`: float32, one a key of the chunk; `factors`: float32, one a row; `table`: addresses of the chunk's values,
    to which `offset` bytes are added. At least one key. `half`: as many bytes are fetched from where `ahead` points.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        _context, weights, weights_stride, factors, table, ahead, first, last, offset, out, out_stride
    ):
        def generate(context: Any, b: ir.IRBuilder, _signature: Any, values: Sequence[Any]) -> Any:
            weights, weights_stride, factors, table, ahead, first, last, offset, out, out_stride = values
            row_weights = [b.add(weights, b.mul(weights_stride, I64(row))) for row in range(rows)]
            outs = [b.add(out, b.mul(out_stride, I64(row))) for row in range(rows)]
            at_once = 2 if half and rows == 3 and W < 16 else PARTS  # what fits into 16 registers
            for begin in range(0, PARTS, at_once):
                parts = range(begin, begin + at_once)
                _weigh_parts(b, half, parts, row_weights, factors, table, ahead, first, last, offset, outs)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile
