"""Decode attention over paged KV, whole and in pieces, against the reference, and how a batch is cut."""

from __future__ import annotations

import pytest
import torch
from attention_cases import TOLERANCE, batch, far_apart, narrowed
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.kernels.gpu.decode_attention import _MERGED, decode_attention
from tandem.kernels.gpu_plans import decode as plans
from tandem.kernels.gpu_plans.decode import most_pieces, moved_bytes, plan_decode, tiling
from tandem.kernels.gpu_plans.tiling import PLAIN, Tiling, multiprocessors
from tandem.kernels.paged_attention import AttentionShape

SMALL = Tiling(16, 16, 4, 2)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_LEAST_KEYS", 16)


def one_each(lengths, shape, device, dtype=torch.float32, seed=0):
    """A batch of one query at the end of each length."""
    return batch([(max(length - 1, 0), min(length, 1)) for length in lengths], shape, device, dtype, seed)


def attended(given, lengths, places=1, cut=SMALL, capacity=None, layer=None, **options) -> torch.Tensor:
    """`places`: multiprocessors of the device; more of them, smaller pieces."""
    plan = plan_decode(lengths, given.shape, cut, places, capacity).on(given.q.device)
    memory = given.layer if layer is None else layer
    return decode_attention(given.q, memory, given.tables, plan, given.shape, **options)


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    heads=st.sampled_from([(2, 2), (6, 2), (16, 1)]),
    head_dim=st.sampled_from([16, 24]),
    block_size=st.sampled_from([4, 16, 32]),
    window=st.sampled_from([None, 1, 3, 40]),
    dtype=st.sampled_from(list(TOLERANCE)),
    places=st.sampled_from([1, 8]),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(device, lengths, heads, head_dim, block_size, window, dtype, places, seed) -> None:
    given = one_each(lengths, AttentionShape(*heads, head_dim, block_size, window), device, dtype, seed)
    given.check(attended(given, lengths, places))


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "block_size", "window"),
    [
        pytest.param([1], (1, 1), 16, 16, None, id="one token"),
        pytest.param([16, 17], (2, 1), 16, 16, None, id="at a boundary and behind it"),
        pytest.param([0, 3, 0], (2, 1), 16, 16, None, id="empty rows are zero"),
        pytest.param([61], (2, 1), 16, 64, 5, id="a window smaller than a block"),
        pytest.param([130], (2, 1), 16, 128, None, id="large blocks"),
        pytest.param([131_072], (2, 1), 16, 16, 20, id="the end of a long context"),
        pytest.param([9], (2, 1), 80, 16, None, id="a head dim that is no power of two"),
        pytest.param([19], (4, 2), 128, 16, None, id="head dim 128"),
        pytest.param([19], (2, 1), 256, 16, None, id="head dim 256"),
        pytest.param([9], (17, 1), 16, 16, None, id="more query heads than a small tile has rows"),
    ],
)
def test_edges(device, lengths, heads, head_dim, block_size, window) -> None:
    given = one_each(lengths, AttentionShape(*heads, head_dim, block_size, window), device)
    cut = Tiling(tiling(heads[0], head_dim, torch.float32, PLAIN, 90).rows, 16, 4, 2)
    given.check(attended(given, lengths, cut=cut))


def test_pieces_and_padding_change_nothing(device) -> None:
    """One long sequence beside short ones is cut; a captured graph's spare places do nothing."""
    lengths = [100, 0, 3]
    given = one_each(lengths, AttentionShape(2, 1, 16, 4), device)
    plan = plan_decode(lengths, given.shape, SMALL, 2)
    assert plan.merges
    assert plan.spans_B2.tolist() == [[0, 4], [5, 1], [4, 1]]
    cut = attended(given, lengths, 2)
    given.check(cut)
    torch.testing.assert_close(attended(given, lengths, 2, capacity=9), cut, rtol=0, atol=0)


@pytest.mark.parametrize(("places", "pieces"), [(18, 36), (1, 2)])
def test_long_contexts_are_merged_in_several_turns(device, places, pieces) -> None:
    """As 128k contexts on an H100: the likeliest key may be of any turn."""
    lengths, shape, cut = [4500], AttentionShape(2, 1, 16, 16), Tiling(16, 128, 4, 2)
    given = one_each(lengths, shape, device)
    given.q.mul_(4.0)
    assert pieces == len(plan_decode(lengths, shape, cut, places).work_W4)
    assert places == 1 or pieces > 2 * _MERGED
    given.check(attended(given, lengths, places, cut))


