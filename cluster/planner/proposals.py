"""Placements that may be the best, by estimates: what the algorithms propose, and where local searches lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..types import Role
from .algorithms import algorithm_1, algorithm_2, colocated, few_enough
from .crew import Means
from .evaluate import worth
from .neighbors import neighbors
from .outlook import Estimate, Outlook
from .phases import Phases
from .place import all_splits, why_not
from .result import Candidate, Evaluation, Fate
from .setting import Setting

CLIMBS, LOCAL_ROUNDS, LOCAL_GAIN = 3, 6, 1.01
"""Local searches of a side, from its best proposals of unlike splits; their length; what a step must gain."""
WAVE = 4
"""Proposals that are estimated at once; the next are held against the best of them."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """A `Task`: the estimate of a candidate; with a rate that others reach: in full only where it is kept."""

    candidate: Candidate
    seed: int
    rate: float = 0.0
    near: float = 0.0

    def do(self, means: Means) -> Estimate:
        """See `Outlook`."""
        if self.rate:
            return means.outlook.challenge(self.candidate, self.seed, self.rate)
        return means.outlook.estimate(self.candidate, self.seed, self.near)


class Do(Protocol):
    """Does estimates, and tells the progress: `what`, and the share of the whole at their begin and end."""

    def __call__(self, tasks: Sequence[Challenge], what: str, begin: float, end: float, /) -> list[Estimate | None]:
        """In their order; None where time ran out."""


class Proposals:
    """Of one search. What it looks at goes into `explored`."""

    def __init__(self, setting: Setting, outlook: Outlook, phases: Phases, do: Do) -> None:
        self._setting = setting
        self._outlook = outlook
        self._phases = phases
        self._do = do
        self.explored: dict[Candidate, Evaluation] = {}
        self.estimates: dict[tuple[Candidate, int], Estimate] = {}
        """By candidate and seed."""

    def estimate(self, candidate: Candidate) -> float:
        """Requests a second; 0 where it was not estimated."""
        return self.explored[candidate].estimate if candidate in self.explored else 0.0

    def worth(self, candidate: Candidate, goodput: float) -> tuple[float, ...]:
        """More is better."""
        return worth(candidate, goodput, self._setting.target_rate)

    def _able(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that can run and that one request alone does not rule out; the others go into the map with the reason
        why they were left.
        """
        able = []
        for one in candidates:
            why = why_not(self._setting, one)
            if why:
                self.explored[one] = Evaluation(candidate=one, fate=Fate.REFUSED, why=why)
                continue
            hopeless = next((found for pool in one.pools if (found := self._outlook.hopeless(pool))), None)
            if hopeless is not None:
                self._phases.hopeless.append(hopeless)
                self.explored[one] = Evaluation(candidate=one, fate=Fate.HOPELESS, why=hopeless.text)
            else:
                able.append(one)
        return able

    def _look_at(self, candidates: Sequence[Candidate], at_least: float, what: str, begin: float, end: float) -> None:
        """Estimates them; in full only those that reach `at_least` requests a second for each GPU."""
        new = [one for one in candidates if one not in self.explored]
        seed = self._setting.seeds[0]
        asks = [Challenge(one, seed, at_least * one.gpus) for one in new]
        self.ask(asks, what, begin, end)
        for one in new:
            found, bound = self.estimates.get((one, seed)), self._outlook.bound(one)
            goodput = found.goodput if found is not None else 0.0
            why = self._outlook.why_nothing(one) if found is not None and goodput == 0.0 else ""
            seen = Evaluation(candidate=one, fate=Fate.ESTIMATED, why=why, bound=bound, estimate=goodput)
            self.explored[one] = replace(seen, decided=found is not None)

    def ask(self, asks: Sequence[Challenge], what: str, begin: float, end: float) -> None:
        """Estimates, and keeps what there was time for."""
        for ask, found in zip(asks, self._do(asks, what, begin, end), strict=True):
            if found is not None:
                self.estimates[ask.candidate, ask.seed] = found

    def _ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        able = [one for one in candidates if self.estimate(one) > 0.0]
        return sorted(able, key=lambda one: self.worth(one, self.estimate(one)), reverse=True)

    def _propose(self, candidates: Sequence[Candidate], what: str, begin: float, end: float) -> list[Candidate]:
        """The most promising first, with where a local search leads from there."""
        able, middle = self._able(candidates), (begin + end) / 2
        if able and not able[0].disaggregated:  # those of the algorithms come best first
            able.sort(key=lambda one: self.worth(one, self._outlook.bound(one)), reverse=True)
        able = [*(first := unlike(able)), *(one for one in able if one not in first)]
        best = 0.0
        for place in range(0, len(able), WAVE):
            wave = able[place : place + WAVE]
            share = [begin + (middle - begin) * (place + after) / len(able) for after in (0, len(wave))]
            self._look_at(wave, best, what, *share)
            if self._setting.target_rate is None:
                best = max(best, *(self.estimate(one) / one.gpus for one in wave))
        ranked = self._ranked(able)
        way = [one for start in unlike(ranked)[:CLIMBS] for one in self._climb(start, middle, end)]
        return self._ranked(list(dict.fromkeys([*ranked, *way])))

    def _climb(self, here: Candidate, begin: float, end: float) -> list[Candidate]:
        """Local search: from one candidate to the neighbor that is estimated best, while that is better; its way."""
        way = []
        for place in range(LOCAL_ROUNDS):
            around = [
                one
                for one in neighbors(self._setting, here)
                if one.disaggregated or one.gpus == here.gpus  # the baseline stays at its count
            ]
            estimate, full = self.estimate(here), self._setting.target_rate is not None
            at_least = 0.0 if full else LOCAL_GAIN * estimate / here.gpus
            share = [begin + (end - begin) * (place + after) / LOCAL_ROUNDS for after in (0, 1)]
            self._look_at(around, at_least, "local search", *share)
            step = max(around, key=lambda one: self.worth(one, self.estimate(one)), default=None)
            if step is None or self.worth(step, self.estimate(step) / LOCAL_GAIN) <= self.worth(here, estimate):
                break
            here = step
            way.append(here)
        return way

    def split(self) -> list[Candidate]:
        """Disaggregated ones, the most promising first."""
        prefill, decode = self._phases.of(Role.PREFILL), self._phases.of(Role.DECODE)
        proposals = [*algorithm_1(self._setting, prefill, decode), *algorithm_2(self._setting, prefill, decode)]
        return self._propose(proposals, "disaggregated placements", 0.1, 0.2)

    def mixed(self, gpus: int) -> list[Candidate]:
        """Colocated ones on so many GPUs, the most promising first; and on as few as keep a rate that is wanted."""
        proposals = colocated(self._setting, all_splits(self._setting), gpus)
        found = self._propose(proposals, "colocated placements", 0.2, 0.3)
        fewer = [other for one in found for other in few_enough(self._setting, one, self.estimate(one))]
        return self._ranked([*found, *self._propose(fewer, "fewer workers", 0.3, 0.3)]) if fewer else found


def unlike(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each kind of splits: limits of batches are what the local search is for."""
    found: dict[tuple[tuple[int, int], ...], Candidate] = {}
    for one in candidates:
        found.setdefault(splits_of(one), one)
    return list(found.values())


def splits_of(candidate: Candidate) -> tuple[tuple[int, int], ...]:
    """(tensor parallel, pipeline stages) of each pool."""
    return tuple((pool.tensor_parallel, pool.pipeline_stages) for pool in candidate.pools)
