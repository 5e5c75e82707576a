"""The GPU's draws, tokens and logprobs are the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tandem.kernels.gpu.draws import uniforms
from tandem.kernels.gpu.logprobs import logprobs
from tandem.kernels.gpu.sampling import probabilities, sample
from tandem.kernels.gpu_plans.draws import INFINITE, NOT_A_NUMBER, NOTHING, Wants
from tandem.kernels.philox import Purpose, uniform_batch
from tandem.kernels.sampling import draw, log_normalizer, most_likely, truncate

TILE = 16
"""A stretch is four of them: rows here have several."""
Row = NDArray[np.float32]


def test_uniforms_are_the_cpus_to_the_bit(device: torch.device) -> None:
    rng = np.random.default_rng(3)
    seeds = [0, 1, 2**63, 2**64 - 1, *(int(seed) for seed in rng.integers(0, 2**64, 4, dtype=np.uint64))]
    choices = [0, 1, 2**31, 2**32 - 1, 5, 6, 7, 8]
    indices = [0, 2**32 - 1, 2**31, 1, 9, 10, 11, 12]
    wants = Wants.of(temperature=[1.0] * 8, seed=seeds, choice=choices, index=indices, device=device)
    for purpose in Purpose:
        drawn = uniforms(wants.seed, wants.choice, wants.index, purpose)
        assert drawn.tolist() == uniform_batch(seeds, choices, indices, purpose)[:, 0].tolist()


def on_cpu(z: Row, temperature: float, cuts: dict[str, float], u: float) -> tuple[int, Row]:
    """Token and distribution as the CPU has them."""
    distribution = np.zeros(len(z), dtype=np.float32)
    if temperature < 1e-5:
        distribution[z.argmax()] = 1
        return int(z.argmax()), distribution
    x = (z - z.max()) / np.float32(temperature)
    ids, left = truncate(x, **cuts)  # type: ignore[arg-type]
    ids = np.arange(len(z)) if ids is None else ids
    weights = np.exp(left)
    distribution[ids] = weights / weights.sum(dtype=np.float64)
    return int(ids[draw(left, u)]), distribution


CUTS: tuple[tuple[float, dict[str, float]], ...] = (
    (1.0, {}),
    (0.7, {"top_k": 5}),
    (1.3, {"min_p": 0.05}),
    (0.9, {"top_p": 0.8}),
    (1.0, {"top_k": 20, "min_p": 0.01, "top_p": 0.9}),
    (0.0, {"top_k": 3}),
    (2.0, {"top_p": 0.999}),
    (0.01, {"top_k": 40}),
    (1.0, {"top_k": 1}),
    (1.0, {"top_p": 1e-6}),
)


def wanted(
    rng: np.random.Generator, chosen: list[int], device: torch.device
) -> tuple[list[tuple[float, dict[str, float]]], Wants, list[float]]:
    """Some of `CUTS`, with random seeds: as they are, on the device, and their uniforms."""
    picked = [CUTS[i] for i in chosen]
    seeds = [int(seed) for seed in rng.integers(0, 2**64, len(picked), dtype=np.uint64)]
    cuts = [{"top_k": 0, "min_p": 0.0, "top_p": 1.0} | cut for _, cut in picked]
    wants = Wants.of(
        temperature=[temperature for temperature, _ in picked],
        seed=seeds,
        index=chosen,
        top_k=[int(cut["top_k"]) for cut in cuts],
        min_p=[cut["min_p"] for cut in cuts],
        top_p=[cut["top_p"] for cut in cuts],
        device=device,
    )
    return picked, wants, uniform_batch(seeds, [0] * len(seeds), chosen)[:, 0].tolist()


@pytest.mark.parametrize(
    ("kind", "chosen"), [("drawn", [0, 1, 2, 3, 4, 6, 7]), ("tied", [0, 1, 3, 4, 5]), ("banned", [1, 6, 8, 9])]
)
def test_tokens_are_the_cpus(device: torch.device, kind: str, chosen: list[int]) -> None:
    rng = np.random.default_rng(7)
    z = (rng.standard_normal((len(chosen), 150)) * 3).astype(np.float32)
    if kind == "tied":
        z = np.round(z / 2)
        z[3] = 1.5
    if kind == "banned":
        z[:, rng.permutation(150)[:130]] = -np.inf
    picked, wants, draws = wanted(rng, chosen, device)
    logits = torch.from_numpy(z).to(device)
    kept = logits.clone()
    tokens = sample(logits, wants, TILE).tolist()
    assert torch.equal(logits, kept)
    expected = [
        on_cpu(row, temperature, cut, u)[0] for row, (temperature, cut), u in zip(z, picked, draws, strict=True)
    ]
    assert tokens == expected


def test_distributions_are_the_cpus(device: torch.device) -> None:
    rng = np.random.default_rng(7)
    picked, wants, draws = wanted(rng, [1, 3, 4, 5, 6], device)
    z = np.round(rng.standard_normal((len(picked), 100)) * 2).astype(np.float32)
    distributions = probabilities(torch.from_numpy(z).to(device), wants, TILE).cpu().numpy()
    for row, found, (temperature, cut), u in zip(z, distributions, picked, draws, strict=True):
        expected = on_cpu(row, temperature, cut, u)[1]
        np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-6, err_msg=str(cut))


def test_many_draws_of_one_row_go_where_the_cpus_go(device: torch.device) -> None:
    z = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    rows = 12
    logits = torch.from_numpy(z).to(device).expand(rows, -1)
    wants = Wants.of(temperature=[1.0] * rows, seed=[11] * rows, index=range(rows), device=device)
    expected = [on_cpu(z, 1.0, {}, u)[0] for u in uniform_batch([11] * rows, [0] * rows, range(rows))[:, 0]]
    assert sample(logits, wants, TILE).tolist() == expected
    assert len(set(expected)) > 5


def strange(device: torch.device) -> torch.Tensor:
    """Rows of 70 logits that are no distribution, and one that is."""
    logits = torch.zeros(5, 70, device=device)
    logits[0, 69], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, :65], logits[3, 66:] = float("-inf"), float("-inf")
    logits[4] = float("nan")
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_distribution_draws_nothing(device: torch.device, temperature: float) -> None:
    wants = Wants.of(temperature=[temperature] * 5, seed=[1] * 5, index=[0] * 5, top_k=[2] * 5, device=device)
    with np.errstate(invalid="ignore"):
        assert sample(strange(device), wants, TILE).tolist() == [NOT_A_NUMBER, INFINITE, NOTHING, 65, NOT_A_NUMBER]
        distributions = probabilities(strange(device), wants, TILE)
    assert distributions.isnan().all(1).tolist() == [True, True, True, False, True]
    assert distributions[3].nonzero().tolist() == [[65]]


def test_logprobs(device: torch.device) -> None:
    z = np.round(np.random.default_rng(2).standard_normal((4, 150)) * 2).astype(np.float32)
    z[2, 3:], z[0, 0] = -np.inf, -np.inf
    asking, counts, tokens = [3, 0, 2], [0, 5, 5], [7, 1, 2, -1]
    asked = (torch.tensor(values, dtype=torch.int32, device=device) for values in (tokens, asking, counts))
    found = logprobs(torch.from_numpy(z).to(device), *asked, 5, tile=TILE)
    assert found.normalizers_Q.tolist() == pytest.approx([log_normalizer(z[r]) for r in asking], rel=1e-7)
    assert found.chosen_Q.tolist()[1:] == [float(z[r, tokens[r]]) for r in asking[1:]]
    assert found.chosen_Q.isnan().tolist() == [True, False, False]
    for r, count, ids, values in zip(asking, counts, found.ids_QM.tolist(), found.values_QM.tolist(), strict=True):
        expected = most_likely(z[r], count).tolist()
        assert ids[:count] == expected + [-1] * (count - len(expected))
        assert values[: len(expected)] == z[r, expected].tolist()


def test_what_is_no_distribution_has_no_normalizer(device: torch.device) -> None:
    rows = torch.arange(5, dtype=torch.int32, device=device)
    with np.errstate(invalid="ignore"):
        found = logprobs(strange(device), torch.zeros_like(rows), rows, torch.zeros_like(rows), 0, tile=TILE)
    assert found.normalizers_Q.isnan().tolist() == [True, True, True, False, True]
