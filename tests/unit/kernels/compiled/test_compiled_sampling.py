"""The compiled draws against numpy's: whole rows, every cut, ties, and rows that are no distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tandem.kernels.compiled.sampling import CLOSE, RowSampler
from tandem.kernels.philox import uniform_batch
from tandem.kernels.sampling import draw, log_normalizer, truncate

Cuts = dict[str, float]


def want(u: float, temperature: float = 1.0, top_k: float = 0, min_p: float = 0.0, top_p: float = 1.0) -> list[float]:
    return [temperature, u, top_k, min_p, top_p]


def drawn(z: np.ndarray, us: list[float], **cuts: float) -> list[int]:
    """One row, drawn from with every uniform."""
    return RowSampler(len(z)).draw([z] * len(us), np.array([want(u, **cuts) for u in us]))


def expected(z: np.ndarray, us: list[float], temperature: float = 1.0, **cuts: float) -> list[int]:
    scaled = (z - z.max()) / np.float32(temperature)
    ids, left = truncate(scaled, **{"top_k": 0, **cuts})  # type: ignore[arg-type]
    found = [draw(left, u) for u in us]
    return found if ids is None else ids[found].tolist()


def grid(count: int) -> list[float]:
    return [0.0, *np.random.default_rng(1).random(count).tolist(), 1 - 2**-32]


def logits(size: int, seed: int = 0, spread: float = 4.0) -> np.ndarray:
    return (np.random.default_rng([size, seed]).standard_normal(size) * spread).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1000, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_draws_are_numpys(size: int, temperature: float) -> None:
    differ = 0
    for seed in range(3):
        z, us = logits(size, seed), grid(20)
        found = drawn(z, us, temperature=temperature)
        assert min(found) >= 0
        assert max(found) < size
        differ += sum(a != b for a, b in zip(found, expected(z, us, temperature), strict=True))
    assert differ <= 1  # a uniform at the very edge between two tokens


@pytest.mark.parametrize("size", [7, 300, 49152])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 12.0])
@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 250},
        {"top_k": 3000},
        {"min_p": 0.05},
        {"top_k": -1, "min_p": -1.0},
        {"top_p": 0.0},
        {"top_p": 1e-9},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 0.9999999},
        {"top_k": 40, "min_p": 0.01, "top_p": 0.9, "temperature": 0.7},
        {"top_k": 2000, "top_p": 0.99, "temperature": 1.5},
    ],
)
def test_cuts_are_numpys(size: int, spread: float, cuts: Cuts) -> None:
    z, us = logits(size, spread=spread), grid(30)
    differ = sum(a != b for a, b in zip(drawn(z, us, **cuts), expected(z, us, **cuts), strict=True))
    assert differ <= 1


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("size", [10, 2000])
@pytest.mark.parametrize("cuts", [{"top_k": 3}, {"top_k": 900}, {"top_p": 0.3}, {"top_p": 0.5}, {"top_p": 0.75}])
def test_ties_go_as_numpys(levels: int, size: int, cuts: Cuts) -> None:
    """Top-k keeps all that equal the k-th, top-p those of the lowest ids; more of them than are ever sorted."""
    assert size < CLOSE or size / levels <= CLOSE or levels < 4
    z = np.random.default_rng(levels).integers(0, levels, size).astype(np.float32)
    us = grid(60)
    assert drawn(z, us, **cuts) == expected(z, us, **cuts)
    assert drawn(z - 7, us, **cuts) == expected(z, us, **cuts)


def test_what_has_no_mass_is_never_drawn() -> None:
    z = np.full(600, -np.inf, dtype=np.float32)
    z[[3, 300, 599]] = 1.0
    us = np.linspace(0, 1, 97, endpoint=False).tolist()
    for cuts in ({}, {"top_k": 10}, {"top_k": 599}, {"top_p": 0.99}, {"min_p": 1e-6}):
        assert set(drawn(z, us, **cuts)) == {3, 300, 599}, cuts
    assert drawn(z, [0.0, 0.34, 1 - 2**-53]) == [3, 300, 599]
    z[599] = -np.inf
    assert drawn(z, [1 - 2**-53]) == [300]


@pytest.mark.parametrize("where", [0, 8, 40, 41])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_row_that_is_no_distribution_is_refused_alone(where: int, value: float, cuts: Cuts) -> None:
    rows = np.zeros((3, 42), dtype=np.float32)
    rows[1, where] = value
    rows[2] = -np.inf
    good, *bad = RowSampler(42).draw(list(rows), np.array([want(0.5, **cuts)] * 3))
    assert good >= 0
    assert bad == [-1, -1]
    normalizers = RowSampler(42).normalizers(list(rows))
    assert math.isfinite(normalizers[0])
    assert not any(math.isfinite(value) for value in normalizers[1:])


def test_a_row_is_drawn_from_alike_whatever_stands_beside_it() -> None:
    """Rows of a wider matrix, in any order, with any cuts around; and nothing of them is changed."""
    rng = np.random.default_rng(5)
    whole = rng.standard_normal((9, 1000 + 16)).astype(np.float32)
    rows, before = whole[:, :1000], whole.copy()
    wants = np.array(
        [want(rng.random(), 0.8, k, 0.0, p) for k, p in zip(range(0, 36, 4), [1.0, 0.6, 0.9] * 3, strict=True)]
    )
    sampler = RowSampler(1000)
    together = sampler.draw(list(rows), wants)
    assert together == [sampler.draw([rows[r]], wants[r : r + 1])[0] for r in range(9)]
    assert together[::-1] == sampler.draw(list(rows[::-1]), wants[::-1].copy())
    np.testing.assert_array_equal(whole, before)


@pytest.mark.parametrize("size", [1, 7, 256, 1000, 49152])
def test_normalizers_are_numpys(size: int) -> None:
    rows = np.stack([logits(size, seed) for seed in range(4)])
    rows[3, : size // 2] = -np.inf
    found = RowSampler(size).normalizers(list(rows))
    assert found == pytest.approx([log_normalizer(row) for row in rows], rel=1e-6, abs=1e-6)


def test_uniforms_are_philoxs_to_the_bit() -> None:
    rng = np.random.default_rng(3)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, *rng.integers(0, 2**63, 200).tolist()]
    choices = rng.integers(0, 2**32, len(seeds)).tolist()
    indices = rng.integers(0, 2**32, len(seeds)).tolist()
    sampler = RowSampler(8)
    assert sampler.uniforms(seeds, choices, indices) == uniform_batch(seeds, choices, indices)[:, 0].tolist()
    with pytest.raises(ValueError, match=r"seed: -1 is not in 0…"):
        sampler.uniforms([-1], [0], [0])
    with pytest.raises(ValueError, match=r"choice: 4294967296 is not in 0…"):
        sampler.uniforms([1], [2**32], [0])


def test_frequencies_follow_the_distribution() -> None:
    z = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    us = np.random.default_rng(0).random(4000).tolist()
    np.testing.assert_allclose(np.bincount(drawn(z, us), minlength=4) / 4000, [0.5, 0.25, 0.125, 0.125], atol=0.03)
