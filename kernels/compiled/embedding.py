"""Rows of a table by id, as float32: from a plain table, or from a packed weight that is the output head too.

A column of a packed weight lies scattered over its panel, one cache line a step. Against a step's products that costs
nothing, and tied embeddings need one copy of the table.

    ids     int64, one a row
    source  address of int64 fields (`TABLE`): kind, address of the data (PACKED: of `linear.describe`'s words), width
"""

from __future__ import annotations

from .packed import unpack_output
from .simd import W, add, load, load_bf16, load_int64, store
from .target import kernel

TABLE = 3
T_KIND, T_DATA, T_WIDTH = range(TABLE)
PLAIN_FLOAT, PLAIN_BF16, PACKED = range(3)


@kernel
def embed(
    source: int, ids: int, offset: int, first: int, last: int, out: int, out_stride: int, accumulate: int
) -> None:
    """Rows first … last-1 of `out` (bytes apart): = or += the table's rows ids + offset. Whole vectors."""
    kind, data = load_int64(source + 8 * T_KIND), load_int64(source + 8 * T_DATA)
    width = load_int64(source + 8 * T_WIDTH)
    for row in range(first, last):
        index, target = load_int64(ids + 8 * row) + offset, out + row * out_stride
        if kind == PACKED:
            unpack_output(data, index, target)
            continue
        for i in range(0, width, W):
            if kind == PLAIN_FLOAT:
                value = load(data + 4 * (index * width + i))
            else:
                value = load_bf16(data + 2 * (index * width + i))
            if accumulate:
                value = add(value, load(target + 4 * i))
            store(target + 4 * i, value)
