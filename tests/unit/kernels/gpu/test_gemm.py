"""Quantized products against their references, whatever the cut."""

from __future__ import annotations

import pytest
import torch
from tandem.kernels.gpu import w4a16, w8a8
from tandem.kernels.gpu.gemm import CUTS, Cut, candidates
from tandem.kernels.gpu.w4a16 import w4a16_linear
from tandem.kernels.gpu.w8a8 import MAX_INNER, w8a8_linear
from tandem.kernels.int4 import quantize_int4, unpack_int4, w4a16_linear_reference
from tandem.kernels.int8 import quantize_rows_reference, w8a8_linear_reference

SMALL = (Cut(16, 16, 32, 1, 4, 2), Cut(16, 32, 32, 3, 4, 2))


@pytest.mark.parametrize("cut", [*SMALL, None])
@pytest.mark.parametrize(("m", "n", "k", "biased"), [(1, 20, 100, True), (17, 40, 64, False)])
def test_w8a8(
    device: torch.device, seeded: torch.Generator, m: int, n: int, k: int, biased: bool, cut: Cut | None
) -> None:
    x, x_scales = quantize_rows_reference(torch.randn(m, k, generator=seeded, device=device))
    weight, weight_scales = quantize_rows_reference(torch.randn(n, k, generator=seeded, device=device))
    bias = torch.randn(n, generator=seeded, device=device) if biased else None
    y = w8a8_linear(x, x_scales, weight, weight_scales, bias, dtype=torch.float32, cut=cut)
    torch.testing.assert_close(y, w8a8_linear_reference(x, x_scales, weight, weight_scales, bias), rtol=1e-6, atol=1e-6)


def test_w8a8_sums_are_exact_at_the_largest(device: torch.device) -> None:
    x = torch.full((2, 4096), -127, dtype=torch.int8, device=device)
    ones = torch.ones(16, device=device)
    y = w8a8_linear(x, ones[:2], x[:1].expand(16, -1), ones, dtype=torch.float32, cut=Cut(16, 16, 1024, 2, 4, 2))
    assert y.unique().tolist() == [127 * 127 * 4096]


def test_w8a8_rows_do_not_depend_on_batch_or_cut(device: torch.device, seeded: torch.Generator) -> None:
    x, x_scales = quantize_rows_reference(torch.randn(5, 96, generator=seeded, device=device))
    weight, weight_scales = quantize_rows_reference(torch.randn(24, 96, generator=seeded, device=device))
    alone = w8a8_linear(x[3:4], x_scales[3:4], weight, weight_scales, cut=SMALL[0])
    together = w8a8_linear(x, x_scales, weight, weight_scales, cut=SMALL[1])
    assert alone.dtype == torch.bfloat16
    assert torch.equal(alone[0], together[3])


def test_inner_dimensions_that_might_overflow_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, MAX_INNER + 1, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match=f"in_features: {MAX_INNER + 1} is not in 1…{MAX_INNER}"):
        w8a8_linear(x, x[0, :1].float(), x, x[0, :1].float())


@pytest.mark.parametrize("cut", [Cut(16, 16, 1, 1, 4, 2), Cut(16, 32, 1, 2, 4, 2), None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "group", "biased"), [(1, 20, 32, True), (18, 40, 64, False)])
def test_w4a16(
    device: torch.device,
    seeded: torch.Generator,
    m: int,
    n: int,
    group: int,
    biased: bool,
    dtype: torch.dtype,
    cut: Cut | None,
) -> None:
    x = torch.randn(m, 3 * group, generator=seeded, device=device).to(dtype)
    packed, scales = quantize_int4(torch.randn(n, 3 * group, generator=seeded, device=device), group)
    bias = torch.randn(n, generator=seeded, device=device).to(dtype) if biased else None
    y = w4a16_linear(x, packed, scales, bias, cut=cut)
    expected = w4a16_linear_reference(x, packed, scales, bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=2**-9 if dtype == torch.float16 else 2**-6, atol=2**-7)


def test_groups_that_no_kernel_takes_are_named(device: torch.device) -> None:
    x = torch.zeros(1, 48, device=device).half()
    packed, scales = quantize_int4(torch.zeros(4, 48), 16)
    with pytest.raises(ValueError, match="group: 48 inputs in 3 groups: 16 is not one of 32, 64, 128"):
        w4a16_linear(x, packed.to(device), scales.to(device))
    with pytest.raises(ValueError, match="group: 20 is not an even divisor of the 48 inputs"):
        quantize_int4(torch.zeros(4, 48), 20)


def test_nibbles_are_the_low_bits_of_128_and_1024() -> None:
    """What the kernel rests on on a GPU; the interpreter subtracts in float32."""
    nibbles = torch.arange(16, dtype=torch.int16)
    assert ((nibbles | 0x4300).view(torch.bfloat16) - 136).tolist() == list(range(-8, 8))
    assert ((nibbles | 0x6400).view(torch.float16) - 1032).tolist() == list(range(-8, 8))


def test_four_bits_keep_what_fits_in_them() -> None:
    levels = torch.randint(-7, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    levels[:, ::32] = 7  # so that scales are known
    packed, scales = quantize_int4(levels * 0.5, 32)
    assert packed.shape == (6, 32)
    assert torch.equal(unpack_int4(packed, 32).long(), levels)
    assert scales.unique().tolist() == [0.5]


def test_cuts_suit_their_shapes() -> None:
    assert {cut.rows for cut in candidates(CUTS, 1, 4096, 4096)} == {16}
    assert {cut.rows for cut in candidates(CUTS, 2048, 4096, 4096)} == {16, 32, 64, 128}
    assert all(cut.splits == 1 for cut in candidates(CUTS, 8192, 4096, 4096))
    assert candidates(CUTS, 1, 64, 16) == tuple(cut for cut in CUTS if cut.rows == 16 and cut.splits == 1)
    for m in (1, 16, 17, 64, 65, 8192):
        assert w8a8.untuned(m, 4096, 4096) in CUTS
        assert w4a16.untuned(m, 4096, 32) in w4a16.CUTS
    assert w8a8.untuned(1, 64, 128).splits == w4a16.untuned(1, 64, 1).splits == 1
