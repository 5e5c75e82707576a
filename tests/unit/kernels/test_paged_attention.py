"""Paged attention against its token-by-token reference and against torch's dense attention."""
# ruff: noqa: N812

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.kernels import paged_attention as module
from tandem.kernels.paged_attention import (
    AttentionRow,
    AttentionShape,
    Workspace,
    paged_attention_cpu,
    paged_attention_reference,
    plan_attention,
)


def ragged(
    lengths: list[tuple[int, int]], shape: AttentionShape, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[list[AttentionRow], torch.Tensor, torch.Tensor]:
    """Rows of (start, length) with shuffled block tables, queries, and a KV layer with NaN in free blocks."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(start + length) // shape.block_size) for start, length in lengths]
    ids = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    kv = torch.randn(len(ids), 2, shape.num_kv_heads, shape.block_size, shape.head_dim, generator=generator).to(dtype)
    rows, offset = [], 0
    for (start, length), count in zip(lengths, counts, strict=True):
        table = [ids.pop() for _ in range(count)]
        rows.append(AttentionRow(offset, start, length, table))
        offset += length
    for free in ids:
        kv[free] = math.nan  # nobody may read these
    q = torch.randn(offset, shape.num_heads, shape.head_dim, generator=generator)
    return rows, q, kv


LENGTHS = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 5, 16, 100]),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(
    lengths: list[tuple[int, int]], heads: tuple[int, int], window: int | None, seed: int
) -> None:
    shape = AttentionShape(*heads, head_dim=8, block_size=4, window=window)
    rows, q, kv = ragged(lengths, shape, seed)
    plan = plan_attention(rows, shape)
    expected = paged_attention_reference(q, kv, plan, shape)
    torch.testing.assert_close(paged_attention_cpu(q, kv, plan, shape, Workspace()), expected, rtol=1e-4, atol=1e-5)


def test_equals_dense_attention() -> None:
    shape = AttentionShape(6, 2, head_dim=16, block_size=4)
    (row,), q, kv = ragged([(0, 37)], shape)
    out = paged_attention_cpu(q, kv, plan_attention([row], shape), shape, Workspace())
    dense = kv[row.block_ids].permute(1, 2, 0, 3, 4).reshape(2, 2, -1, 16)[:, :, :37]
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], dense[:1], dense[1:], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7])
def test_small_tiles_and_groups_change_nothing(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    shape = AttentionShape(4, 2, head_dim=8, block_size=4, window=window)
    rows, q, kv = ragged([(30, 1), (3, 1), (0, 29), (17, 1), (12, 9), (0, 1)], shape)
    whole = paged_attention_cpu(q, kv, plan_attention(rows, shape), shape, Workspace())
    monkeypatch.setattr(module, "_TILE_QUERIES", 4)
    monkeypatch.setattr(module, "_GROUP_BYTES", 1)
    plan = plan_attention(rows, shape)
    assert len(plan.decode) == 4
    assert max(len(stretch.tiles) for stretch in plan.prefill) == 8
    cut = paged_attention_cpu(q, kv, plan, shape, Workspace())
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Padding of the shorter rows is their own block, so another row's KV that is not a number stays with that row."""
    shape = AttentionShape(4, 2, head_dim=8, block_size=4)
    rows, q, kv = ragged([(39, 1), (2, 1)], shape)
    kv[list(rows[0].block_ids)] = math.nan
    out = paged_attention_cpu(q, kv, plan_attention(rows, shape), shape, Workspace())
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_window_reads_no_block_behind_it() -> None:
    shape = AttentionShape(2, 2, head_dim=8, block_size=4, window=6)
    rows, q, kv = ragged([(30, 1), (20, 3)], shape)
    for row in rows:
        kv[list(row.block_ids[: (row.start - 6 + 1) // 4])] = math.nan
    assert not paged_attention_cpu(q, kv, plan_attention(rows, shape), shape, Workspace()).isnan().any()


def test_bfloat16_memory_is_widened_once() -> None:
    shape = AttentionShape(4, 2, head_dim=8, block_size=4)
    rows, q, kv = ragged([(9, 1), (0, 11)], shape, dtype=torch.bfloat16)
    plan = plan_attention(rows, shape)
    exact = paged_attention_cpu(q, kv.float(), plan, shape, Workspace())
    assert torch.equal(paged_attention_cpu(q, kv, plan, shape, Workspace()), exact)


def test_workspace_keeps_its_memory() -> None:
    workspace, layer = Workspace(), torch.zeros(9, 2, 2, 4, 8)
    large = workspace.gathered(layer, 6, 2)
    assert workspace.gathered(layer, 6, 2) is large
    small = workspace.gathered(layer, 3, 3)
    assert small.wide.data_ptr() == large.wide.data_ptr()
    assert small.k.shape == (6, 4, 8)
    assert large.k_transposed.shape == (4, 8, 12)
    larger = workspace.gathered(layer, 8, 1)
    assert workspace.gathered(layer, 6, 2).wide.data_ptr() == larger.wide.data_ptr() != large.wide.data_ptr()
    assert workspace.gathered(layer.bfloat16(), 6, 2).stored.dtype == torch.bfloat16


def test_workspace_serves_changing_batches() -> None:
    shape = AttentionShape(4, 2, head_dim=8, block_size=4)
    workspace = Workspace()
    for seed, lengths in enumerate([[(3, 1)], [(0, 30), (8, 1)], [(40, 1), (3, 1)], [(0, 3)], [(0, 30), (8, 1)]]):
        rows, q, kv = ragged(lengths, shape, seed)
        plan = plan_attention(rows, shape)
        expected = paged_attention_reference(q, kv, plan, shape)
        torch.testing.assert_close(paged_attention_cpu(q, kv, plan, shape, workspace), expected, rtol=1e-4, atol=1e-5)
