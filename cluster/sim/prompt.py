"""A prompt that was described rather than written: stretches of one token each. As long ones are as small as short
ones, a trace of them fits into memory, and their blocks have names without anything being hashed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import overload

from ..hashing import block_keys

_KEY_BYTES = 16
_PLACE_BITS = 32


class Prompt(Sequence[int]):
    """`numbers[i]` is the token of the i-th stretch of `stretch_tokens`, `last` that of everything behind them.

    Who makes prompts gives one number to one beginning: two prompts that have the same number at the same place are
    the same up to its end.
    """

    __slots__ = ("_last", "_length", "_numbers", "_stretch_tokens")

    def __init__(self, length: int, numbers: Sequence[int], stretch_tokens: int, last: int) -> None:
        self._length = length
        self._numbers = tuple(numbers)
        self._stretch_tokens = stretch_tokens
        self._last = last

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        stretches = (itertools.repeat(number, self._stretch_tokens) for number in self._numbers)
        tail = itertools.repeat(self._last, max(0, self._length - len(self._numbers) * self._stretch_tokens))
        return itertools.islice(itertools.chain(itertools.chain.from_iterable(stretches), tail), self._length)

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[int, ...]: ...

    def __getitem__(self, place: int | slice) -> int | tuple[int, ...]:
        return tuple(self)[place]

    def block_keys(self, block_size: int) -> list[bytes]:
        """Names of its full blocks, equal where everything up to their end is: what `cluster.hashing.block_keys` is
        for tokens that nothing is known of, which are hashed.
        """
        if self._numbers and self._stretch_tokens % block_size:
            return block_keys(self, block_size)
        keys: list[bytes] = []
        blocks, each = self._length // block_size, self._stretch_tokens // block_size
        for number in self._numbers:
            first = number << _PLACE_BITS
            here = min(each, blocks - len(keys))
            keys += [place.to_bytes(_KEY_BYTES, "big") for place in range(first, first + here)]
        first = self._last << _PLACE_BITS
        here = blocks - len(keys)
        return keys + [place.to_bytes(_KEY_BYTES, "big") for place in range(first, first + here)]
