"""What a search knows: what was estimated and simulated, what became of each candidate, and the ways to more of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from .crew import Crew, Found, Search, Task
from .evaluate import evaluation
from .goodput import Precision
from .phases import Phases
from .proposals import Proposals
from .result import Candidate, Evaluation, Fate
from .setting import Setting

Progress = Callable[[str, float], None]
"""Told what is being done and which share of the whole is done, 0 to 1; from the process that searches."""
Answer = TypeVar("Answer")

PRECISION = Precision(width=1.15, nearness=0.1, noise=0.02, most=6, step=1.12)
"""Width: where a straight line between two rates says as much as a third run. Nearness: from as far an estimate's shape
leads to goodput within 3 to 5 % (root mean square), as from half as far: a run is no surer, and seeds differ by 10 %.
Noise: a little more than a standard deviation of the attainment of 500 requests at 90 %."""
TRUSTED = 1.15
"""An estimate that was wrong by less under one seed is taken as it is under another."""


class Evidence:
    """Of one search."""

    def __init__(self, setting: Setting, crew: Crew, progress: Progress) -> None:
        self.setting = setting
        self._crew = crew
        self._progress = progress
        self._share = 0.0
        self.outlook = crew.outlook
        self.phases = Phases(self.outlook)
        self.proposals = Proposals(setting, self.outlook, self.phases, self.do)
        self.explored = self.proposals.explored
        self.founds: dict[Candidate, list[Found]] = {}
        """Simulated, by seed."""
        self.requests = 0
        """That were simulated."""
        self.complete = True
        """False: for something there was no time."""

    # --- more of it -------------------------------------------------------------------------------------------------

    def do(self, tasks: Sequence[Task[Answer]], what: str, begin: float, end: float) -> list[Answer | None]:
        """All tasks, in their order; None where time ran out. Progress goes from `begin` to `end`."""
        done = 0

        def tell(share: float) -> None:
            self._share = max(self._share, share)
            self._progress(what, self._share)

        def on_answer(place: int, answer: Answer) -> None:
            nonlocal done
            done += 1
            tell(begin + (end - begin) * done / len(tasks))

        if tasks:
            tell(begin)
        answers = self._crew.do(tasks, on_answer)
        self.complete &= None not in answers
        return answers

    def simulate(self, searches: Sequence[Search], what: str, begin: float, end: float) -> list[Found]:
        """What was found of them, in their order; fewer where time ran out."""
        founds = [found for found in self.do(searches, what, begin, end) if found is not None]
        for found in founds:
            self.complete &= found.complete
            self.requests += found.requests
        return [found for found in founds if found.trials]

    def search(self, candidate: Candidate, seed: int, start: float = 0.0) -> Search:
        """Of a candidate that was looked at: begins at `start`, else at the estimate under that seed, as far as it is
        trusted.
        """
        seen = self.explored[candidate]
        estimate = self.proposals.estimates.get((candidate, seed))
        return Search(
            what=candidate,
            seed=seed,
            near=seen.estimate,
            shape=estimate.shape if estimate is not None else None,
            start=start,
            scale=scale_of(seen),
            precision=PRECISION,
        )

    def screen(self, candidates: Sequence[Candidate], begin: float, end: float) -> None:
        """Simulates them under the first seed."""
        first = self.setting.seeds[0]
        searches = [self.search(one, first) for one in candidates if one not in self.founds]
        for found in self.simulate(searches, "placements", begin, end):
            self.take(found.search.what, [found])

    def take(self, candidate: Candidate, founds: list[Found]) -> None:
        """Keeps what was found of it, of each seed one."""
        self.founds[candidate] = founds
        self.explored[candidate] = evaluation(
            candidate,
            founds,
            bound=self.outlook.bound(candidate),
            estimate=self.proposals.estimate(candidate),
            target=self.setting.target,
            target_rate=self.setting.target_rate,
            seeds=len(self.setting.seeds),
        )

    # --- what it says -----------------------------------------------------------------------------------------------

    def worth_of(self, one: Evaluation) -> tuple[float, ...]:
        """Of its goodput; more is better."""
        return self.proposals.worth(one.candidate, one.goodput.mean)

    def best(self, disaggregated: bool, most: int) -> Evaluation | None:
        """Of those that were simulated, on at most so many devices."""
        able = [
            one
            for one in self.explored.values()
            if one.candidate.disaggregated is disaggregated and one.goodput.mean > 0.0 and one.candidate.gpus <= most
        ]
        return max(able, key=self.worth_of, default=None)

    def screened(self, best: Evaluation) -> list[Evaluation]:
        """Those simulated under the first seed alone, on the side of `best`; colocated ones within its GPUs."""
        return [
            one
            for one in self.explored.values()
            if one.candidate.disaggregated is best.candidate.disaggregated
            and one.fate is Fate.SCREENED
            and one.seeds
            and (one.candidate.disaggregated or one.candidate.gpus <= best.candidate.gpus)
        ]


def scale_of(seen: Evaluation) -> float:
    """What an estimate is to be taken times under another seed than the first, under which `seen` was simulated."""
    scale = seen.seeds[0] / seen.estimate if seen.seeds and seen.estimate and seen.seeds[0] else 1.0
    return scale if not 1.0 / TRUSTED < scale < TRUSTED else 1.0
