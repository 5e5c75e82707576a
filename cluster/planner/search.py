"""The planner's search: which placement serves most requests a second for each GPU within their promises.

1. Every split of both phases is refused, bounded and estimated (`phases`).
2. Algorithms 1 and 2 propose placements (`algorithms`), which are estimated; from the best on, counts, batch limits and
   chunks are changed as long as that helps (`neighbors`). Mixed workers with chunked prefill on as many GPUs go the
   same way: the colocated baseline.
3. The most promising of both sides are simulated whole, under one seed; of the others those that may yet be better.
4. The best of both are simulated under all seeds, with the same requests, and then with one worker more, and for what
   clients would see.

An estimate (`outlook`) says what to simulate and where to begin; everything that is reported was simulated. What is
done depends on the problem alone, never on how fast a process was, unless the time limit or a signal ends the search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TypeVar

from ..types import Role
from .crew import Crew, Found, Search, Task
from .evaluate import difference, evaluation, marginal
from .goodput import Precision
from .neighbors import one_more
from .outcome import decided, in_order, notes, why_infeasible
from .outlook import Outlook
from .phases import Phases
from .place import why_not
from .predict import Saw, Watch, prediction_of, rate_of, watches
from .problem import Problem
from .proposals import Challenge, Proposals, splits_of, unlike
from .result import Candidate, Evaluation, Fate, Marginal, PlanResult
from .setting import Setting, setting_of
from .stop import Stop

Progress = Callable[[str, float], None]
"""Told what is being done and which share of the whole is done, 0 to 1; from the process that searches."""
Answer = TypeVar("Answer")

SCREEN_ROUNDS, SCREENED = 5, 2
"""How often candidates are simulated under one seed as long as others may be better, and how many of a side at once."""
OPTIMISM = 1.04
"""How much better than its estimate a candidate may turn out."""
BEYOND_BOUND = 1.05
"""How far above its capacity bound a short run may still look good."""
PRECISION = Precision(width=1.1, nearness=0.07, noise=0.02, most=6, step=1.12)
"""Noise: a little more than a standard deviation of the attainment of 500 requests at 90 %."""
TRUSTED = 1.15
"""An estimate that was wrong by less under one seed is taken as it is under another."""
TIE = 1.05
"""Who was better under the first seed by less than this is no better."""
CLOSE = 0.9
"""Of the best under the first seed: between these the estimates under all seeds choose."""


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
        self._outlook = Outlook(setting)
        self._phases = Phases(self._outlook)
        self._proposals = Proposals(setting, self._outlook, self._phases, self._do)
        self._explored = self._proposals.explored
        self._estimate, self._worth = self._proposals.estimate, self._proposals.worth
        self._founds: dict[Candidate, list[Found]] = {}
        self._requests = 0
        self._complete = self._in_time = True
        self._share = 0.0

    def result(self) -> PlanResult:
        """Searches."""
        self._progress("splits of each phase", 0.0)
        asks = self._phases.look()
        self._phases.take(asks, self._do(asks, "splits of each phase", 0.0, 0.1))
        splits = self._proposals.split()
        gpus = splits[0].gpus if splits else self._setting.gpus
        split, mixed = self._screen_both(splits, self._proposals.mixed(gpus))
        split = self._finalist(split)
        if split is not None and split.candidate.gpus < gpus and mixed is not None:
            again = self._proposals.mixed(split.candidate.gpus)
            mixed = self._screen_both([], again, most=split.candidate.gpus)[1]
        mixed = self._finalist(mixed)
        split, mixed = self._all_seeds(split, mixed)
        self._in_time = self._complete
        split, mixed, more = self._beside(split, mixed)
        self._progress("done", 1.0)
        return self._answer(split, mixed, more)

    # --- simulating and estimating ----------------------------------------------------------------------------------

    def _do(self, tasks: Sequence[Task[Answer]], what: str, begin: float, end: float) -> list[Answer | None]:
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
        self._complete &= None not in answers
        return answers

    def _simulate(self, searches: Sequence[Search], what: str, begin: float, end: float) -> list[Found]:
        """What was found of them, in their order; fewer where time ran out."""
        founds = [found for found in self._do(searches, what, begin, end) if found is not None]
        for found in founds:
            self._complete &= found.complete
            self._requests += found.requests
        return [found for found in founds if found.trials]

    def _screen(self, candidates: Sequence[Candidate], begin: float, end: float) -> None:
        """Under the first seed."""
        wanted = [one for one in candidates if one not in self._founds]
        searches = [
            Search(what=one, seed=self._setting.seeds[0], near=self._estimate(one), precision=PRECISION)
            for one in wanted
        ]
        for found in self._simulate(searches, "placements", begin, end):
            self._take(found.search.what, [found])

    def _take(self, candidate: Candidate, founds: list[Found]) -> None:
        self._founds[candidate] = founds
        self._explored[candidate] = evaluation(
            candidate,
            founds,
            bound=self._outlook.bound(candidate),
            estimate=self._estimate(candidate),
            target=self._setting.target,
            target_rate=self._setting.target_rate,
            seeds=len(self._setting.seeds),
        )

    # --- choosing by simulations ------------------------------------------------------------------------------------

    def _best(self, disaggregated: bool, most: int) -> Evaluation | None:
        able = [
            one
            for one in self._explored.values()
            if one.candidate.disaggregated is disaggregated and one.goodput.mean > 0.0 and one.candidate.gpus <= most
        ]
        return max(able, key=self._worth_of, default=None)

    def _screen_both(
        self, splits: list[Candidate], mixed: list[Candidate], most: int | None = None
    ) -> tuple[Evaluation | None, Evaluation | None]:
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
            self._screen(chosen, *ends)
            for number, waiting in enumerate(sides):
                best = self._best(number == 0, limits[number])
                left = [one for one in waiting if one not in chosen]
                sides[number] = left if best is None else [one for one in left if self._may_beat(one, best)]
        return self._best(True, limits[0]), self._best(False, limits[1])

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

    # --- the end ----------------------------------------------------------------------------------------------------

    def _all_seeds(
        self, split: Evaluation | None, mixed: Evaluation | None
    ) -> tuple[Evaluation | None, Evaluation | None]:
        best = {one.candidate.disaggregated: one for one in (split, mixed) if one is not None}
        self._under_all([one.candidate for one in best.values()], 0.6, 0.8)
        best = {side: self._explored[one.candidate] for side, one in best.items()}
        challengers = [better for one in best.values() if (better := self._challenger(one)) is not None]
        self._under_all(challengers, 0.8, 0.9)
        for candidate in challengers:
            seen, side = self._explored[candidate], candidate.disaggregated
            if seen.fate is Fate.SIMULATED and self._worth_of(seen) > self._worth_of(best[side]):
                best[side] = seen
        return best.get(True), best.get(False)

    def _under_all(self, candidates: Sequence[Candidate], begin: float, end: float) -> None:
        """Simulates them under the seeds that are left."""
        searches = [self._under(one, seed) for seed in self._setting.seeds[1:] for one in candidates]
        founds = self._simulate(searches, "all seeds", begin, end)
        for one in candidates:
            own = {found.search.seed: found for found in [*self._founds[one], *founds] if found.search.what == one}
            seen = takewhile(own.__contains__, self._setting.seeds)  # so that pairs have the same seed
            self._take(one, [own[seed] for seed in seen])

    def _challenger(self, best: Evaluation) -> Candidate | None:
        """The best of those on that side that were clearly better under the first seed, and there than the best under
        all: the estimates that chose may have been wrong.
        """
        able = [
            one
            for one in self._screened(best)
            if self._worth(one.candidate, one.seeds[0] / TIE) > self._worth(best.candidate, best.seeds[0])
            and self._worth(one.candidate, one.seeds[0] / TIE) > self._worth_of(best)
        ]
        return max(able, key=self._worth_of).candidate if able else None

    def _screened(self, best: Evaluation) -> list[Evaluation]:
        """Those simulated under the first seed alone, on the side of `best`; colocated ones within its GPUs."""
        return [
            one
            for one in self._explored.values()
            if one.candidate.disaggregated is best.candidate.disaggregated
            and one.fate is Fate.SCREENED
            and one.seeds
            and (one.candidate.disaggregated or one.candidate.gpus <= best.candidate.gpus)
        ]

    def _worth_of(self, one: Evaluation) -> tuple[float, ...]:
        return self._worth(one.candidate, one.goodput.mean)

    def _finalist(self, best: Evaluation | None) -> Evaluation | None:
        """Of those that come near the best under the first seed, the one whose estimates under all are worth most."""
        if best is None:
            return None
        close = [one for one in self._screened(best) if one.goodput_per_gpu >= CLOSE * best.goodput_per_gpu]
        if len(close) < 2:
            return best
        seeds = self._setting.seeds[1:]
        asks = [Challenge(one.candidate, seed, near=one.estimate) for one in close for seed in seeds]
        founds = [found or 0.0 for found in self._do(asks, "all seeds", 0.6, 0.62)]

        def mean(place: int) -> tuple[float, ...]:
            one, others = close[place], founds[place * len(seeds) : (place + 1) * len(seeds)]
            goodput = (one.goodput.mean + sum(others)) / (1 + len(seeds))
            return (*self._worth(one.candidate, goodput), -sum(pool.pipeline_stages for pool in one.candidate.pools))

        return close[max(range(len(close)), key=mean)]

    def _under(self, candidate: Candidate, seed: int) -> Search:
        """Begins at the estimate under that seed."""
        seen = self._explored[candidate]
        return Search(what=candidate, seed=seed, near=seen.estimate, scale=_scale(seen), precision=PRECISION)

    def _beside(
        self, split: Evaluation | None, mixed: Evaluation | None
    ) -> tuple[Evaluation | None, Evaluation | None, tuple[Marginal, ...]]:
        """One worker more of each role of the best plan, under the first seed, and what clients would see of both."""
        able = [one for one in (split, mixed) if one is not None and one.goodput.mean > 0.0]
        if not able:
            return split, mixed, ()
        best = max(able, key=self._worth_of)
        grown = [one for role in Role if (one := one_more(best.candidate, role)) is not None]
        grown = [one for one in grown if not why_not(self._setting, one, spare_nodes=1)]
        searches = [
            Search(
                what=one,
                seed=self._setting.seeds[0],
                near=best.estimate,
                scale=_scale(best),
                precision=PRECISION,
                spare_nodes=1,
            )
            for one in grown
        ]
        rates = [watch for one in able for watch in watches(self._setting, one, self._setting.target_rate)]
        tasks: list[Task[Found | list[Saw] | None]] = [*searches, *rates]
        answers = self._do(tasks, "one worker more, latencies", 0.9, 1.0)
        founds = [one for one in answers if isinstance(one, Found)]
        self._requests += sum(found.requests for found in founds)
        more = tuple(marginal(one.search.what, one, best, best.seeds[0]) for one in founds if one.complete)
        self._complete &= len(more) == len(searches)
        saws = dict(zip(rates, answers[len(searches) :], strict=True))
        return self._with_prediction(split, saws), self._with_prediction(mixed, saws), more

    def _with_prediction(
        self, one: Evaluation | None, saws: Mapping[Watch, Found | list[Saw] | None]
    ) -> Evaluation | None:
        """The same where there was no time."""
        if one is None or one.goodput.mean == 0.0:
            return one
        runs = [saws[watch] for watch in watches(self._setting, one, self._setting.target_rate)]
        saw = [request for run in runs if isinstance(run, list) for request in run]
        self._requests += len(saw)
        if None in runs:
            return one
        prediction = prediction_of(self._setting, saw, rate_of(one, self._setting.target_rate))
        self._explored[one.candidate] = replace(one, prediction=prediction)
        return self._explored[one.candidate]

    def _answer(self, split: Evaluation | None, mixed: Evaluation | None, more: tuple[Marginal, ...]) -> PlanResult:
        seen, sample, gpus = self._explored.values(), self._outlook.sample, self._setting.gpus
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
            simulated_requests=self._requests,
            wall_s=time.monotonic() - self._begun_s,
            cpu_s=time.process_time() - self._cpu_s + self._crew.cpu_s,
            complete=self._complete,
            interrupted=self._stop.asked(),
            disaggregated_decided=sides[0],
            colocated_decided=sides[1],
            notes=notes(seen, gpus),
        )


def _scale(seen: Evaluation) -> float:
    """What an estimate is to be taken times under another seed."""
    scale = seen.seeds[0] / seen.estimate if seen.estimate and seen.seeds[0] else 1.0
    return scale if not 1.0 / TRUSTED < scale < TRUSTED else 1.0
