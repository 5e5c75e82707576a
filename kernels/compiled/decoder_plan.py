"""Where a step's tokens, keys and items of attention are, worked out once a step for all layers.

A row is a stretch of one sequence: `ROW` int64 words.
"""

from __future__ import annotations

from .attention import ITEM, ITEM_COUNT, ITEM_OUT, ITEM_POSITION, ITEM_TABLE, ITEM_TOKEN
from .simd import load_int64, store_int64
from .target import kernel

ROW = 4
ROW_OFFSET, ROW_START, ROW_LENGTH, ROW_TABLE = range(ROW)
"""Its first token in the step, that token's position, how many tokens, where its block table begins in the tables."""


@kernel
def _write_item(item: int, token: int, count: int, position: int, table: int, out: int) -> None:
    store_int64(item + 8 * ITEM_TOKEN, token)
    store_int64(item + 8 * ITEM_COUNT, count)
    store_int64(item + 8 * ITEM_POSITION, position)
    store_int64(item + 8 * ITEM_TABLE, table)
    store_int64(item + 8 * ITEM_OUT, out)


@kernel
def plan_rows(
    rows: int,
    count: int,
    tables: int,
    tile: int,
    slots: int,
    block_bytes: int,
    slot_bytes: int,
    positions: int,
    places: int,
    table_of: int,
    items: int,
) -> int:
    """Writes of every token its position, the place of its slot (`S_KV_PLACES`) and its row's table; and the items, of
    at most `tile` tokens each. Returns how many items.
    """
    written = 0
    for row in range(count):
        at = rows + 8 * ROW * row
        offset, start = load_int64(at + 8 * ROW_OFFSET), load_int64(at + 8 * ROW_START)
        length, table = load_int64(at + 8 * ROW_LENGTH), load_int64(at + 8 * ROW_TABLE)
        for i in range(length):
            position, token = start + i, offset + i
            block = load_int64(tables + 8 * (table + position // slots))
            store_int64(positions + 8 * token, position)
            store_int64(places + 8 * token, block * block_bytes + position % slots * slot_bytes)
            store_int64(table_of + 8 * token, table)
        for first in range(0, length, tile):
            token = offset + first
            _write_item(items + 8 * ITEM * written, token, min(tile, length - first), start + first, table, token)
            written += 1
    return written


@kernel
def plan_sampled(sampled: int, count: int, positions: int, table_of: int, items: int) -> None:
    """Items of the sampled tokens alone, whose results stand together."""
    for row in range(count):
        token = load_int64(sampled + 8 * row)
        position, table = load_int64(positions + 8 * token), load_int64(table_of + 8 * token)
        _write_item(items + 8 * ITEM * row, token, 1, position, table, row)
