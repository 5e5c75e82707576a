"""Philox4x32-10 against Random123's known answers, a plain-integer reference, and simple statistics."""

from __future__ import annotations

import numpy as np
import pytest
from tandem.kernels.philox import Purpose, philox4x32, uniform, uniform_batch

# Random123, tests/kat_vectors: philox4x32 10 <counter> <key> <result>
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def reference(counter: list[int], key: list[int]) -> list[int]:
    """Figure 4 and section 5.3 of the paper, in plain integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert philox4x32(words(counter), words(key)).tolist() == words(result)


def test_vectorized_equals_plain_integers() -> None:
    rng = np.random.default_rng(1)
    counters = rng.integers(0, 2**32, (50, 3, 4))
    keys = rng.integers(0, 2**32, (50, 1, 2))
    result = philox4x32(counters, keys)
    assert result.dtype == np.uint32
    for i in range(50):
        for j in range(3):
            assert result[i, j].tolist() == reference(counters[i, j].tolist(), keys[i, 0].tolist())


def test_layout_of_key_and_counter() -> None:
    """As the module's docstring says: changing it would change every seeded answer."""
    seed, choice, index, purpose = 0x0123456789ABCDEF, 7, 11, Purpose.RESIDUAL
    lanes = uniform(seed, choice, index, purpose, 5)
    for block in range(3):
        out = reference([block, index, choice, int(purpose)], [0x89ABCDEF, 0x01234567])
        for half in range(2):
            lane = 2 * block + half
            if lane < 5:
                assert lanes[lane] == ((out[2 * half] << 32 | out[2 * half + 1]) >> 11) / 2**53


def test_batch_equals_single_draws() -> None:
    seeds, choices, indices = [0, 5, 2**64 - 1, 5], [0, 1, 2**32 - 1, 1], [0, 9, 2**32 - 1, 10]
    batch = uniform_batch(seeds, choices, indices, Purpose.SAMPLE, 3)
    assert batch.shape == (4, 3)
    for r in range(4):
        assert batch[r].tolist() == uniform(seeds[r], choices[r], indices[r], Purpose.SAMPLE, 3).tolist()
    assert uniform_batch([], [], []).shape == (0, 1)
    assert uniform(1, 0, 0, n_lanes=0).shape == (0,)


def test_every_coordinate_matters() -> None:
    base = (3, 0, 0, Purpose.SAMPLE)
    others = [
        (4, 0, 0, Purpose.SAMPLE),
        (3 + 2**32, 0, 0, Purpose.SAMPLE),
        (3, 1, 0, Purpose.SAMPLE),
        (3, 0, 1, Purpose.SAMPLE),
        (3, 0, 0, Purpose.ACCEPT),
    ]
    draws = {float(uniform(*coordinates)[0]) for coordinates in [base, *others]}
    draws |= set(uniform(*base, 4)[1:].tolist())
    assert len(draws) == len(others) + 4


def test_purposes_never_change() -> None:
    assert [(p.name, p.value) for p in Purpose] == [("SAMPLE", 0), ("ACCEPT", 1), ("RESIDUAL", 2)]


@pytest.mark.parametrize("along", ["seed", "choice", "index", "lane"])
def test_uniforms_are_uniform_and_uncorrelated(along: str) -> None:
    """Chi-square over 64 cells (63 degrees of freedom: 103.4 is the 0.999 quantile) and lag-1 correlation."""
    n = 20_000
    if along == "lane":
        draws = uniform(12345, 0, 0, n_lanes=n)
    else:
        fixed, moving = [42] * n, list(range(n))
        columns = [moving if along == name else fixed for name in ("seed", "choice", "index")]
        draws = uniform_batch(*columns)[:, 0]
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 103.4
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (((-1,), (0,), (0,)), "seed"),
        (((2**64,), (0,), (0,)), "seed"),
        (((0,), (2**32,), (0,)), "choice"),
        (((0,), (0,), (-1,)), "output_index"),
        (((0,), (0, 1), (0,)), "choices"),
    ],
)
def test_out_of_range_coordinates_are_refused(arguments: tuple[tuple[int, ...], ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        uniform_batch(*arguments)


def test_negative_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="n_lanes"):
        uniform(0, 0, 0, n_lanes=-1)
