"""Linear objects against the formula, in every weight form of this machine."""

import pytest
import torch
from tandem.kernels import dispatch
from tandem.kernels.dispatch import make_linear, packs_half
from tandem.kernels.linear import (
    EmbeddingTable,
    PackedHalfLinear,
    PlainLinear,
    StackedLinear,
    TiedHead,
    fits_half,
    linear_reference,
)

needs_packing = pytest.mark.skipif(not packs_half(), reason="no FBGEMM half-precision product on this machine")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
@pytest.mark.parametrize(
    ("form", "tolerance"),
    [("float32", 1e-5), ("bfloat16", 2e-2), pytest.param("packed", 1e-5, marks=needs_packing)],
)
def test_product(form: str, tolerance: float, tokens: int, with_bias: bool) -> None:
    weight, x = drawn(70, 48), drawn(tokens, 48, seed=1)
    bias = drawn(70, seed=2) if with_bias else None
    linear = {
        "float32": lambda: PlainLinear(weight, bias),
        "bfloat16": lambda: PlainLinear(weight.bfloat16(), bias),
        "packed": lambda: PackedHalfLinear(weight, bias),
    }[form]()
    stored = weight.half().float() if form == "packed" else weight.bfloat16().float() if form == "bfloat16" else weight
    expected = linear_reference(x, stored, bias)
    y = linear(x)
    assert y.dtype == torch.float32
    assert (linear.in_features, linear.out_features) == (48, 70)
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


@needs_packing
def test_packed_half_holds_bfloat16_weights_exactly() -> None:
    weight = (drawn(64, 64) * 0.05).bfloat16()
    weight[weight.abs() < 2.0**-14] = 0
    y = PackedHalfLinear(weight)(torch.eye(64))
    assert torch.equal(y, weight.float().T)


@needs_packing
def test_weights_beyond_half_are_not_packed() -> None:
    weight = drawn(8, 8)
    weight[3, 3] = 7e4
    assert not fits_half(weight)
    assert not fits_half(torch.full((2, 2), float("nan")))
    linear = make_linear(weight, None, torch.bfloat16)
    assert isinstance(linear, PlainLinear)
    assert torch.isfinite(linear(torch.ones(1, 8))).all()


def test_choice_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "packs_half", lambda: False)
    assert isinstance(make_linear(drawn(8, 8), None, torch.bfloat16), PlainLinear)
    assert dispatch.half_dtype(drawn(2, 2)) == torch.bfloat16


def test_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match=r"dtype: torch\.float16 is not one of"):
        make_linear(drawn(2, 2), None, torch.float16)


def test_observer_sees_inputs_and_can_be_removed() -> None:
    seen: list[torch.Tensor] = []
    linear = make_linear(drawn(4, 4), None, torch.bfloat16)
    linear.observer = seen.append
    x = drawn(3, 4)
    linear(x)
    linear.observer = None
    linear(x)
    assert len(seen) == 1
    assert torch.equal(seen[0], x)


def test_stacked_parts_are_one_linear() -> None:
    whole, x = drawn(10, 6), drawn(3, 6, seed=1)
    stacked = StackedLinear([PlainLinear(whole[:7]), PlainLinear(whole[7:])])
    assert (stacked.in_features, stacked.out_features) == (6, 10)
    torch.testing.assert_close(stacked(x), PlainLinear(whole)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tied_head_shares_the_table(dtype: torch.dtype) -> None:
    table = drawn(2500, 576).to(dtype)  # several tiles, the last one not full
    embed = EmbeddingTable(table)
    head = TiedHead(embed)
    x = drawn(3, 576, seed=1)
    torch.testing.assert_close(head(x), x @ table.float().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(embed(torch.tensor([0, 2499])), table[[0, 2499]].float())
    assert head.resident_bytes == 0
    assert embed.resident_bytes == table.nbytes
