"""Prompts of a simulated workload: token ids that share a beginning exactly where the workload says so.

Nobody looks at the ids but prefix caches, so that all tokens of one hashed block are one number, and what a prompt
shares with nobody is another one. Numbers are given out in the order in which beginnings are first met.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..workload.spec import Row
from .prompt import Prompt
from .request import Asked


def asked(rows: Iterable[Row], *, sharing: bool = True) -> list[Asked]:
    """Requests called by their place. Not `sharing`: no prefix cache will look, and all prompts are made of one token,
    which is quick.
    """
    maker = _Beginnings()
    return [
        Asked(
            request_id=f"r{place}",
            arrival_s=row.arrival_s,
            prompt_token_ids=maker.prompt(row) if sharing else (0,) * row.input_tokens,
            output_tokens=row.output_tokens,
            slo_class=row.slo_class,
        )
        for place, row in enumerate(rows)
    ]


class _Beginnings:
    """Numbers of beginnings: of each chain of hashed blocks, and of what belongs to one prompt alone."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        """By (number of what stands before, block id)."""
        self._last = 0

    def prompt(self, row: Row) -> Prompt:
        numbers: Sequence[int] = ()
        if row.hash_ids:
            numbers = self._chain(row.hash_ids[: -(-row.input_tokens // row.hash_tokens)])
        self._last += 1
        return Prompt(row.input_tokens, numbers, row.hash_tokens, self._last)

    def _chain(self, block_ids: Iterable[int]) -> list[int]:
        found, before = [], 0
        for block_id in block_ids:
            number = self._numbers.get((before, block_id))
            if number is None:
                self._last += 1
                number = self._numbers[before, block_id] = self._last
            found.append(number)
            before = number
        return found
