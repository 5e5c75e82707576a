"""One rank's tensors out of a model's: reads nothing else of the files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..weight_source import WeightSource, expected_shapes
from .shard import Part, Shard


def part_shapes(shard: Shard) -> dict[str, tuple[int, ...]]:
    """What a rank has of a model's tensors, by canonical name."""
    parts = ((name, shape, shard.part(name)) for name, shape in expected_shapes(shard.config).items())
    return {name: _shape(shape, part) for name, shape, part in parts if part is not None}


class ShardedWeights(WeightSource):
    """A source as a rank sees it: what it does not have is missing, of the rest there are its rows or columns."""

    def __init__(self, source: WeightSource, shard: Shard) -> None:
        """`source`: of the whole model, checked."""
        self._source = source
        self._whole = expected_shapes(shard.config)
        parts = {name: shard.part(name) for name in self._whole}
        self._parts: dict[str, Part] = {name: part for name, part in parts.items() if part is not None}
        self._shapes = part_shapes(shard)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def stored_name(self, name: str) -> str:
        return self._source.stored_name(name)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        part, whole, shape = self._parts[name], self._whole[name], self._shapes[name]
        if shape == whole:
            return self._source.read(name, rows)
        if part.columns is not None:
            columns = self._source.read_columns(name, slice(part.columns.start, part.columns.stop))
            return columns if rows is None else columns[rows]
        assert part.rows is not None
        mine = part.rows if rows is None else part.rows[rows]
        wanted = slice(mine.start, mine.stop)
        return self._source.read(name)[wanted] if len(whole) == 1 else self._source.read(name, wanted)

    def release(self) -> None:
        self._source.release()


def _shape(whole: tuple[int, ...], part: Part) -> tuple[int, ...]:
    rows = whole[0] if part.rows is None else len(part.rows)
    return (rows, *whole[1:]) if part.columns is None else (rows, len(part.columns))
