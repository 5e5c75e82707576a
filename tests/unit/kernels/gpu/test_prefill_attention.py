"""Prefill attention over paged KV against the token-by-token reference, and what its plan promises."""

from __future__ import annotations

import pytest
import torch
from attention_cases import TOLERANCE, Batch, batch, far_apart, narrowed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tandem.kernels.gpu.prefill_attention import prefill_attention
from tandem.kernels.gpu_plans.prefill import moved_bytes, plan_prefill, standard_bytes, tiling
from tandem.kernels.gpu_plans.tiling import Tiling, form_of
from tandem.kernels.paged_attention import AttentionRow, AttentionShape

SMALL = Tiling(16, 16, 4, 2)


def attended(given: Batch, cut: Tiling = SMALL, layer: torch.Tensor | None = None, **options) -> torch.Tensor:
    plan = plan_prefill(given.rows, given.shape, cut).on(given.q.device)
    memory = given.layer if layer is None else layer
    return prefill_attention(given.q, memory, given.tables, plan, given.shape, **options)


STRETCHES = st.lists(st.tuples(st.integers(0, 24), st.integers(1, 9)), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None)
@given(
    stretches=STRETCHES,
    heads=st.sampled_from([(2, 2), (6, 2), (5, 1)]),
    head_dim=st.sampled_from([16, 24]),
    block_size=st.sampled_from([4, 16, 32]),
    window=st.sampled_from([None, 1, 3, 18]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
@example([(7, 5), (0, 17)], (4, 2), 16, 4, None, torch.bfloat16, 0)
@example([(21, 4)], (5, 1), 16, 4, 1, torch.float32, 0)
def test_equals_the_reference(device, stretches, heads, head_dim, block_size, window, dtype, seed) -> None:
    given = batch(stretches, AttentionShape(*heads, head_dim, block_size, window), device, dtype, seed)
    given.check(attended(given))


@pytest.mark.parametrize(
    ("stretch", "heads", "head_dim", "block_size", "window"),
    [
        pytest.param((0, 1), (1, 1), 16, 16, None, id="one token"),
        pytest.param((0, 16), (2, 1), 16, 16, None, id="a block filled to its end"),
        pytest.param((16, 1), (2, 1), 16, 16, None, id="the first slot of a block"),
        pytest.param((15, 2), (2, 1), 16, 16, None, id="over a boundary"),
        pytest.param((33, 3), (2, 1), 16, 64, None, id="a block larger than a tile"),
        pytest.param((40, 2), (2, 1), 16, 64, 5, id="a window smaller than a block"),
        pytest.param((5, 2), (16, 1), 16, 16, None, id="sixteen query heads for one"),
        pytest.param((3, 2), (1, 1), 80, 16, None, id="a head dim that is no power of two"),
        pytest.param((17, 3), (4, 2), 128, 16, None, id="head dim 128"),
        pytest.param((17, 3), (2, 1), 256, 16, None, id="head dim 256"),
        pytest.param((126, 5), (2, 1), 16, 128, None, id="over a boundary of large blocks"),
        pytest.param((200, 3), (2, 1), 16, 128, 150, id="a window over large blocks"),
        pytest.param((131_070, 2), (2, 1), 16, 16, 20, id="far into a context"),
    ],
)
def test_edges(device, stretch, heads, head_dim, block_size, window) -> None:
    given = batch([stretch], AttentionShape(*heads, head_dim, block_size, window), device)
    given.check(attended(given))


def test_a_long_context_is_seen_to_its_beginning(device) -> None:
    given = batch([(4000, 3)], AttentionShape(2, 1, 16, 16), device)
    given.q.mul_(4.0)
    given.check(attended(given, Tiling(16, 128, 4, 2)))


def test_what_is_shipped_runs(device) -> None:
    """The tiling of an H100, on tiles that are mostly empty here."""
    shape = AttentionShape(4, 2, 64, 16)
    given = batch([(70, 3), (0, 40)], shape, device, torch.bfloat16)
    given.check(attended(given, tiling(64, torch.bfloat16, form_of(given.layer, torch.bfloat16), 90)))


def test_what_small_blocks_of_threads_run(device) -> None:
    """The tiling where a block has 99 KiB of shared memory."""
    given = batch([(20, 3), (0, 9)], AttentionShape(2, 1, 256, 16), device)
    given.check(attended(given, tiling(256, torch.float32, form_of(given.layer, torch.float32), 86)))


def test_writes_only_its_rows(device) -> None:
    given = batch([(3, 2), (0, 2)], AttentionShape(2, 1, 16, 4), device)
    out = torch.full((given.q.shape[0] + 2, 3, 16), 7.0, device=device)[:-2, :2]
    plan = plan_prefill(given.rows[1:], given.shape, SMALL).on(device)
    prefill_attention(given.q, given.layer, given.tables[1:], plan, given.shape, out)
    assert (out[:2] == 7).all()
    assert (out[2:] != 7).all()
    assert not prefill_attention(
        given.q[:0], given.layer, given.tables, plan_prefill([], given.shape, SMALL), given.shape
    ).numel()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_narrow_memory_has_a_scale_per_side_and_head(device, stored, dtype) -> None:
    given = batch([(9, 4)], AttentionShape(4, 2, 16, 4), device, dtype)
    layer, scales, held = narrowed(given, stored)
    given.check(attended(given, layer=layer, scales_2K=scales), held)


def test_every_code_of_a_narrow_float_is_its_number(device) -> None:
    """A token that sees itself alone gets its own values."""
    alone = AttentionShape(1, 1, 16, 16, window=1)
    codes = torch.arange(256, dtype=torch.uint8, device=device).reshape(16, 16)
    layer = torch.zeros(2, 2, 1, 16, 16, dtype=torch.uint8, device=device)
    layer[0, 1, 0] = torch.where((codes & 0x7F) == 0x7F, 0, codes)
    layer[1, 1, 0, 0, :2] = torch.tensor([0x7F, 0xFF], device=device)  # not a number, beside nobody
    tables = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    plan = plan_prefill([AttentionRow(0, 0, 16, [0]), AttentionRow(16, 0, 1, [1])], alone, SMALL).on(device)
    q, scales = torch.zeros(17, 1, 16, device=device), torch.tensor([[1.0], [0.5]], device=device)
    out = prefill_attention(q, layer.view(torch.float8_e4m3fn), tables, plan, alone, scales_2K=scales)[:, 0]
    expected = torch.cat([layer[0, 1, 0], layer[1, 1, 0, :1]]).view(torch.float8_e4m3fn).float() / 2
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == 2


def test_offsets_are_64_bit(device) -> None:
    """Blocks whose distance in elements no 32-bit number holds, nor its double."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2**35:
        pytest.skip("needs 32 GiB of free GPU memory")
    given = batch([(20, 3)], AttentionShape(2, 1, 16, 16), device, torch.float16)
    apart = far_apart(given.layer, 2**31 + 16)
    assert given.tables[0, :2].max() * apart.stride(0) > 2**31
    given.check(attended(given, layer=apart))


def test_refusals(device) -> None:
    shape = AttentionShape(4, 2, 16, 4)
    given = batch([(0, 5)], shape, device)
    with pytest.raises(ValueError, match=r"kv dtype: torch\.float16 is not allowed with queries of torch\.float32"):
        attended(given, layer=given.layer.half())
    with pytest.raises(ValueError, match=r"scales: a memory of torch\.int8 needs float32 scales \[2, 2\]"):
        attended(given, layer=given.layer.nan_to_num(0).to(torch.int8))
    with pytest.raises(ValueError, match="layer: the last dimension is not contiguous"):
        attended(given, layer=given.layer.transpose(3, 4).contiguous().transpose(3, 4))
    with pytest.raises(ValueError, match=r"layer: shape .* is not \[blocks, 2, kv heads, slots, 16\]"):
        attended(given, layer=given.layer[..., :8])
    with pytest.raises(ValueError, match="17 query heads for one kv head"):
        plan_prefill(given.rows, AttentionShape(17, 1, 16, 4), SMALL)
    with pytest.raises(ValueError, match="a stretch without queries"):
        plan_prefill([AttentionRow(0, 3, 0, [0])], shape, SMALL)


@settings(deadline=None)
@given(
    stretches=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 700)), max_size=8),
    group=st.sampled_from([1, 3, 16]),
)
def test_a_plan_holds_every_query_once_and_the_longest_first(stretches, group) -> None:
    rows = [AttentionRow(index * 700, start, length, []) for index, (start, length) in enumerate(stretches)]
    tiles = plan_prefill(rows, AttentionShape(group, 1, 64, 16), Tiling(128, 64, 8, 3)).tiles_I2.tolist()
    count = 128 // group
    queries = [(row, query) for row, first in tiles for query in range(first, min(first + count, rows[row].length))]
    assert sorted(queries) == [(row, query) for row in range(len(rows)) for query in range(rows[row].length)]
    seen = [rows[row].start + min(first + count, rows[row].length) for row, first in tiles]
    assert seen == sorted(seen, reverse=True)


def test_bytes_against_standard_attention() -> None:
    """FlashAttention, section 3.2: standard attention moves Nd + N^2 numbers, a tiled one a fraction of N^2."""
    shape, cut = AttentionShape(8, 2, 128, 16), Tiling(128, 64, 8, 3)
    plan = plan_prefill([AttentionRow(0, 0, 4096, [])], shape, cut)
    assert standard_bytes(plan, shape, 2) == 8 * 2 * (4 * 4096**2 + 4 * 4096 * 128)
    tiles = sum(range(32, 4097, 32))  # 32 queries of 4 heads each see what lies before their last
    assert moved_bytes(plan, shape, 2) == 2 * (2 * 4096 * 8 * 128 + 2 * tiles * 2 * 128)
    assert moved_bytes(plan, shape, 2) < standard_bytes(plan, shape, 2) / 3
    assert moved_bytes(plan, shape, 2, kv_bytes=1) < moved_bytes(plan, shape, 2)
    windowed = AttentionShape(8, 2, 128, 16, window=256)
    near = plan_prefill([AttentionRow(0, 0, 4096, [])], windowed, cut)
    assert moved_bytes(near, windowed, 2) < moved_bytes(plan, shape, 2) / 4
