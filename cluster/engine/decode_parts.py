"""How the rows that decode are shared out among the plans of a pipeline, so that each of its stages has some."""

from __future__ import annotations

from typing import NamedTuple

PART_ROWS = 16
"""Rows that are worth a plan of their own in a pipeline: fewer are bound by reading weights, which is done once more
for each plan (`tests/load/pipeline.py`: 4 rows a plan lost, 16 did not)."""


class DecodeParts(NamedTuple):
    """Equal parts of the rows that decode without a prompt beside them."""

    parts: int = 1
    least_rows: int = 1
    """Of a part."""

    def rows(self, decoders: int) -> int:
        """How many of `decoders` rows are one plan's part."""
        return max(-(-decoders // self.parts), self.least_rows)
