"""Norms, activations, rotary and the int8 quantization fused with them, against the references in `kernels`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tandem.kernels.activation import activation_reference
from tandem.kernels.gpu.activation import INT8_BLOCK, activation, activation_int8, quantize_rows
from tandem.kernels.gpu.norm import MAX_CHANNELS, layer_norm, layer_norm_int8, rms_norm, rms_norm_int8
from tandem.kernels.gpu.rotary import rotary
from tandem.kernels.int8 import quantize_rows_reference
from tandem.kernels.layer_norm import layer_norm_reference
from tandem.kernels.rms_norm import rms_norm_reference
from tandem.kernels.rotary import rotary_reference, rotary_tables

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}
"""Relative and absolute: of 16 bits one unit in the last place, as the interpreter does not round bfloat16 to
nearest.
"""


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (3, 80)])
def test_rms_norm(
    device: torch.device, seeded: torch.Generator, dtype: torch.dtype, tokens: int, channels: int
) -> None:
    x = torch.randn(tokens, channels, generator=seeded, device=device).to(dtype)
    weight = torch.randn(channels, generator=seeded, device=device).to(dtype)
    close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight.float(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_added_rounded_and_kept(
    device: torch.device, seeded: torch.Generator, dtype: torch.dtype
) -> None:
    x, residual = (torch.randn(3, 48, generator=seeded, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(48, generator=seeded, device=device) for _ in range(2))
    total = x.float() + residual.float()
    for normed in ("rms", "layer"):
        kept = residual.clone()
        if normed == "rms":
            actual, expected = rms_norm(x, weight, 1e-5, kept), rms_norm_reference(kept, weight, 1e-5)
        else:
            actual, expected = (
                layer_norm(x, weight, bias, 1e-5, kept),
                layer_norm_reference(kept, weight, bias, 1e-5),
            )
        close(kept, total, dtype)
        close(actual, expected, dtype)


def test_views_of_wider_rows_are_taken_as_they_are(device: torch.device, seeded: torch.Generator) -> None:
    wide = torch.randn(4, 96, generator=seeded, device=device)
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    close(
        layer_norm(wide[:, 32:64], weight, bias, 1e-5),
        layer_norm_reference(wide[:, 32:64], weight, bias, 1e-5),
        torch.float32,
    )
    close(
        activation(wide[:, 32:], "silu", gated=True),
        activation_reference(wide[:, 32:], "silu", gated=True),
        torch.float32,
    )
    assert activation(wide[:0], "relu", gated=False).shape == (0, 96)
    assert rms_norm(wide[:0, :32], weight, 1e-5).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [False, True])
def test_a_quantized_norm_is_the_norm_quantized(
    device: torch.device, seeded: torch.Generator, centered: bool, dtype: torch.dtype
) -> None:
    """In float32: of 16 bits only what comes in and the residual are rounded."""
    x, residual = ((torch.randn(4, 100, generator=seeded, device=device) * 3).to(dtype) for _ in range(2))
    x[2], residual[2] = 0, 0
    weight, bias = torch.randn(100, generator=seeded, device=device).to(dtype), torch.zeros(100, device=device)
    kept = residual.clone()
    if centered:
        integers, scales = layer_norm_int8(x, weight, bias.to(dtype), 1e-5, kept)
        plain = layer_norm_reference(kept, weight.float(), bias, 1e-5)
    else:
        integers, scales = rms_norm_int8(x, weight, 1e-5, kept)
        plain = rms_norm_reference(kept, weight.float(), 1e-5)
    expected, expected_scales = quantize_rows_reference(plain)
    close(kept, x.float() + residual.float(), dtype)
    assert (integers.int() - expected.int()).abs().max() <= 1  # a product at an edge may be fused with a sum
    torch.testing.assert_close(scales, expected_scales, rtol=2e-6, atol=0)
    assert scales[2] == 0


def test_rows_too_long_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, MAX_CHANNELS + 1, device=device)
    with pytest.raises(ValueError, match=f"channels: {MAX_CHANNELS + 1} is not in 1…{MAX_CHANNELS}"):
        rms_norm(x, x[0], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["silu", "relu", "gelu"])
def test_activation(device: torch.device, seeded: torch.Generator, name: str, gated: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 72, generator=seeded, device=device) * 20).to(dtype)
    close(activation(x, name, gated=gated), activation_reference(x, name, gated=gated), dtype)


@pytest.mark.parametrize(("name", "gated"), [("silu", True), ("relu", False)])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(50, torch.float32), (50, torch.float16), (50, torch.bfloat16), (INT8_BLOCK + 6, torch.bfloat16)],
)
def test_a_quantized_activation_is_the_activation_quantized(
    device: torch.device, seeded: torch.Generator, width: int, dtype: torch.dtype, name: str, gated: bool
) -> None:
    x = torch.randn(3, width * (1 + gated), generator=seeded, device=device).to(dtype)
    x[1] = 0
    integers, scales = activation_int8(x, name, gated=gated)
    expected, expected_scales = quantize_rows_reference(activation_reference(x, name, gated=gated))
    assert (integers.int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(scales, expected_scales, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantized_as_they_are(device: torch.device, seeded: torch.Generator, dtype: torch.dtype) -> None:
    """To the bit, where a value lies halfway between two integers too."""
    x = torch.randn(20, 300, generator=seeded, device=device).to(dtype)[:, :256]
    x[1] = 0
    x[:, 0] = x.float().abs().amax(1).to(dtype) / 2
    integers, scales = quantize_rows(x)
    expected, expected_scales = quantize_rows_reference(x)
    assert torch.equal(integers, expected)
    assert torch.equal(scales, expected_scales)


def test_what_is_no_number_shows_in_its_own_row(device: torch.device, seeded: torch.Generator) -> None:
    x = torch.randn(3, 40, generator=seeded, device=device)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    with np.errstate(invalid="ignore"):
        _, scales = activation_int8(x, "relu", gated=False)
        _, expected = quantize_rows_reference(activation_reference(x, "relu", gated=False))
        normed = rms_norm_int8(x, torch.ones(40, device=device), 1e-5)[1]
    assert scales.isnan().tolist() == normed.isnan().tolist() == [True, True, False]
    torch.testing.assert_close(scales[2:], expected[2:])


def test_unknown_activation_is_named(device: torch.device) -> None:
    with pytest.raises(ValueError, match="'swiglu' is not one of"):
        activation(torch.zeros(1, 2, device=device), "swiglu", gated=False)


@pytest.mark.parametrize(("heads", "width", "dtype"), [(3, 16, torch.float32), (9, 12, torch.bfloat16)])
def test_rotary(device: torch.device, seeded: torch.Generator, heads: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, heads + 2, width, generator=seeded, device=device).to(dtype)[:, 1:-1]
    tables = rotary_tables(torch.arange(5, 8, device=device), torch.rand(width // 2, generator=seeded, device=device))
    close(rotary(x, *tables), rotary_reference(x, *tables), dtype)
