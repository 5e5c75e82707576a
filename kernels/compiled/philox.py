"""`kernels.philox` for the rows of a step in one call: the same bits, without dozens of array operations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .target import kernel

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _WORD, _DROP = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(11)

Words = NDArray[np.uint64]


@kernel
def first_lanes(seeds: Words, choices: Words, indices: Words, purpose: int, uniforms: NDArray[np.float64]) -> None:
    """[R] each -> lane 0 of `kernels.philox.uniform_batch`. Seeds below 2**64, the others below 2**32: not checked."""
    for r in range(len(seeds)):
        k0, k1 = seeds[r] & _LOW, seeds[r] >> _WORD
        c0, c1, c2, c3 = np.uint64(0), indices[r], choices[r], np.uint64(purpose)
        for _ in range(_ROUNDS):
            first, second = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
            c0, c1, c2, c3 = (second >> _WORD) ^ c1 ^ k0, second & _LOW, (first >> _WORD) ^ c3 ^ k1, first & _LOW
            k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
        uniforms[r] = np.float64(((c0 << _WORD) | c1) >> _DROP) * 2.0**-53
