"""Drawing a token from a whole row, against numpy's draw."""

import numpy as np
import pytest
from tandem.kernels.compiled.sampling import RowSampler
from tandem.kernels.sampling import draw


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1000, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_draws_are_numpys(size: int, temperature: float) -> None:
    rng = np.random.default_rng(size)
    sampler = RowSampler(size)
    differ = 0
    for u in [0.0, *rng.random(60), 1 - 2**-32]:
        z = (rng.standard_normal(size) * 4).astype(np.float32)
        before = z.copy()
        found = sampler(z, temperature, float(u))
        expected = draw((z - z.max()) / np.float32(temperature), float(u))
        assert 0 <= found < size
        differ += found != expected
        np.testing.assert_array_equal(z, before)
    assert differ <= 1  # a uniform at the very edge between two tokens


def test_what_has_no_mass_is_never_drawn() -> None:
    z = np.full(600, -np.inf, dtype=np.float32)
    z[[3, 300, 599]] = 1.0
    sampler = RowSampler(600)
    assert {sampler(z, 1.0, u) for u in np.linspace(0, 1, 97, endpoint=False)} == {3, 300, 599}
    assert [sampler(z, 1.0, u) for u in (0.0, 0.34, 1 - 2**-53)] == [3, 300, 599]
    z[599] = -np.inf
    assert sampler(z, 1.0, 1 - 2**-53) == 300


@pytest.mark.parametrize("where", [0, 8, 40, 41])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_no_distribution_is_refused(where: int, value: float) -> None:
    z = np.zeros(42, dtype=np.float32)
    z[where] = value
    assert RowSampler(42)(z, 1.0, 0.5) == -1
    assert RowSampler(42)(np.full(42, -np.inf, dtype=np.float32), 1.0, 0.5) == -1


def test_frequencies_follow_the_distribution() -> None:
    z = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    sampler = RowSampler(4)
    drawn = np.bincount([sampler(z, 1.0, u) for u in np.random.default_rng(0).random(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.5, 0.25, 0.125, 0.125], atol=0.03)
