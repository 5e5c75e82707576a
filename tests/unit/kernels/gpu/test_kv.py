"""Keys and values into their blocks, and blocks from one memory into another, against the references."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from attention_cases import far_apart
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tandem.kernels.gpu import kv_blocks as by_triton
from tandem.kernels.gpu.kv_blocks import copy_blocks_reference, repack_reference
from tandem.kernels.gpu.kv_write import kv_write
from tandem.kernels.gpu_plans.moves import Part
from tandem.kernels.kv_write import kv_write_reference
from tandem.kernels.on_device import kv_blocks as by_torch
from tandem.kernels.rotary import rotary_reference, rotary_tables

BLOCKS = torch.tensor([0, 3, 3, 6, 1])
SLOTS = torch.tensor([0, 1, 2, 3, 0])


def projected(
    generator: torch.Generator, device: torch.device, heads: int, kv_heads: int, width: int
) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of one projection, and the tables of their positions."""
    x = torch.randn(len(BLOCKS), heads + 2 * kv_heads, width, generator=generator, device=device)
    frequencies = torch.rand(width // 2, generator=generator, device=device)
    tables = rotary_tables(torch.arange(4, 4 + len(BLOCKS), device=device), frequencies)
    return x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :], *tables


def memory(device: torch.device, kv_heads: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[7 blocks, 3 layers, 2, K, 4 slots, D] of zeros."""
    return torch.zeros(7, 3, 2, kv_heads, 4, width, device=device).to(dtype)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 12), (9, 9, 16), (1, 1, 64)])
def test_kv_write(
    device: torch.device, seeded: torch.Generator, heads: int, kv_heads: int, width: int, rotated: bool
) -> None:
    q, k, v, *tables = projected(seeded, device, heads, kv_heads, width)
    kv = memory(device, kv_heads, width)
    expected = kv.clone()
    blocks, slots = BLOCKS.to(device), SLOTS.to(device)
    turned = kv_write(q, k, v, (tables[0], tables[1]) if rotated else None, kv[:, 1], blocks, slots)
    if rotated:
        q, k = (rotary_reference(x, *tables) for x in (q, k))
    kv_write_reference(expected[:, 1], torch.stack((k, v), 1), blocks, slots)
    torch.testing.assert_close(turned, q)
    torch.testing.assert_close(kv, expected)


def test_tokens_without_a_block_write_nothing(device: torch.device, seeded: torch.Generator) -> None:
    q, k, v, *_ = projected(seeded, device, 2, 1, 8)
    kv = memory(device, 1, 8)
    turned = kv_write(q, k, v, None, kv[:, 0], torch.full_like(BLOCKS, -1, device=device), SLOTS.to(device))
    assert torch.equal(turned, q)
    assert not kv.any()


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_written_as_16_bits(
    device: torch.device, seeded: torch.Generator, dtype: torch.dtype, rotated: bool
) -> None:
    """What is turned is rounded once; what is not, is copied."""
    q, k, v, *tables = (x.to(dtype) for x in projected(seeded, device, 6, 2, 16))
    tables = [x.float() for x in tables]
    kv = memory(device, 2, 16, dtype)
    wide = kv.float()
    blocks, slots = BLOCKS.to(device), SLOTS.to(device)
    turned = kv_write(q, k, v, (tables[0], tables[1]) if rotated else None, kv[:, 1], blocks, slots)
    if rotated:
        q, k = (rotary_reference(x.float(), *tables) for x in (q, k))
    kv_write_reference(wide[:, 1], torch.stack((k, v), 1), blocks, slots)
    assert turned.dtype == dtype
    ulp = 2 * torch.finfo(dtype).eps if rotated else 0.0  # the interpreter does not round bfloat16 to nearest
    torch.testing.assert_close(turned.float(), q.float(), rtol=ulp, atol=ulp)
    torch.testing.assert_close(kv.float(), wide, rtol=ulp, atol=ulp)


@pytest.mark.parametrize("made", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_narrow_memories_are_written_by_heads_scales(
    device: torch.device, seeded: torch.Generator, dtype: torch.dtype, made: torch.dtype
) -> None:
    q, k, v, *tables = projected(seeded, device, 4, 3, 16)
    q, k, v = (x.to(made) for x in (q, k, v))
    scales = torch.rand(2, 3, generator=seeded, device=device) * 0.02 + 0.005
    if dtype == torch.float8_e4m3fn:
        scales[1] = 0.001  # values beyond 448
    kv = memory(device, 3, 16, dtype)
    blocks, slots = BLOCKS.to(device), SLOTS.to(device)
    kv_write(q, k, v, (tables[0], tables[1]), kv[:, 2], blocks, slots, scales)
    wide = memory(device, 3, 16)
    both = torch.stack((rotary_reference(k.float(), *tables), v.float()), 1)
    kv_write_reference(wide[:, 2], both / scales[:, :, None], blocks, slots)
    if dtype == torch.int8:
        expected = wide.clamp(-127, 127).round().to(torch.int8)
        assert (kv.int() - expected.int()).abs().max() <= 1  # a rotation may be fused
    else:
        expected = wide.clamp(-448, 448).to(dtype)
        assert (kv.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs().max() <= 1
        assert expected.float().abs().max() == 448


def test_e4m3_is_torchs_for_every_kind_of_number(device: torch.device) -> None:
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()]
    edges = torch.tensor([2**-10, 2**-11, 3 * 2**-10, 0.0146484375, 0.0156, 447.9, 448.0, 0.0, -0.0])
    values = torch.cat((exact, (exact[1:] + exact[:-1]) / 2, edges, torch.linspace(-2, 2, 99)))
    row = torch.nn.functional.pad(values, (0, len(values) % 2)).to(device).view(1, 1, -1)
    kv = torch.zeros(1, 2, 1, 1, row.shape[2], device=device).to(torch.float8_e4m3fn)
    block = torch.zeros(1, dtype=torch.int64, device=device)
    kv_write(row, row, row, None, kv, block, block, torch.ones(2, 1, device=device))
    expected = row[0].to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(kv[0, 0, :, 0].view(torch.uint8), expected)
    assert torch.equal(kv[0, 1, :, 0].view(torch.uint8), expected)


def filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Every element another, as far as the dtype goes; never a NaN."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, device=device) % 120 + 1).to(dtype).view(shape)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
each_way = pytest.mark.parametrize("moves", [by_triton, by_torch], ids=["triton", "torch"])


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what torch moves: several for any test."""
    monkeypatch.setattr(by_torch, "_PIECE_BYTES", 256)


@each_way
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_go_through_one_buffer(device: torch.device, dtype: torch.dtype, moves: ModuleType) -> None:
    kv = filled((6, 2, 2, 1, 4, 10), dtype, device)
    ids = torch.tensor([4, 0, 5], device=device)
    packed = moves.gather_blocks(kv, ids)
    assert torch.equal(as_bytes(packed), as_bytes(kv)[ids])
    other = torch.zeros_like(kv)
    moves.scatter_blocks(packed, other, ids)
    assert torch.equal(as_bytes(other)[ids], as_bytes(kv)[ids])
    untouched = torch.tensor([1, 2, 3], device=device)
    assert not as_bytes(other)[untouched].any()


@each_way
def test_blocks_go_from_memory_to_memory(device: torch.device, moves: ModuleType) -> None:
    source, target = filled((5, 120), torch.int8, device), torch.zeros(4, 120, dtype=torch.int8, device=device)
    expected = target.clone()
    source_ids, target_ids = torch.tensor([2, 4, 0], device=device), torch.tensor([3, 1, 0], device=device)
    moves.copy_blocks(source, target, source_ids, target_ids)
    copy_blocks_reference(source, expected, source_ids, target_ids)
    assert torch.equal(target, expected)
    moves.copy_blocks(source, target, source_ids[:0], target_ids[:0])
    assert torch.equal(target, expected)
    assert moves.gather_blocks(source, source_ids[:0]).shape == (0, 120)


def test_blocks_with_ids_below_zero_go_nowhere(device: torch.device) -> None:
    """How kernels are warmed up."""
    source, target = filled((5, 12), torch.int8, device), torch.zeros(4, 12, dtype=torch.int8, device=device)
    expected = target.clone()
    source_ids, target_ids = torch.tensor([2, -1, 4, 0], device=device), torch.tensor([3, 1, -1, 0], device=device)
    by_triton.copy_blocks(source, target, source_ids, target_ids)
    copy_blocks_reference(source, expected, source_ids, target_ids)
    assert torch.equal(target, expected)


@each_way
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    slots=st.tuples(st.sampled_from((2, 4, 8)), st.sampled_from((2, 4, 8))),
    layers=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 2)),
    heads=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 2)),
    tokens=st.tuples(st.integers(0, 5), st.integers(1, 11)),
    width=st.sampled_from((3, 8)),
)
@example(torch.float8_e4m3fn, (2, 8), (1, 0, 2), (0, 1, 2), (3, 9), 3)
@example(torch.bfloat16, (8, 4), (0, 1, 1), (2, 0, 1), (0, 11), 8)
def test_repack(
    device: torch.device,
    moves: ModuleType,
    dtype: torch.dtype,
    slots: tuple[int, int],
    layers: tuple[int, int, int],
    heads: tuple[int, int, int],
    tokens: tuple[int, int],
    width: int,
) -> None:
    part = Part(
        num_layers=layers[2],
        num_heads=heads[2],
        source_layer=layers[0],
        target_layer=layers[1],
        source_head=heads[0],
        target_head=heads[1],
        first_token=tokens[0],
        num_tokens=tokens[1],
    )
    source = filled((8, 4, 2, 4, slots[0], width), dtype, device)
    target = torch.zeros(8, 4, 2, 4, slots[1], width, device=device).to(dtype)
    expected = target.clone()
    source_ids, target_ids = torch.arange(8, device=device).flip(0), torch.arange(8, device=device).roll(3)
    moves.repack(source, target, source_ids, target_ids, part)
    repack_reference(source, expected, source_ids, target_ids, part)
    assert torch.equal(as_bytes(target), as_bytes(expected))


