"""The planner's search: which placement serves most requests a second for each GPU within their promises.

1. Every split of both phases is refused, bounded and estimated (`phases`).
2. Algorithms 1 and 2 propose placements (`algorithms`), which are estimated; from the best on, counts, batch limits and
   chunks are changed as long as that helps (`neighbors`). Mixed workers with chunked prefill on as many GPUs, or
   on as few as keep the rate that is wanted, go the same way: the colocated baseline.
3. The most promising of both sides are simulated whole, under one seed; of the others those that may yet be better.
4. The best of both are simulated under all seeds, with the same requests, and then with one worker more, and for what
   clients would see.

An estimate (`outlook`) says what to simulate and where to begin; everything that is reported was simulated. What is
done depends on the problem alone, never on how fast a process was, unless the time limit or a signal ends the search.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ..types import Role
from .crew import Crew
from .evaluate import difference
from .evidence import PRECISION, Evidence, Progress
from .finals import Finals, Side
from .outcome import decided, in_order, notes, why_infeasible
from .problem import Problem
from .proposals import splits_of, unlike
from .result import Candidate, Evaluation, Fate, Marginal, PlanResult
from .setting import Setting, setting_of
from .stop import Stop

SCREEN_ROUNDS, SCREENED = 5, 2
"""How often candidates are simulated under one seed as long as others may be better, and how many of a side at once."""
OPTIMISM = 1.04
"""How much better than its estimate a candidate may turn out."""
BEYOND_BOUND = 1.05
"""How far above its capacity bound a short run may still look good."""


def plan(problem: Problem, progress: Progress | None = None) -> PlanResult:
    """The best placement for the problem, the best colocated one, and everything that was looked at.

    ValueError where the problem names what cannot be read or does not fit together. Where nothing can keep the
    promises, the result says so (`PlanResult.infeasible`). The time limit, Ctrl-C and SIGTERM end it with what it has.
    """
    begun_s = time.monotonic()
    setting = setting_of(problem)
    deadline_s = begun_s + problem.search.time_limit_s
    with Stop() as stop, Crew(setting, problem.search.chosen_processes, deadline_s, stop.asked) as crew:
        return _Run(setting, crew, stop, begun_s, progress or (lambda what, share: None)).result()


class _Run:
    """One search."""

    def __init__(self, setting: Setting, crew: Crew, stop: Stop, begun_s: float, progress: Progress) -> None:
        self._setting = setting
        self._crew = crew
        self._stop = stop
        self._begun_s = begun_s
        self._cpu_s = time.process_time()
        self._progress = progress
        self._evidence = Evidence(setting, crew, progress)
        self._explored = self._evidence.explored
        self._phases, self._proposals = self._evidence.phases, self._evidence.proposals
        self._estimate, self._worth = self._proposals.estimate, self._proposals.worth
        self._in_time = True

    def result(self) -> PlanResult:
        """Searches."""
        self._progress("splits of each phase", 0.0)
        asks = self._phases.look()
        self._phases.take(asks, self._evidence.do(asks, "splits of each phase", 0.0, 0.1))
        splits = self._proposals.split()
        gpus = splits[0].gpus if splits else self._setting.gpus
        split, mixed = self._screen_both(splits, self._proposals.mixed(gpus))
        finals = Finals(self._evidence)
        split = finals.finalist(split)
        if split is not None and split.candidate.gpus < gpus and mixed is not None:
            again = self._proposals.mixed(split.candidate.gpus)
            mixed = self._screen_both([], again, most=split.candidate.gpus)[1]
        split, mixed = finals.under_all_seeds(split, finals.finalist(mixed))
        self._in_time = self._evidence.complete
        split, mixed, more = finals.beside(split, mixed)
        self._progress("done", 1.0)
        return self._answer(split, mixed, more)

    def _screen_both(
        self, splits: list[Candidate], mixed: list[Candidate], most: int | None = None
    ) -> tuple[Side, Side]:
        """Branch and bound over both sides, the most promising first: a few are simulated, then those of the others
        that may yet be better.
        """
        sides = [splits, mixed]
        limits = [self._setting.gpus, self._setting.gpus if most is None else most]
        for place in range(SCREEN_ROUNDS):
            chosen = [one for waiting in sides for one in self._promising(waiting)]
            if not chosen:
                break
            ends = [0.3 + 0.3 * (place + after) / SCREEN_ROUNDS for after in (0, 1)]
            self._evidence.screen(chosen, *ends)
            for number, waiting in enumerate(sides):
                best = self._evidence.best(number == 0, limits[number])
                left = [one for one in waiting if one not in chosen]
                sides[number] = left if best is None else [one for one in left if self._may_beat(one, best)]
        return self._evidence.best(True, limits[0]), self._evidence.best(False, limits[1])

    def _promising(self, waiting: Sequence[Candidate]) -> list[Candidate]:
        """The first and those of other splits that are about as good."""
        if not waiting:
            return []
        first = self._worth(waiting[0], self._estimate(waiting[0]))
        close = [one for one in waiting if self._worth(one, self._estimate(one) * OPTIMISM) >= first]
        return unlike(close)[:SCREENED]

    def _may_beat(self, candidate: Candidate, best: Evaluation) -> bool:
        """Whether it is worth simulating beside the best so far; else the map says why not."""
        seen = self._explored[candidate]
        found = self._worth(best.candidate, best.goodput.mean)
        if self._worth(candidate, seen.bound * BEYOND_BOUND) < found:
            why = f"computes at most {seen.bound:.3g} requests/s with {candidate.gpus} GPUs, where another plan keeps "
            why += f"{best.goodput.mean:.3g} with {best.candidate.gpus}"
            self._explored[candidate] = replace(seen, fate=Fate.BOUNDED, why=why)
            return False
        return self._worth(candidate, seen.estimate * self._trust(candidate)) > found

    def _trust(self, candidate: Candidate) -> float:
        """What to take an estimate times: what simulations of the same splits came to, held against theirs, and at most
        1; and it may turn out better.
        """
        alike = [
            one for one in self._explored.values() if one.seeds and splits_of(one.candidate) == splits_of(candidate)
        ]
        return OPTIMISM * min([1.0, *(one.goodput.mean / one.estimate for one in alike if one.estimate)])

    def _unseen(self, *sides: Side) -> float:
        rates = [one.goodput.mean / one.candidate.cells for one in sides if one is not None]
        return max([self._setting.unseen(rate) for rate in rates if rate > 0.0], default=0.0)

    def _answer(self, split: Side, mixed: Side, more: tuple[Marginal, ...]) -> PlanResult:
        seen, sample, gpus = self._explored.values(), self._evidence.outlook.sample, self._setting.gpus
        sides = [
            decided(seen, disaggregated=number == 0, best=best, in_time=self._in_time, gpus=gpus)
            for number, best in enumerate((split, mixed))
        ]
        found = split is not None or mixed is not None
        return PlanResult(
            disaggregated=split,
            colocated=mixed,
            difference=difference(split, mixed) if split is not None and mixed is not None else None,
            explored=in_order(seen),
            phases=(*self._phases.of(Role.PREFILL), *self._phases.of(Role.DECODE)),
            marginal=more,
            infeasible="" if found or not all(sides) else why_infeasible(seen, self._phases),
            input_tokens=sample.mean_input,
            output_tokens=sample.mean_output,
            target_rate=self._setting.target_rate,
            seeds=self._setting.seeds,
            resolution=PRECISION.nearness,
            simulated_requests=self._evidence.requests,
            wall_s=time.monotonic() - self._begun_s,
            cpu_s=time.process_time() - self._cpu_s + self._crew.cpu_s,
            complete=self._evidence.complete,
            interrupted=self._stop.asked(),
            disaggregated_decided=sides[0],
            colocated_decided=sides[1],
            notes=notes(seen, gpus, self._unseen(split, mixed)),
        )
