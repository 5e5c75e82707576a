"""Compiled attention against the formula, token by token; the same bits in whatever items its tokens come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tandem.kernels.compiled import attention
from tandem.kernels.compiled.attention import GEOMETRY, attend, scratch_bytes, tile_tokens
from tandem.kernels.compiled.entry import entry, entry_call
from tandem.kernels.compiled.packed import aligned_empty
from tandem.kernels.compiled.target import kernel
from tandem.kernels.paged_attention import AttentionRow, AttentionShape, paged_attention_reference, plan_attention

call_attend = entry_call(5)


@kernel
def run_items(attend_at, geometry, kv, items, count, kv_heads, scratch):
    for index in range(count):
        for head in range(kv_heads):
            call_attend(attend_at, geometry, kv, items + 8 * 5 * index, head, scratch)


@dataclass(frozen=True)
class Case:
    tokens: int
    start: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    half: bool
    window: int | None = None


CASES = [
    Case(1, 5, 9, 3, 64, 16, True),  # a decode row, its context within one chunk
    Case(1, 200, 9, 3, 64, 16, False),
    Case(130, 70, 9, 3, 64, 16, True),  # tiles across chunks
    Case(70, 0, 4, 4, 32, 7, False),  # no groups; blocks that no chunk is a multiple of
    Case(70, 30, 6, 2, 8, 4, True),  # a head dim that is padded
    Case(60, 100, 5, 1, 80, 16, True, window=9),
    Case(90, 100, 4, 2, 16, 5, False, window=70),  # a window over several chunks
]


class Memory:
    """Random queries, and KV memory that is not a number wherever no token of the row lies."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        self.case = case
        blocks = -(-(case.start + case.tokens) // case.slots)
        self.q = rng.standard_normal((case.tokens, case.heads, case.head_dim), dtype=np.float32)
        self.table = rng.permutation(blocks + 3)[:blocks].astype(np.int64)
        kv = np.full((blocks + 3, 2, case.kv_heads, case.slots, case.head_dim), np.nan, np.float32)
        for position in range(case.start + case.tokens):
            block, slot = self.table[position // case.slots], position % case.slots
            kv[block, :, :, slot] = rng.standard_normal((2, case.kv_heads, case.head_dim))
        self.kv = torch.from_numpy(kv).to(torch.bfloat16 if case.half else torch.float32)

    def reference(self) -> np.ndarray:
        c = self.case
        shape = AttentionShape(c.heads, c.kv_heads, c.head_dim, c.slots, c.window)
        plan = plan_attention([AttentionRow(0, c.start, c.tokens, self.table.tolist())], shape)
        return paged_attention_reference(torch.from_numpy(self.q), self.kv, plan, shape).numpy()

    def run(self, tile: int) -> np.ndarray:
        """Every token, in items of at most `tile`."""
        c = self.case
        group, out = c.heads // c.kv_heads, np.full_like(self.q, np.nan)
        kv = self.kv.view(torch.uint16).numpy() if c.half else self.kv.numpy()
        row = 4 * c.heads * c.head_dim
        geometry = np.zeros(GEOMETRY, np.int64)
        for word, value in {
            attention.Q: self.q.ctypes.data,
            attention.Q_STRIDE: row,
            attention.OUT: out.ctypes.data,
            attention.OUT_STRIDE: row,
            attention.TABLES: self.table.ctypes.data,
            attention.BLOCK_BYTES: kv.strides[0],
            attention.SLOTS: c.slots,
            attention.KV_HEADS: c.kv_heads,
            attention.GROUP: group,
            attention.HEAD_DIM: c.head_dim,
            attention.HALF: int(c.half),
            attention.WINDOW: c.window or 0,
        }.items():
            geometry[word] = value
        firsts = range(0, c.tokens, tile)
        items = np.array([(t, min(tile, c.tokens - t), c.start + t, 0, t) for t in firsts], np.int64)
        size = scratch_bytes(group, c.head_dim)
        scratch = aligned_empty(size + 64)
        scratch.fill(255)  # not a number
        at = [array.ctypes.data for array in (geometry, kv, items, scratch)]
        run_items(entry(attend).address, *at[:3], len(items), c.kv_heads, at[3])
        assert (scratch[size:] == 255).all()
        return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    memory = Memory(case)
    expected = memory.run(tile_tokens(case.heads // case.kv_heads))
    np.testing.assert_allclose(expected, memory.reference(), rtol=0, atol=2e-6)
    for tile in (1, 2, 5):
        assert memory.run(tile).tobytes() == expected.tobytes()


def test_scores_of_any_size() -> None:
    """A key that outweighs all others by e^1000 gives its value; so does the first of many that are far below zero."""
    memory = Memory(Case(1, 150, 3, 1, 64, 16, False))
    memory.q[:] *= 1000
    np.testing.assert_allclose(memory.run(1), memory.reference(), rtol=0, atol=1e-4)
