"""Attention in pieces, by torch's operations on whatever device: what `paged_attention_reference` says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from tandem.kernels.on_device import attention
from tandem.kernels.paged_attention import AttentionRow, AttentionShape

SIZE, BLOCKS, DIM = 4, 24, 8
RAGGED = [(0, 6, 1), (1, 0, 5), (6, 3, 5), (11, 19, 1), (12, 0, 1), (13, 11, 2)]
"""Offset, start, length: two neighbors of one length that end in different blocks, one token alone."""


def random_memory(kv_heads: int, tables: torch.Tensor, rows: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """NaN where no row has anything."""
    memory = torch.full((BLOCKS, 2, kv_heads, SIZE, DIM), math.nan)
    generator = torch.Generator().manual_seed(0)
    for table, (_, start, length) in zip(tables.tolist(), rows, strict=True):
        for position in range(start + length):
            values = torch.randn(2, kv_heads, DIM, generator=generator)
            memory[table[position // SIZE], :, :, position % SIZE] = values
    return memory


@pytest.mark.parametrize("piece_bytes", [1, 2**12, 2**26])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3)])
def test_pieces_of_any_size_are_the_formula(
    heads: int, kv_heads: int, window: int | None, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_PIECE_BYTES", piece_bytes)
    shape = AttentionShape(heads, kv_heads, DIM, SIZE, window)
    counts = [-(-(start + length) // SIZE) for _, start, length in RAGGED]
    ids = iter(range(1, BLOCKS))
    tables = torch.zeros(len(RAGGED), max(counts), dtype=torch.int32)  # block 0 is nobody's
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([next(ids) for _ in range(count)])
    memory = random_memory(kv_heads, tables, RAGGED)
    q = torch.randn(15, heads, DIM, generator=torch.Generator().manual_seed(1))
    rows = [AttentionRow(*row, ()) for row in RAGGED]
    found, expected = torch.empty_like(q), torch.empty_like(q)
    attention.attend_torch(q, memory, tables, rows, shape, found)
    attention.attend_reference(q, memory, tables, rows, shape, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [attention.attend_torch, attention.attend_reference])
def test_padding_rows_of_a_decode_step_are_zero(attend: attention.Attend) -> None:
    shape = AttentionShape(2, 1, DIM, SIZE)
    tables = torch.tensor([[1], [0], [2], [0]], dtype=torch.int32)
    memory = random_memory(1, tables, [(0, 0, 1), (0, 0, 0), (0, 0, 3), (0, 0, 0)])
    plan = SimpleNamespace(lengths_B=torch.tensor([1, 0, 3, 0], dtype=torch.int32))
    out = torch.full((4, 2, DIM), math.nan)
    attention.decode_attention(attend, torch.ones(4, 2, DIM), memory, tables, plan, shape, out)  # type: ignore[arg-type]
    assert not out[[1, 3]].any()
    torch.testing.assert_close(out[0], memory[1, 1, :, 0].expand(2, DIM))
    assert out[2].isfinite().all()
    assert out[2].any()
