"""Verification of drafts on the device is the reference's, which leaves the target's distribution as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tandem.kernels.gpu.sampling import probabilities, sample
from tandem.kernels.gpu.speculative import verify
from tandem.kernels.gpu_plans.draws import Wants
from tandem.kernels.philox import Purpose, uniform
from tandem.kernels.speculative import verify_reference

Table = NDArray[np.float32]
CHI_SQUARE = 20.5
"""Exceeded by one in a thousand of samples of six kinds (five degrees of freedom) from the distribution itself."""


def chi_square(counts: NDArray[np.float64], distribution: NDArray[np.float64]) -> float:
    """Pearson's statistic."""
    expected = distribution * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def distributions(rng: np.random.Generator, *shape: int) -> Table:
    """Probabilities over the last dimension, a fifth of them 0."""
    weights = np.exp(rng.standard_normal(shape) * 1.5) * (rng.random(shape) < 0.8)
    weights[..., 0] += 0.01
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("certain", [False, True])
def test_rows_are_the_references(device: torch.device, certain: bool) -> None:
    rng = np.random.default_rng(5)
    rows, most, size = 10, 3, 90
    target = distributions(rng, rows, most + 1, size)
    draft = distributions(rng, rows, most, size)
    draft[:6] = target[:6, :most]  # accepted
    drafted = np.array([[rng.choice(size, p=step / step.sum()) for step in row] for row in draft.astype(np.float64)])
    if certain:
        target[:6] = target[:6] * 0.01
        np.put_along_axis(target[:6, :most], drafted[:6, :, None], 0.99, -1)  # accepted, but for one in a hundred
    lengths = [3, 3, 2, 1, 0, 3] + [3] * 4
    seeds, indices = [int(seed) for seed in rng.integers(0, 2**63, rows)], rng.integers(0, 1000, rows).tolist()
    wants = Wants.of(temperature=[1.0] * rows, seed=seeds, index=indices, device=device)
    tokens, counts = verify(
        torch.from_numpy(target).to(device),
        None if certain else torch.from_numpy(draft).to(device),
        torch.from_numpy(drafted.astype(np.int32)).to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        wants.seed,
        wants.choice,
        wants.index,
        tile=32,
    )
    emitted = [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    expected = [
        verify_reference(
            target[r], None if certain else draft[r], drafted[r, : lengths[r]].tolist(), seeds[r], 0, indices[r]
        )
        for r in range(rows)
    ]
    assert emitted == expected
    assert {1, 4} <= {len(row) for row in emitted}


def test_what_decides_must_be_a_distribution(device: torch.device) -> None:
    target = torch.full((3, 2, 8), 0.125, device=device)
    target[0, 0], target[1, 1], target[2, 1] = float("nan"), float("nan"), 0
    drafted = torch.zeros(3, 1, dtype=torch.int32, device=device)
    wants = Wants.of(temperature=[1.0] * 3, seed=[1] * 3, index=[0] * 3, device=device)
    draft = torch.zeros(3, 1, 8, device=device)
    draft[:, :, 0] = 0.125  # as likely as in the target: accepted wherever there is one
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    with np.errstate(invalid="ignore"):
        _, counts = verify(target, draft, drafted, lengths, wants.seed, wants.choice, wants.index, tile=8)
        pairs = zip(target.cpu().numpy(), draft.cpu().numpy(), strict=True)
        expected = [verify_reference(p, q, [0], 1, 0, 0) for p, q in pairs]
    assert counts.tolist() == [0, 0, 0]
    assert expected == [[], [], []]


def test_where_nothing_is_left_the_target_is_drawn_from(device: torch.device) -> None:
    """A draft that is nowhere less likely than the target, as rounding can make it: rejected half of the time."""
    rng = np.random.default_rng(3)
    rows, size = 8, 70
    target = np.repeat(distributions(rng, 1, 2, size), rows, 0)
    draft = target[:, :1] * 2
    drafted = np.full((rows, 1), int(target[0, 0].argmax()), np.int32)
    wants = Wants.of(temperature=[1.0] * rows, seed=range(rows), index=[4] * rows, device=device)
    lengths = torch.ones(rows, dtype=torch.int32, device=device)
    given = (torch.from_numpy(x).to(device) for x in (target, draft, drafted))
    tokens, counts = verify(*given, lengths, wants.seed, wants.choice, wants.index, tile=32)
    emitted = [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    assert emitted == [verify_reference(target[r], draft[r], [drafted[r, 0]], r, 0, 4) for r in range(rows)]
    assert {len(row) for row in emitted} == {1, 2}
    assert any(row[0] != drafted[0, 0] for row in emitted)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_with_cuts_and_without_drafts_tokens_are_those_of_sampling(device: torch.device, temperature: float) -> None:
    """The distribution that is verified against is the one that is sampled from, and so is the draw behind the last
    accepted token. A greedy row accepts the likeliest token only, and has it in a rejected one's place.
    """
    rows, size = 6, 60
    rng = np.random.default_rng(8)
    logits = torch.from_numpy((rng.standard_normal((rows, 2, size)) * 3).astype(np.float32)).to(device)
    cuts = {"temperature": [temperature] * rows, "min_p": [0.02] * rows, "seed": range(rows)}
    plain, behind = (Wants.of(**cuts, index=[index] * rows, device=device) for index in (5, 6))
    targets = torch.stack([probabilities(logits[:, g].contiguous(), plain, 32) for g in range(2)], 1)
    first = sample(logits[:, 0].contiguous(), plain, 32)
    second = sample(logits[:, 1].contiguous(), behind, 32)
    coordinates = (plain.seed, plain.choice, plain.index)

    none = torch.zeros(rows, dtype=torch.int32, device=device)
    tokens, counts = verify(targets, None, first[:, None].contiguous(), none, *coordinates, tile=32)
    assert counts.tolist() == [1] * rows
    assert torch.equal(tokens[:, 0], first)

    likeliest = targets[:, 0].argmax(1).int()
    drafted = torch.where(torch.arange(rows, device=device) % 2 == 0, likeliest, (likeliest + 1) % size).int()
    tokens, counts = verify(targets, None, drafted[:, None].contiguous(), none + 1, *coordinates, tile=32)
    for r, (row, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
        assert all(targets[r, g, token] > 0 for g, token in enumerate(row[:count]))  # what is cut off is never emitted
        if count == 2:
            assert row == [drafted[r], second[r]]
        elif temperature == 0:
            assert (row[0], r % 2) == (likeliest[r], 1)
    assert {1, 2} == set(counts.tolist())


@pytest.mark.parametrize("certain", [False, True])
def test_emitted_tokens_are_distributed_as_the_targets(certain: bool) -> None:
    """Leviathan et al., appendix A.1: of the first token, and of the second where there is one."""
    rng = np.random.default_rng(1)
    target, draft = distributions(rng, 3, 6).astype(np.float64), distributions(rng, 2, 6).astype(np.float64)
    target, draft = ((x + 0.02) / (x + 0.02).sum(-1, keepdims=True) for x in (target, draft))
    p, q = target.astype(np.float32), draft.astype(np.float32)
    first, second = np.zeros(6), np.zeros(6)
    for seed in range(1000):
        cumulative = np.cumsum(q[0], dtype=np.float64), np.cumsum(q[1], dtype=np.float64)
        drafted = [
            int(np.searchsorted(edges, uniform(seed, 0, g, Purpose.SAMPLE)[0] * edges[-1], side="right"))
            for g, edges in enumerate(cumulative)
        ]
        if certain:
            drafted = [1, 4]
        emitted = verify_reference(p, None if certain else q, drafted, seed, 0, 0)
        first[emitted[0]] += 1
        if len(emitted) > 1:
            second[emitted[1]] += 1
    assert chi_square(first, target[0]) < CHI_SQUARE
    assert chi_square(second, target[1]) < CHI_SQUARE
    assert second.sum() > 150
    assert chi_square(first, draft[0]) > 3 * CHI_SQUARE  # it would show