def test_not_a_number_stays_with_its_row(device) -> None:
    lengths = [40, 40]
    given = one_each(lengths, AttentionShape(1, 1, 16, 4), device)
    given.layer[int(given.tables[0, 5])] = torch.nan
    out = attended(given, lengths, 2)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_narrow_memory_has_a_scale_per_side_and_head(device, stored, dtype) -> None:
    given = one_each([37], AttentionShape(4, 2, 16, 4), device, dtype)
    layer, scales, held = narrowed(given, stored)
    given.check(attended(given, [37], 3, layer=layer, scales_2K=scales), held)


def test_offsets_are_64_bit(device) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2**35:
        pytest.skip("needs 32 GiB of free GPU memory")
    given = one_each([21], AttentionShape(2, 1, 16, 16), device, torch.float16)
    apart = far_apart(given.layer, 2**31 + 16)
    given.check(attended(given, [21], layer=apart))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20_000), max_size=40),
    kv_heads=st.sampled_from([1, 8, 64]),
    window=st.sampled_from([None, 1, 4096]),
)
def test_a_plan_holds_every_tile_once(lengths, kv_heads, window) -> None:
    shape = AttentionShape(kv_heads, kv_heads, 128, 16, window)
    plan = plan_decode(lengths, shape, Tiling(16, 64, 4, 5), 132)
    assert len(plan.work_W4) <= most_pieces(len(lengths), kv_heads, 132)
    for row, (length, (first, pieces)) in enumerate(zip(lengths, plan.spans_B2.tolist(), strict=True)):
        mine = plan.work_W4[first : first + pieces].tolist()
        oldest = 0 if window is None else max(0, length - window)
        tiles = [tile for _, begin, end, _ in mine for tile in range(begin, end)]
        assert tiles == list(range(oldest // 64, -(-length // 64)))
        assert {(piece[0], piece[3]) for piece in mine} == {(row, pieces)}
    sizes = [plan.work_W4[first : first + pieces, 2].max() for first, pieces in plan.spans_B2.tolist()]
    assert len(sizes) == len(lengths)


def test_how_a_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_LEAST_KEYS", 256)
    shape, cut = AttentionShape(32, 8, 128, 16), Tiling(16, 64, 4, 5)
    pieces = {
        name: plan_decode(lengths, shape, cut, 132).spans_B2[:, 1].tolist()
        for name, lengths in {
            "alone": [131_072],
            "short": [300],
            "many": [8192] * 128,
            "one long": [131_072] + [1000] * 63,
        }.items()
    }
    assert pieces["alone"] == [33]  # 33 places of 8 kv heads on 132 multiprocessors, two programs each
    assert pieces["short"] == [1]
    assert pieces["many"] == [1] * 128
    assert pieces["one long"][0] > 10
    assert pieces["one long"][1:] == [1] * 63
    with pytest.raises(ValueError, match="capacity: 10 is less than the 33 pieces"):
        plan_decode([131_072], shape, cut, 132, capacity=10)
    padded = plan_decode([300], shape, cut, 132, capacity=4)
    assert padded.merges
    assert padded.work_W4[:, 0].tolist() == [0, -1, -1, -1]


def test_bytes() -> None:
    shape = AttentionShape(32, 8, 128, 16)
    assert moved_bytes([1000, 24], shape, 2) == 2 * 128 * 2 * (1024 * 8 + 2 * 32)
    assert moved_bytes([1000], shape, 2, kv_bytes=1) == 2 * 128 * (1000 * 8 + 32 * 2)
    assert moved_bytes([1000], AttentionShape(32, 8, 128, 16, window=100), 2) == 2 * 128 * 2 * (100 * 8 + 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_captured_graph_replays_another_batch(device) -> None:
    """The capacity's grid stays; lengths, tables and work are copied over those it was captured with."""
    shape = AttentionShape(8, 2, 64, 16)
    places = multiprocessors(device)
    cut = tiling(4, 64, torch.bfloat16, PLAIN, 90)
    lengths = [5000, 1, 300]
    given = one_each(lengths, shape, device, torch.bfloat16)
    capacity = most_pieces(3, 2, places)
    static = plan_decode([1, 1, 1], shape, cut, places, capacity).on(device)
    out = decode_attention(given.q, given.layer, given.tables, static, shape)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(given.q, given.layer, given.tables, static, shape, out)
    now = plan_decode(lengths, shape, cut, places, capacity)
    for name in ("lengths_B", "work_W4", "spans_B2"):
        getattr(static, name).copy_(getattr(now, name))
    out.fill_(torch.nan)
    graph.replay()
    given.check(out)
