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
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeVar

from ..types import Role
from .algorithms import algorithm_1, algorithm_2, colocated
from .crew import Crew, Found, Means, Search, Task
from .evaluate import difference, evaluation, marginal, worth
from .goodput import Precision
from .neighbors import neighbors, one_more
from .outlook import Hopeless, Outlook
from .phases import Phases
from .place import all_splits, why_not
from .predict import Saw, Watch, prediction_of, rate_of, watches
from .problem import Problem
from .result import Affinity, Candidate, Evaluation, Fate, Marginal, PlanResult
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
CLIMBS, LOCAL_ROUNDS, LOCAL_GAIN = 3, 6, 1.01
"""Local searches of a side, from its best proposals of unlike splits; their length; what a step must gain."""
WAVE = 4
"""Proposals that are estimated at once; the next are held against the best of them."""
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


@dataclass(frozen=True, slots=True)
class Challenge:
    """A `Task`: the estimate of a candidate; with a rate that others reach: in full only where it is kept."""

    candidate: Candidate
    seed: int
    rate: float = 0.0
    near: float = 0.0

    def do(self, means: Means) -> float:
        """Goodput, requests a second."""
        if self.rate:
            return means.outlook.challenge(self.candidate, self.seed, self.rate)
        return means.outlook.goodput(self.candidate, self.seed, self.near)


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
        self._explored: dict[Candidate, Evaluation] = {}
        self._founds: dict[Candidate, list[Found]] = {}
        self._requests = 0
        self._complete = self._in_time = True
        self._share = 0.0

    def result(self) -> PlanResult:
        """Searches."""
        self._progress("splits of each phase", 0.0)
        asks = self._phases.look()
        self._phases.take(asks, self._do(asks, "splits of each phase", 0.0, 0.1))
        splits = self._propose_split()
        gpus = splits[0].gpus if splits else self._setting.gpus
        split, mixed = self._screen_both(splits, self._propose_mixed(gpus))
        split = self._finalist(split)
        if split is not None and split.candidate.gpus < gpus and mixed is not None:
            again = self._propose_mixed(split.candidate.gpus)
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

    # --- choosing by estimates --------------------------------------------------------------------------------------

    def _estimate(self, candidate: Candidate) -> float:
        return self._explored[candidate].estimate if candidate in self._explored else 0.0

    def _worth(self, candidate: Candidate, goodput: float) -> tuple[float, ...]:
        return worth(candidate, goodput, self._setting.target_rate)

    def _able(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that can run and that one request alone does not rule out; the others go into the map with the reason
        why they were left.
        """
        able = []
        for one in candidates:
            why = why_not(self._setting, one)
            if why:
                self._explored[one] = Evaluation(candidate=one, fate=Fate.REFUSED, why=why)
                continue
            hopeless = next((found for pool in one.pools if (found := self._outlook.hopeless(pool))), None)
            if hopeless is not None:
                self._phases.hopeless.append(hopeless)
                self._explored[one] = Evaluation(candidate=one, fate=Fate.HOPELESS, why=hopeless.text)
            else:
                able.append(one)
        return able

    def _look_at(self, candidates: Sequence[Candidate], at_least: float, what: str, begin: float, end: float) -> None:
        """Estimates them; in full only those that reach `at_least` requests a second for each GPU."""
        new = [one for one in candidates if one not in self._explored]
        seed = self._setting.seeds[0]
        asks = [Challenge(one, seed, at_least * one.gpus) for one in new]
        for one, estimate in zip(new, self._do(asks, what, begin, end), strict=True):
            bound = self._outlook.bound(one)
            seen = Evaluation(candidate=one, fate=Fate.ESTIMATED, bound=bound, estimate=estimate or 0.0)
            self._explored[one] = replace(seen, decided=estimate is not None)

    def _ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        able = [one for one in candidates if self._estimate(one) > 0.0]
        return sorted(able, key=lambda one: self._worth(one, self._estimate(one)), reverse=True)

    def _propose(self, candidates: Sequence[Candidate], what: str, begin: float, end: float) -> list[Candidate]:
        """The most promising first, with where a local search leads from there."""
        able, middle = self._able(candidates), (begin + end) / 2
        if able and not able[0].disaggregated:  # those of the algorithms come best first
            able.sort(key=lambda one: self._worth(one, self._outlook.bound(one)), reverse=True)
        able = [*(first := _unlike(able)), *(one for one in able if one not in first)]
        best = 0.0
        for place in range(0, len(able), WAVE):
            wave = able[place : place + WAVE]
            share = [begin + (middle - begin) * (place + after) / len(able) for after in (0, len(wave))]
            self._look_at(wave, best, what, *share)
            if self._setting.target_rate is None:
                best = max(best, *(self._estimate(one) / one.gpus for one in wave))
        ranked = self._ranked(able)
        way = [one for start in _unlike(ranked)[:CLIMBS] for one in self._climb(start, middle, end)]
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
            estimate, full = self._estimate(here), self._setting.target_rate is not None
            at_least = 0.0 if full else LOCAL_GAIN * estimate / here.gpus
            share = [begin + (end - begin) * (place + after) / LOCAL_ROUNDS for after in (0, 1)]
            self._look_at(around, at_least, "local search", *share)
            step = max(around, key=lambda one: self._worth(one, self._estimate(one)), default=None)
            if step is None or self._worth(step, self._estimate(step) / LOCAL_GAIN) <= self._worth(here, estimate):
                break
            here = step
            way.append(here)
        return way

    def _propose_split(self) -> list[Candidate]:
        prefill, decode = self._phases.of(Role.PREFILL), self._phases.of(Role.DECODE)
        proposals = [*algorithm_1(self._setting, prefill, decode), *algorithm_2(self._setting, prefill, decode)]
        return self._propose(proposals, "disaggregated placements", 0.1, 0.2)

    def _propose_mixed(self, gpus: int) -> list[Candidate]:
        proposals = colocated(self._setting, all_splits(self._setting), gpus)
        return self._propose(proposals, "colocated placements", 0.2, 0.3)

    # --- choosing by simulations ------------------------------------------------------------------------------------

    def _best(self, disaggregated: bool, most: int) -> Evaluation | None:
        able = [
            one
            for one in self._explored.values()
            if one.candidate.disaggregated is disaggregated and one.goodput.mean > 0.0 and one.candidate.gpus <= most
        ]
        return max(able, key=lambda one: self._worth(one.candidate, one.goodput.mean), default=None)

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
        return _unlike(close)[:SCREENED]

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
        alike = [one for one in self._explored.values() if one.seeds and _splits(one.candidate) == _splits(candidate)]
        return OPTIMISM * min([1.0, *(one.goodput.mean / one.estimate for one in alike if one.estimate)])

    # --- the end ----------------------------------------------------------------------------------------------------

    def _all_seeds(
        self, split: Evaluation | None, mixed: Evaluation | None
    ) -> tuple[Evaluation | None, Evaluation | None]:
        finalists = [best.candidate for best in (split, mixed) if best is not None]
        searches = [self._under(one, seed) for seed in self._setting.seeds[1:] for one in finalists]
        founds = self._simulate(searches, "all seeds", 0.6, 0.9)
        for one in finalists:
            own = {found.search.seed: found for found in [*self._founds[one], *founds] if found.search.what == one}
            seen = takewhile(own.__contains__, self._setting.seeds)  # so that pairs have the same seed
            self._take(one, [own[seed] for seed in seen])
        found = {one.disaggregated: self._explored[one] for one in finalists}
        return found.get(True), found.get(False)

    def _finalist(self, best: Evaluation | None) -> Evaluation | None:
        """Of those that come near the best under the first seed, the one whose estimates under all are worth most."""
        if best is None:
            return None
        close = [
            one
            for one in self._explored.values()
            if one.candidate.disaggregated is best.candidate.disaggregated
            and one.fate is Fate.SCREENED
            and (one.candidate.disaggregated or one.candidate.gpus <= best.candidate.gpus)
            and one.goodput_per_gpu >= CLOSE * best.goodput_per_gpu
        ]
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
        best = max(able, key=lambda one: self._worth(one.candidate, one.goodput.mean))
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
        order = [Fate.SIMULATED, Fate.SCREENED, Fate.ESTIMATED, Fate.BOUNDED, Fate.HOPELESS, Fate.REFUSED]
        explored = sorted(
            self._explored.values(),
            key=lambda one: (order.index(one.fate), -one.goodput_per_gpu, -one.estimate / one.candidate.gpus),
        )
        sample = self._outlook.sample
        decided = self._decided(True, split), self._decided(False, mixed)
        return PlanResult(
            disaggregated=split,
            colocated=mixed,
            difference=difference(split, mixed) if split is not None and mixed is not None else None,
            explored=tuple(explored),
            phases=(*self._phases.of(Role.PREFILL), *self._phases.of(Role.DECODE)),
            marginal=more,
            infeasible="" if split is not None or mixed is not None or not all(decided) else self._infeasible(),
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
            disaggregated_decided=decided[0],
            colocated_decided=decided[1],
            notes=self._notes(),
        )

    def _decided(self, disaggregated: bool, best: Evaluation | None) -> bool:
        """Whether more time would not have told more of that side."""
        if self._in_time or best is not None:
            return best is None or best.fate is Fate.SIMULATED
        own = [one for one in self._explored.values() if one.candidate.disaggregated is disaggregated]
        ruled_out = all(one.fate in (Fate.REFUSED, Fate.HOPELESS) for one in own)
        return ruled_out and (bool(own) or self._setting.gpus == 1)

    def _infeasible(self) -> str:
        """Why nothing serves: the promise that stands in the way, or the memory that is missing."""
        if self._phases.hopeless:
            return self._nearest_miss().text
        refused = [one.why for one in self._explored.values() if one.fate is Fate.REFUSED] or self._phases.refused
        if refused and all(one.fate is Fate.REFUSED for one in self._explored.values()):
            return f"no split fits: {refused[-1]}"
        return "no rate that was tried keeps the promises of enough requests with any placement"

    def _nearest_miss(self) -> Hopeless:
        """What stands in the way of the kind of plan that comes nearest: of a phase, its best split; of both phases,
        the one that misses by more.
        """
        least: dict[Role, Hopeless] = {}
        for one in sorted(self._phases.hopeless, key=lambda one: one.excess):
            least.setdefault(one.role, one)
        able = {one.role for one in self._phases.results.values() if one.fate not in (Fate.REFUSED, Fate.HOPELESS)}
        phases = [one for role, one in least.items() if role not in (Role.MIXED, *able)]
        kinds = [max(phases, key=lambda one: one.excess)] if phases else []
        kinds += [least[Role.MIXED]] if Role.MIXED in least else []
        return min(kinds or self._phases.hopeless, key=lambda one: one.excess)

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._setting.gpus == 1:
            notes.append("one GPU holds no two workers: only colocated is possible")
        if any(one.affinity is Affinity.LOW and one.cells > 1 for one in self._explored):
            notes.append(
                "cells hand off inside themselves only: each has its own router, and an even share of the load"
            )
        return tuple(notes)


def _scale(seen: Evaluation) -> float:
    """What an estimate is to be taken times under another seed."""
    scale = seen.seeds[0] / seen.estimate if seen.estimate and seen.seeds[0] else 1.0
    return scale if not 1.0 / TRUSTED < scale < TRUSTED else 1.0


def _unlike(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each kind of splits: limits of batches are what the local search is for."""
    found: dict[tuple[tuple[int, int], ...], Candidate] = {}
    for one in candidates:
        found.setdefault(_splits(one), one)
    return list(found.values())


def _splits(candidate: Candidate) -> tuple[tuple[int, int], ...]:
    return tuple((pool.tensor_parallel, pool.pipeline_stages) for pool in candidate.pools)