@each_way
def test_two_sources_fill_a_target_of_other_shape(device: torch.device, moves: ModuleType) -> None:
    """Prefill TP 2 x PP 2, blocks of 4 -> decode TP 1, blocks of 8: the whole arrives, from four parts."""
    whole = filled((3, 4, 2, 2, 8, 6), torch.float32, device)
    arrived = torch.zeros_like(whole)
    for layer, head in itertools.product((0, 2), (0, 1)):
        held = torch.zeros(6, 2, 2, 1, 4, 6, device=device)
        cut = whole[:, layer : layer + 2, :, head : head + 1]
        for block in range(6):
            held[block] = cut[block // 2, :, :, :, block % 2 * 4 : block % 2 * 4 + 4]
        part = Part(num_layers=2, num_heads=1, target_layer=layer, target_head=head, num_tokens=24)
        moves.repack(held, arrived, torch.arange(6, device=device), torch.arange(3, device=device), part)
    assert torch.equal(arrived, whole)


@each_way
def test_offsets_are_64_bit(device: torch.device, seeded: torch.Generator, moves: ModuleType) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2**35:
        pytest.skip("needs 32 GiB of free GPU memory")
    q, k, v, *_ = projected(seeded, device, 2, 1, 8)
    scales = torch.full((2, 1), 0.1, device=device)
    blocks, slots = torch.tensor([0, 2, 2, 1, 2], device=device), torch.arange(5, device=device)
    near = torch.zeros(3, 2, 1, 8, 8, dtype=torch.int8, device=device)
    apart = far_apart(near, 2**30 + 16)  # the third block lies beyond 2^31
    for layer in (near, apart):
        kv_write(q, k, v, None, layer, blocks, slots, scales)
    assert near[2].any()
    assert torch.equal(apart, near)

    ids = torch.tensor([2, 0], device=device)
    assert torch.equal(moves.gather_blocks(apart, ids), near[ids])
    moves.scatter_blocks(near[ids].flip(0), apart, ids)
    assert torch.equal(apart[ids], near[ids].flip(0))

    packed, moved = near[:, None].clone(), torch.zeros_like(near)[:, None]
    far = far_apart(near, 2**30 + 16)[:, None]
    part = Part(num_layers=1, num_heads=1, num_tokens=24)
    everything = torch.arange(3, device=device)
    moves.repack(far, moved, everything, everything, part)
    assert torch.equal(moved, packed)
    far.zero_()
    moves.repack(packed, far, everything, everything, part)
    assert torch.equal(far, packed)
