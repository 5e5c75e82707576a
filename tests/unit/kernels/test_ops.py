"""Every CPU path against the plain formula beside it, and against torch where torch has the operation."""
# ruff: noqa: N812

import math

import pytest
import torch
import torch.nn.functional as F
from tandem.kernels.activation import activation_cpu, activation_reference
from tandem.kernels.dispatch import operations
from tandem.kernels.kv_write import kv_write_cpu, kv_write_reference
from tandem.kernels.layer_norm import layer_norm_cpu, layer_norm_reference
from tandem.kernels.rms_norm import rms_norm_cpu, rms_norm_reference
from tandem.kernels.rotary import rotary_cpu, rotary_reference, rotary_tables


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 576), (7, 64), (3, 5, 16)])
def test_rms_norm(shape: tuple[int, ...], scale: float) -> None:
    x, weight = drawn(*shape, scale=scale), drawn(shape[-1], seed=1)
    expected = rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm_cpu(x, weight, 1e-5), expected)
    torch.testing.assert_close(F.rms_norm(x, shape[-1:], weight, 1e-5), expected)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert not rms_norm_cpu(torch.zeros(2, 8), torch.ones(8), 1e-5).any()


def test_rms_norm_keeps_its_input() -> None:
    x = drawn(2, 8)
    kept = x.clone()
    rms_norm_cpu(x, torch.ones(8), 1e-5)
    assert torch.equal(x, kept)


def test_layer_norm() -> None:
    x, weight, bias = drawn(5, 48, scale=3), drawn(48, seed=1), drawn(48, seed=2)
    torch.testing.assert_close(layer_norm_cpu(x, weight, bias, 1e-5), layer_norm_reference(x, weight, bias, 1e-5))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["silu", "relu", "gelu"])
def test_activation(name: str, gated: bool) -> None:
    x = drawn(4, 32, scale=3)
    kept = x.clone()
    torch.testing.assert_close(activation_cpu(x, name, gated=gated), activation_reference(x, name, gated=gated))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("function", [activation_cpu, activation_reference])
def test_unknown_activation_is_named(function) -> None:
    with pytest.raises(ValueError, match="'swiglu' is not one of"):
        function(torch.zeros(1, 2), "swiglu", gated=False)


def test_rotary() -> None:
    positions = torch.tensor([0, 1, 17, 4095])
    cos, sin = rotary_tables(positions, 1.0 / 1e4 ** (torch.arange(0, 16, 2) / 16))
    x = drawn(4, 6, 16)
    expected = rotary_reference(x, cos, sin)
    torch.testing.assert_close(rotary_cpu(x, cos, sin), expected)
    torch.testing.assert_close(expected[0], x[0])  # position 0 turns nothing
    torch.testing.assert_close(expected.norm(dim=-1), x.norm(dim=-1))  # a rotation


def test_rotary_scores_depend_on_distance_only() -> None:
    """Su et al. 2021, equation 11: <f(q, m), f(k, n)> is a function of m - n."""
    frequencies = 1.0 / 1e4 ** (torch.arange(0, 32, 2) / 32)
    q, k = drawn(1, 1, 32), drawn(1, 1, 32, seed=1)

    def score(m: int, n: int) -> torch.Tensor:
        turned_q = rotary_cpu(q, *rotary_tables(torch.tensor([m]), frequencies))
        turned_k = rotary_cpu(k, *rotary_tables(torch.tensor([n]), frequencies))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-4)
    assert not math.isclose(score(9, 4), score(9, 5), rel_tol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_write_touches_its_slots_only(dtype: torch.dtype) -> None:
    kv = drawn(5, 3, 2, 2, 4, 8).to(dtype)
    expected, actual = kv.clone(), kv.clone()
    new = drawn(3, 2, 2, 8, seed=1)
    blocks, slots = torch.tensor([4, 0, 4]), torch.tensor([3, 0, 1])
    kv_write_reference(expected[:, 1], new, blocks, slots)
    kv_write_cpu(actual[:, 1], new, blocks, slots)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[:, 0], kv[:, 0])
    assert torch.equal(actual[:, 2], kv[:, 2])
    assert torch.equal(actual[4, 1, :, :, 3], new[0].to(dtype))


def test_dispatch_names_what_it_has() -> None:
    assert operations("torch").rms_norm is rms_norm_cpu
    assert operations("reference").rms_norm is rms_norm_reference
    with pytest.raises(ValueError, match=r"kernels: 'tpu' is not one of \['reference', 'torch'\]"):
        operations("tpu")
