"""Philox4x32-10: the counter-based generator behind every draw: a token depends on nothing but its own coordinates.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 5.3; checked against the
Random123 known-answer vectors. There is no state: the same (seed, choice, output index, purpose, lane) gives the same
number in any batch, on any worker, after any restart.

Layout of key and counter, 32-bit words, least significant first:

    key      [seed & 0xffffffff, seed >> 32]
    counter  [lane // 2, output_index, choice, purpose]

One block of four output words makes two uniforms: lane 2i from words (0, 1), lane 2i+1 from words (2, 3). A uniform is
the top 53 bits of `word_even << 32 | word_odd`, times 2**-53: in [0, 1), every value exactly representable.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_DROP = np.uint64(11)


class Purpose(enum.IntEnum):
    """What a uniform is for; part of the counter, so that draws for different ends are independent. Values stay."""

    SAMPLE = 0
    """Drawing the token at an output index."""
    ACCEPT = 1
    """Speculation: accepting or rejecting a drafted token."""
    RESIDUAL = 2
    """Speculation: drawing from the residual distribution after a rejection."""


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32.

    Args:
        counter: [..., 4] words below 2**32.
        key: [..., 2] words below 2**32, broadcast against `counter`.

    Returns:
        [..., 4] uint32 words.
    """
    words = np.asarray(counter, dtype=np.uint64)
    keys = np.asarray(key, dtype=np.uint64)
    c0, c1, c2, c3 = (words[..., i] for i in range(4))
    k0, k1 = keys[..., 0], keys[..., 1]
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _WORD) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _WORD) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def uniform_batch(
    seeds: Sequence[int],
    choices: Sequence[int],
    indices: Sequence[int],
    purpose: Purpose = Purpose.SAMPLE,
    n_lanes: int = 1,
) -> NDArray[np.float64]:
    """Uniforms in [0, 1) for R rows at once: [R, n_lanes]. Row r equals `uniform(seeds[r], choices[r], indices[r], …)`.

    Raises:
        ValueError: a seed is not in 0…2**64-1, or a choice, an index or n_lanes is not in 0…2**32-1.
    """
    rows, blocks = len(seeds), (n_lanes + 1) // 2
    if not 0 <= n_lanes < 2**32:
        raise ValueError(f"n_lanes: {n_lanes} is not in 0…2**32-1")
    if not len(choices) == len(indices) == rows:
        raise ValueError(f"choices, indices: {len(choices)} and {len(indices)} entries for {rows} seeds")
    seed, choice, index = checked_words(seeds, choices, indices)
    counter = np.empty((rows, blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1] = index[:, None]
    counter[..., 2] = choice[:, None]
    counter[..., 3] = np.uint64(purpose)
    key = np.stack((seed & _LOW, seed >> _WORD), axis=-1)[:, None, :]
    words = philox4x32(counter, key).astype(np.uint64).reshape(rows, blocks * 2, 2)
    bits = ((words[..., 0] << _WORD) | words[..., 1]) >> _DROP
    return (bits.astype(np.float64) * 2.0**-53)[:, :n_lanes]


def uniform(
    seed: int, choice: int, index: int, purpose: Purpose = Purpose.SAMPLE, n_lanes: int = 1
) -> NDArray[np.float64]:
    """`n_lanes` uniforms in [0, 1) for one (seed, choice, output index, purpose). ValueError as `uniform_batch`."""
    return uniform_batch((seed,), (choice,), (index,), purpose, n_lanes)[0]


def checked_words(
    seeds: Sequence[int], choices: Sequence[int], indices: Sequence[int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """The coordinates of draws as words. ValueError as `uniform_batch`."""
    seed, index = _checked("seed", seeds, 2**64), _checked("output_index", indices, 2**32)
    return seed, _checked("choice", choices, 2**32), index


def _checked(name: str, values: Sequence[int], limit: int) -> NDArray[np.uint64]:
    for value in values:
        if not 0 <= value < limit:
            raise ValueError(f"{name}: {value} is not in 0…{limit - 1}")
    return np.array(values, dtype=np.uint64)
