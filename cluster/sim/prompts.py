"""Prompts of a simulated workload: token ids that share a beginning exactly where the workload says so.

Nobody looks at the ids but prefix caches, so all tokens of one hashed block are one number, the tokens of a prompt that
nobody else has another one. Numbers are given out in the order in which the blocks are first met.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..workload.spec import Row
from .request import Asked


def asked(rows: Iterable[Row], *, sharing: bool = True) -> list[Asked]:
    """Requests called by their place. Not `sharing`: no prefix cache will look, and all prompts are made of one token,
    which is quick.
    """
    numbers: dict[int, int] = {}
    found = []
    own = 1
    for place, row in enumerate(rows):
        tokens: tuple[int, ...] = ()
        if sharing:
            for block_id in row.hash_ids[: -(-row.input_tokens // max(1, row.hash_tokens))]:
                number = numbers.get(block_id)
                if number is None:
                    own += 1
                    number = numbers[block_id] = own
                tokens += (number,) * row.hash_tokens
            own += 1
        tokens = tokens[: row.input_tokens] + (own if sharing else 0,) * (row.input_tokens - len(tokens))
        found.append(
            Asked(
                request_id=f"r{place}",
                arrival_s=row.arrival_s,
                prompt_token_ids=tokens,
                output_tokens=row.output_tokens,
                slo_class=row.slo_class,
            )
        )
    return found
