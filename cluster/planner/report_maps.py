"""What the maps of a plan's report hold (`report_figures` draws them): the best of each cell, of all that the search
looked at, by split of prefill x split of decode, by the split of one phase, and by numbers of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..types import Role
from .result import Candidate, Evaluation, Fate, PlanResult, Pool

LOOKED = (Fate.SIMULATED, Fate.SCREENED)

Split = tuple[int, int]
"""Devices that split each layer, pipeline stages."""
Key = TypeVar("Key", int, Split)


@dataclass(frozen=True, slots=True)
class Cell:
    """One square of a map."""

    value: float = 0.0
    """Goodput per GPU; where not simulated, an estimate of it or the bound on it."""
    fate: Fate | None = None
    """None: never looked at."""
    note: str = ""
    decided: bool = True
    """False: what was seen before the search was ended; there may be more."""

    @property
    def rank(self) -> tuple[bool, float]:
        """What was simulated stands for a cell before what was only bounded or refused."""
        return self.fate in LOOKED, self.value


@dataclass(frozen=True, slots=True)
class Map(Generic[Key]):
    """Cells by row and column, and which of them is the best disaggregated plan's."""

    cells: dict[tuple[Key, Key], Cell] = field(default_factory=dict)
    chosen: tuple[Key, Key] | None = None

    @property
    def rows(self) -> list[Key]:
        """In order."""
        return sorted({row for row, _ in self.cells})

    @property
    def columns(self) -> list[Key]:
        """In order."""
        return sorted({column for _, column in self.cells})


def pair_map(result: PlanResult) -> Map[Split]:
    """Split of prefill x split of decode: the best that was looked at with them, and how many workers of each."""

    def key(candidate: Candidate) -> tuple[Split, Split] | None:
        prefill, decode = candidate.pool(Role.PREFILL), candidate.pool(Role.DECODE)
        return None if prefill is None or decode is None else (split_of(prefill), split_of(decode))

    return _best_of_each(result, key, lambda candidate: ":".join(str(pool.count) for pool in candidate.pools))


def count_map(result: PlanResult) -> Map[int]:
    """Workers of prefill x workers of decode: the best that was looked at with the best disaggregated plan's splits."""
    best = result.disaggregated
    splits = [] if best is None else [split_of(pool) for pool in best.candidate.pools]

    def key(candidate: Candidate) -> tuple[int, int] | None:
        if not candidate.disaggregated or [split_of(pool) for pool in candidate.pools] != splits:
            return None
        return candidate.pools[0].count, candidate.pools[1].count

    return _best_of_each(result, key, lambda candidate: "")


def phase_map(result: PlanResult, role: Role) -> Map[int]:
    """One phase alone, TP x PP."""
    phases = [one for one in result.phases if one.role is role]
    cells = {(one.tensor_parallel, one.pipeline_stages): Cell(one.goodput_per_gpu, one.fate) for one in phases}
    best = None if result.disaggregated is None else result.disaggregated.candidate.pool(role)
    return Map(cells, None if best is None else split_of(best))


def split_of(pool: Pool) -> Split:
    """Of each of its workers."""
    return pool.tensor_parallel, pool.pipeline_stages


def _best_of_each(
    result: PlanResult, key_of: Callable[[Candidate], tuple[Key, Key] | None], note: Callable[[Candidate], str]
) -> Map[Key]:
    """By `key_of`, None: in no cell. The best disaggregated plan's cell is its own."""
    best = result.disaggregated
    cells: dict[tuple[Key, Key], Cell] = {}
    for one in result.explored if best is None else (*result.explored, best):
        key = key_of(one.candidate)
        if key is None:
            continue
        cell = _cell(one, note(one.candidate))
        if key not in cells or cell.rank > cells[key].rank or one is best:
            cells[key] = cell
    return Map(cells, None if best is None else key_of(best.candidate))


def _cell(one: Evaluation, note: str) -> Cell:
    """What was cut short before anything was seen of it is worth its estimate."""
    if one.decided or one.goodput.mean > 0.0:
        return Cell(_worth(one), one.fate, note, decided=one.decided)
    return Cell(one.estimate / one.candidate.gpus, Fate.ESTIMATED, note)


def _worth(one: Evaluation) -> float:
    if one.fate in LOOKED:
        return one.goodput_per_gpu
    return (one.estimate if one.fate is Fate.ESTIMATED else one.bound) / one.candidate.gpus
