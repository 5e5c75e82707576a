"""Blocks that lie one behind another, and can be moved or asked for together. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def neighbors(ids: Sequence[int], beside: Sequence[int] | None = None) -> Iterator[tuple[int, int, int]]:
    """(id, beside it, how many) of each run of ids that follow one another while what stands `beside` them does, too;
    None: their places in the list. ValueError where the two are not equally long.
    """
    others = range(len(ids)) if beside is None else beside
    if len(others) != len(ids):
        raise ValueError(f"beside: {len(others)} for {len(ids)} ids")
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[end - 1] + 1 or others[end] != others[end - 1] + 1:
            yield ids[start], others[start], end - start
            start = end
