"""Truncation and drawing on one row, against transformers' warpers and a plain reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tandem.kernels.sampling import (
    draw,
    log_normalizer,
    min_p_ids,
    most_likely,
    top_k_ids,
    top_p_ids,
    truncate,
)
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

SIZES = [2, 7, 255, 256, 257, 5000]
NO_IDS = torch.zeros((1, 1), dtype=torch.long)


def row(size: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    """Random logits without ties, maximum 0."""
    z = np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)
    return z - z.max()


def everything(z: NDArray[np.float32], ids: NDArray[np.int64] | None) -> list[int]:
    return list(range(z.shape[0])) if ids is None else ids.tolist()


def warped(warper: object, z: NDArray[np.float32]) -> list[int]:
    scores = warper(NO_IDS, torch.from_numpy(z.copy())[None])[0]  # type: ignore[operator]
    return torch.nonzero(scores > -torch.inf)[:, 0].tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_top_k_as_transformers(size: int, k: int) -> None:
    for seed in range(5):
        z = row(size, seed)
        assert everything(z, top_k_ids(z, k)) == warped(TopKLogitsWarper(k), z)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_as_transformers(size: int, min_p: float) -> None:
    for seed in range(5):
        z = row(size, seed)
        assert everything(z, min_p_ids(z, min_p)) == warped(MinPLogitsWarper(min_p), z)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_top_p_as_transformers(size: int, top_p: float, spread: float) -> None:
    for seed in range(3):
        z = row(size, seed, spread)
        found, expected = set(everything(z, top_p_ids(z, top_p))), set(warped(TopPLogitsWarper(top_p), z))
        # transformers sums in float32: with many tokens of little mass its edge is off by some of them.
        slack = 0 if size < 300 else 2 + size // 500
        assert len(found ^ expected) <= slack
        assert found <= expected or expected <= found


@pytest.mark.parametrize("top_p", [1e-9, 0.2, 0.5, 0.75, 0.99, 0.999999])
def test_top_p_is_the_smallest_set_that_reaches_the_mass(top_p: float) -> None:
    for seed in range(20):
        z = row(300 if seed % 2 else 3000, seed, 2.0)
        p = np.exp(z.astype(np.float64))
        p /= p.sum()
        chosen = everything(z, top_p_ids(z, top_p))
        assert p[chosen].sum() >= top_p * (1 - 1e-6)
        assert p[chosen].sum() - p[chosen].min() < top_p * (1 + 1e-6)
        assert p[chosen].min() > np.delete(p, chosen).max(initial=0.0)


def test_off_values_keep_everything() -> None:
    for size in SIZES:
        z = row(size)
        assert [top_k_ids(z, k) for k in (0, -1, size, size + 1)] == [None] * 4
        assert min_p_ids(z, 0.0) is None
        assert top_p_ids(z, 1.0) is None
        ids, left = truncate(z)
        assert ids is None
        assert left is z


def test_ties() -> None:
    z = np.array([-1, 0, -1, 0, -1, -2], dtype=np.float32)
    assert everything(z, top_k_ids(z, 3)) == [0, 1, 2, 3, 4]
    flat = np.zeros(10, dtype=np.float32)
    assert everything(flat, top_p_ids(flat, 0.45)) == [0, 1, 2, 3, 4]
    wide = np.zeros(5000, dtype=np.float32)
    assert everything(wide, top_p_ids(wide, 0.5)) == list(range(2500))
    z = np.array([-1, 0, -1, -1, -1], dtype=np.float32)
    # Masses are 0.405 and four times 0.149: two of the tied ones are needed.
    assert everything(z, top_p_ids(z, 0.6)) == [0, 1, 2]


def test_truncations_work_on_what_the_one_before_left() -> None:
    z = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32) / np.float32(0.4))
    # top-k leaves a mass of 0.9: 0.75 of that takes two tokens, 0.75 of the whole would take three.
    ids, left = truncate(z, top_k=3, top_p=0.75)
    assert everything(z, ids) == [2, 3]
    assert left.tolist() == z[2:].tolist()
    ids, _ = truncate(z, top_k=3, min_p=0.6, top_p=0.9)
    assert everything(z, ids) == [2, 3]


def reference_draw(z: NDArray[np.float32], u: float) -> int:
    p = np.exp(z.astype(np.float64))
    cumulative, target = 0.0, u * math.fsum(p)
    for token, mass in enumerate(p):
        cumulative += mass
        if cumulative > target:
            return token
    return int(np.flatnonzero(p)[-1])


@pytest.mark.parametrize("size", SIZES)
def test_draw_is_the_inverse_of_the_cumulative_distribution(size: int) -> None:
    rng = np.random.default_rng(4)
    for seed in range(40):
        z = row(size, seed)
        z[rng.random(size) < 0.3] = -np.inf
        z[rng.integers(size)] = 0.0
        u = float(rng.random())
        assert draw(z, u) == reference_draw(z, u)


def test_draw_never_takes_a_token_without_mass() -> None:
    for size in (1, 5, 256, 600):
        for only in {0, size // 2, size - 1}:
            z = np.full(size, -np.inf, dtype=np.float32)
            z[only] = 0.0
            assert {draw(z, u) for u in (0.0, 0.3, 1 - 2**-53)} == {only}
    z = np.full(1000, -200.0, dtype=np.float32)
    z[[300, 700]] = 0.0
    assert draw(z, 0.0) == 300
    assert draw(z, 1 - 2**-53) == 700


def test_log_normalizer_is_logsumexp() -> None:
    for size in SIZES:
        x = row(size) * 10 + 500
        assert log_normalizer(x) == pytest.approx(float(torch.from_numpy(x).double().logsumexp(0)), rel=1e-7)


def test_most_likely_is_sorted_with_ties_by_lower_id() -> None:
    x = np.array([1, 5, 5, -np.inf, 2, 5, 1], dtype=np.float32)
    assert most_likely(x, 0).tolist() == []
    assert most_likely(x, 2).tolist() == [1, 2]
    assert most_likely(x, 5).tolist() == [1, 2, 5, 4, 0]
    assert most_likely(x, 99).tolist() == [1, 2, 5, 4, 0, 6]
