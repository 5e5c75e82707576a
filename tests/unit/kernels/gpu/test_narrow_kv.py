"""Narrow KV memory as torch and the plain formulas write and read it: as Triton's kernels do, bits and all."""

from __future__ import annotations

import math

import pytest
import torch
from tandem.kernels.dispatch import gpu_operations
from tandem.kernels.gpu_plans.decode import plan_decode
from tandem.kernels.gpu_plans.decode import tiling as decode_tiling
from tandem.kernels.gpu_plans.prefill import plan_prefill
from tandem.kernels.gpu_plans.prefill import tiling as prefill_tiling
from tandem.kernels.gpu_plans.tiling import architecture, form_of
from tandem.kernels.paged_attention import AttentionRow, AttentionShape
from tandem.kernels.rotary import rotary_tables

DTYPES = (torch.int8, torch.float8_e4m3fn)
OTHERS = ("torch", "reference")
TOKENS, KV_HEADS, WIDTH, SLOTS = 40, 3, 16, 4


def empty(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[12 blocks, 2, K, slots, D]: one layer of a larger memory."""
    return torch.zeros(12, 2, 2, KV_HEADS, SLOTS, WIDTH, dtype=torch.uint8, device=device).view(dtype)[:, 1]


def numbers(generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """[T, K, D] of every size: halves, what rounds to the next, what is beyond the range, what is none."""
    powers = torch.randint(-14, 12, (TOKENS, KV_HEADS, WIDTH), generator=generator, device=device)
    x = torch.randn(powers.shape, generator=generator, device=device) * 2.0**powers
    x[0] = torch.arange(WIDTH, device=device) - 8 + 0.5
    x[1] = 2.0**-10 * (torch.arange(WIDTH, device=device) + 0.5)
    x[2, 0, :6] = torch.tensor([math.inf, -math.inf, 447.9, 464.0, -465.0, -0.0], device=device)
    return x


@pytest.mark.parametrize("kernels", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_are_stored(
    device: torch.device, seeded: torch.Generator, dtype: torch.dtype, kernels: str
) -> None:
    k, v = numbers(seeded, device), numbers(seeded, device)
    v[3, 0, 0] = math.nan
    scales = torch.tensor([[1.0, 0.0037, 3.1], [0.5, 1.0, 0.011]], device=device)
    tokens = torch.arange(TOKENS, device=device)
    blocks, slots = tokens // SLOTS, tokens % SLOTS
    blocks[7] = -1
    written = []
    for who in ("triton", kernels):
        layer = empty(dtype, device)
        turned = gpu_operations(who).kv_write(k, k, v, None, layer, blocks, slots, scales)
        assert torch.equal(turned, k)
        written.append(layer.view(torch.uint8))
    assert torch.equal(*written)
    assert written[0][:10].unique().numel() > 150


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_turned_is_not_rounded_before_it_is_stored(
    device: torch.device, seeded: torch.Generator, dtype: torch.dtype, kernels: str, made: torch.dtype
) -> None:
    k = torch.randn(TOKENS, KV_HEADS, WIDTH, generator=seeded, device=device).to(made)
    frequencies = torch.rand(WIDTH // 2, generator=seeded, device=device)
    tokens = torch.arange(TOKENS, device=device)
    tables = rotary_tables(tokens, frequencies)
    scales = torch.full((2, KV_HEADS), 0.02, device=device)
    ours, theirs = empty(dtype, device), empty(dtype, device)
    for who, layer in (("triton", ours), (kernels, theirs)):
        gpu_operations(who).kv_write(k, k, k, tables, layer, tokens // SLOTS, tokens % SLOTS, scales)
    apart = (ours.view(torch.uint8).int() - theirs.view(torch.uint8).int()).abs()
    assert (apart > 0).float().mean() < 0.01  # a rotation may be fused
    assert ours.view(torch.uint8).any()


@pytest.mark.parametrize("kernels", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_narrow_memory(
    device: torch.device, seeded: torch.Generator, dtype: torch.dtype, kernels: str
) -> None:
    shape = AttentionShape(6, KV_HEADS, WIDTH, SLOTS)
    scales = torch.tensor([[0.02, 0.03, 0.01], [0.5, 0.02, 0.1]], device=device)
    tokens = torch.arange(TOKENS, device=device)
    kv = torch.randn(TOKENS, KV_HEADS, WIDTH, generator=seeded, device=device)
    layer = empty(dtype, device)
    gpu_operations("triton").kv_write(kv, kv, kv.flip(0), None, layer, tokens // SLOTS, tokens % SLOTS, scales)
    tables = torch.tensor([[0, 4, 8], [3, 1, 9]], dtype=torch.int32, device=device)
    q = torch.randn(7, 6, WIDTH, generator=seeded, device=device)
    form, arch = form_of(layer, q.dtype), architecture(device)
    decode = plan_decode([11, 6], shape, decode_tiling(2, WIDTH, q.dtype, form, arch), 2).on(device)
    rows = [AttentionRow(0, 4, 5, ()), AttentionRow(5, 9, 2, ())]
    prefill = plan_prefill(rows, shape, prefill_tiling(WIDTH, q.dtype, form, arch)).on(device)
    found = []
    for who in ("triton", kernels):
        by, out, single = gpu_operations(who), torch.empty_like(q), torch.empty_like(q[:2])
        by.decode_attention(q[:2], layer, tables, decode, shape, single, scales)
        by.prefill_attention(q, layer, tables, prefill, shape, out, scales)
        found.append(torch.cat((single, out)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
