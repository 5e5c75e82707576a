"""The planner's search: which placement serves most requests a second for each GPU within their promises.

1. Every split of both phases is refused, bounded and estimated; the best of each are simulated alone (`phases`).
2. Algorithms 1 and 2 propose placements (`algorithms`); the most promising are simulated whole, under one seed.
3. From the best on, counts, batch limits and chunks are changed as long as that helps (`neighbors`).
4. Mixed workers with chunked prefill on as many GPUs go the same way: the colocated baseline.
5. The best of both are simulated under all seeds, with the same requests, and with one worker more.

An estimate (`outlook`) says what to simulate and where to begin; everything that is reported was simulated. What is
done depends on the problem alone, never on how fast a process was, unless the time limit ends the search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..types import Role
from .algorithms import algorithm_1, algorithm_2, colocated
from .crew import Crew, Found, Search
from .evaluate import difference, evaluation, marginal, worth
from .goodput import Precision
from .neighbors import neighbors, one_more
from .outlook import Outlook
from .phases import Phases
from .place import all_splits, why_not
from .problem import Problem
from .result import Affinity, Candidate, Evaluation, Fate, Marginal, PlanResult
from .setting import Setting, setting_of

Progress = Callable[[str, float], None]
"""Told what is being done and which share of the whole is done, 0 to 1; from the process that searches."""

PROPOSED, SCREEN_ROUNDS = 2, 3
"""Candidates of each side that are simulated under one seed, and how often others are, if they may be better."""
OPTIMISM = 1.1
"""How much better than its estimate, held against what the best came to, a candidate may turn out."""
BEYOND_BOUND = 1.05
"""How far above its capacity bound a short run may still look good."""
PRECISION = Precision(width=1.1, nearness=0.04, noise=0.015, most=6)
"""Noise: about a standard deviation of the attainment of 500 requests at 90 %."""
PHASE_PRECISION = Precision(width=1.2, nearness=0.05, noise=0.03, most=3)
LOCAL_ROUNDS, LOCAL_GAIN = 6, 1.01
FINALISTS = 2
CLOSE = 0.985
"""Of the best: who else is simulated under all seeds."""


def plan(problem: Problem, progress: Progress | None = None) -> PlanResult:
    """The best placement for the problem, the best colocated one, and everything that was looked at.

    ValueError where the problem names what cannot be read or does not fit together. Where nothing can keep the
    promises, the result says so (`PlanResult.infeasible`).
    """
    begun_s = time.monotonic()
    setting = setting_of(problem)
    deadline_s = begun_s + problem.search.time_limit_s
    with Crew(setting, problem.search.chosen_processes, deadline_s) as crew:
        return _Run(setting, crew, begun_s, progress or (lambda what, share: None)).result()


class _Run:
    """One search."""

    def __init__(self, setting: Setting, crew: Crew, begun_s: float, progress: Progress) -> None:
        self._setting = setting
        self._crew = crew
        self._begun_s = begun_s
        self._cpu_s = time.process_time()
        self._progress = progress
        self._outlook = Outlook(setting)
        self._phases = Phases(self._outlook)
        self._explored: dict[Candidate, Evaluation] = {}
        self._founds: dict[Candidate, list[Found]] = {}
        self._requests = 0
        self._simulated_s = 0.0
        self._complete = self._in_time = True

    def result(self) -> PlanResult:
        """Searches."""
        self._progress("splits of each phase", 0.0)
        self._phases.look()
        self._phases.take(self._simulate(self._phases.searches(PHASE_PRECISION), "phases alone", 0.05, 0.2))
        split = self._disaggregated()
        mixed = self._colocated(split.candidate.gpus if split is not None else self._setting.gpus)
        split, mixed = self._all_seeds(split, mixed)
        self._in_time = self._complete
        more = self._marginal(split, mixed)
        self._progress("done", 1.0)
        return self._answer(split, mixed, more)

    # --- simulating -------------------------------------------------------------------------------------------------

    def _simulate(self, searches: Sequence[Search], what: str, begin: float, end: float) -> list[Found]:
        done = 0

        def on_found(found: Found) -> None:
            nonlocal done
            done += 1
            self._complete &= found.complete
            self._requests += found.requests
            self._simulated_s += found.cpu_s
            self._progress(what, begin + (end - begin) * done / len(searches))

        self._progress(what, begin)
        if self._crew.late:
            self._complete = False
            return []
        return self._crew.run(searches, on_found)

    def _screen(self, candidates: Sequence[Candidate], what: str, begin: float, end: float) -> None:
        """Under the first seed."""
        seed = self._setting.seeds[0]
        wanted = [one for one in candidates if one not in self._founds]
        searches = [
            Search(
                what=one,
                seed=seed,
                start=self._estimate(one) or self._outlook.bound(one) / 2,
                slope=self._outlook.slope(one, seed),
                precision=PRECISION,
            )
            for one in wanted
        ]
        for one, found in zip(wanted, self._simulate(searches, what, begin, end), strict=False):
            self._take(one, [found])

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

    # --- choosing ---------------------------------------------------------------------------------------------------

    def _estimate(self, candidate: Candidate) -> float:
        return self._outlook.goodput(candidate, self._setting.seeds[0])

    def _worth(self, candidate: Candidate, goodput: float) -> tuple[float, ...]:
        return worth(candidate, goodput, self._setting.target_rate)

    def _best(self, disaggregated: bool) -> Evaluation | None:
        able = [
            one
            for one in self._explored.values()
            if one.candidate.disaggregated is disaggregated and one.goodput.mean > 0.0
        ]
        return max(able, key=lambda one: self._worth(one.candidate, one.goodput.mean), default=None)

    def _propose(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The most promising; the others go into the map with the reason why they were left."""
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
        for one in able:
            estimate = self._estimate(one)
            bound = self._outlook.bound(one)
            self._explored[one] = Evaluation(candidate=one, fate=Fate.ESTIMATED, bound=bound, estimate=estimate)
        able.sort(key=lambda one: self._worth(one, self._estimate(one)), reverse=True)
        return [one for one in able if self._estimate(one) > 0.0]

    def _screen_best(self, waiting: list[Candidate], what: str, begin: float, end: float) -> Evaluation | None:
        """Branch and bound over candidates of one side, the most promising first: a few are simulated, then those of
        the others that may yet be better.
        """
        if not waiting:
            return None
        side = waiting[0].disaggregated
        for place in range(SCREEN_ROUNDS):
            if not waiting:
                break
            ends = [begin + (end - begin) * (place + after) / SCREEN_ROUNDS for after in (0, 1)]
            chosen = _unlike(waiting)[:PROPOSED]
            self._screen(chosen, what, *ends)
            waiting = [one for one in waiting if one not in chosen]
            best = self._best(side)
            if best is not None:
                waiting = [one for one in waiting if self._may_beat(one, best)]
        return self._best(side)

    def _may_beat(self, candidate: Candidate, best: Evaluation) -> bool:
        """Whether it is worth simulating beside the best so far; else the map says why not."""
        seen = self._explored[candidate]
        found = self._worth(best.candidate, best.goodput.mean)
        if self._worth(candidate, seen.bound * BEYOND_BOUND) < found:
            why = f"computes at most {seen.bound:.3g} requests/s with {candidate.gpus} GPUs, where another plan keeps "
            why += f"{best.goodput.mean:.3g} with {best.candidate.gpus}"
            self._explored[candidate] = replace(seen, fate=Fate.BOUNDED, why=why)
            return False
        likely = seen.estimate * min(1.0, best.goodput.mean / best.estimate if best.estimate else 1.0)
        return self._worth(candidate, likely * OPTIMISM) > found

    def _disaggregated(self) -> Evaluation | None:
        prefill, decode = self._phases.of(Role.PREFILL), self._phases.of(Role.DECODE)
        proposals = [*algorithm_1(self._setting, prefill, decode), *algorithm_2(self._setting, prefill, decode)]
        best = self._screen_best(self._propose(proposals), "disaggregated placements", 0.2, 0.4)
        return None if best is None else self._climb(best, 0.4, 0.5)

    def _colocated(self, gpus: int) -> Evaluation | None:
        proposals = colocated(self._setting, all_splits(self._setting), gpus)
        best = self._screen_best(self._propose(proposals), "colocated placements", 0.5, 0.6)
        return None if best is None else self._climb(best, 0.6, 0.65)

    def _climb(self, best: Evaluation, begin: float, end: float) -> Evaluation:
        """Local search: from one candidate to the neighbor that is estimated best, while that is better; where the way
        ended is simulated.
        """
        here, estimate = best.candidate, best.estimate
        for _ in range(LOCAL_ROUNDS):
            around = [
                one
                for one in neighbors(self._setting, here)
                if one.disaggregated or one.gpus == here.gpus  # the baseline stays at its count
            ]
            step = max(around, key=lambda one: self._worth(one, self._estimate(one)), default=None)
            if step is None or self._worth(step, self._estimate(step) / LOCAL_GAIN) <= self._worth(here, estimate):
                break
            here, estimate = step, self._estimate(step)
        if here != best.candidate:
            self._screen([here], "local search", begin, end)
        return self._best(here.disaggregated) or best

    # --- the end ----------------------------------------------------------------------------------------------------

    def _all_seeds(
        self, split: Evaluation | None, mixed: Evaluation | None
    ) -> tuple[Evaluation | None, Evaluation | None]:
        finalists = []
        for best in (split, mixed):
            if best is None:
                continue
            close = [
                one
                for one in self._explored.values()
                if one.candidate.disaggregated is best.candidate.disaggregated
                and one.fate is Fate.SCREENED
                and one.goodput_per_gpu >= CLOSE * best.goodput_per_gpu
            ]
            close.sort(key=lambda one: self._worth(one.candidate, one.goodput.mean), reverse=True)
            finalists += [one.candidate for one in close[:FINALISTS]]
        searches = [self._under(one, seed) for one in finalists for seed in self._setting.seeds[1:]]
        founds = self._simulate(searches, "all seeds", 0.65, 0.9)
        for one in finalists:
            self._take(one, [*self._founds[one], *(found for found in founds if found.search.what == one)])
        return self._final(split, finalists), self._final(mixed, finalists)

    def _final(self, best: Evaluation | None, finalists: Sequence[Candidate]) -> Evaluation | None:
        """The finalist of that side that is worth most under all seeds."""
        if best is None:
            return None
        own = [self._explored[one] for one in finalists if one.disaggregated is best.candidate.disaggregated]
        return max(own, key=lambda one: self._worth(one.candidate, one.goodput.mean))

    def _under(self, candidate: Candidate, seed: int) -> Search:
        """Begins where the first seed ended, as much higher or lower as the estimate is."""
        first = self._setting.seeds[0]
        [found, *_] = self._founds[candidate]
        then = self._outlook.goodput(candidate, first)
        start = found.goodput * (self._outlook.goodput(candidate, seed) / then if then else 1.0)
        return Search(
            what=candidate,
            seed=seed,
            start=start or found.search.start,
            slope=self._outlook.slope(candidate, seed),
            precision=PRECISION,
        )

    def _marginal(self, split: Evaluation | None, mixed: Evaluation | None) -> tuple[Marginal, ...]:
        """One worker more of each role of the best plan, under the first seed."""
        able = [one for one in (split, mixed) if one is not None and one.goodput.mean > 0.0]
        if not able:
            return ()
        best = max(able, key=lambda one: self._worth(one.candidate, one.goodput.mean))
        grown = [one for role in Role if (one := one_more(best.candidate, role)) is not None]
        grown = [one for one in grown if not why_not(self._setting, one, spare_nodes=1)]
        scale = best.seeds[0] / best.estimate if best.estimate else 1.0
        searches = [
            Search(
                what=one,
                seed=self._setting.seeds[0],
                start=(self._estimate(one) * scale) or best.seeds[0],
                slope=self._outlook.slope(one, self._setting.seeds[0]),
                precision=PRECISION,
                spare_nodes=1,
            )
            for one in grown
        ]
        founds = self._simulate(searches, "one worker more", 0.9, 1.0)
        return tuple(marginal(one, found, best, best.seeds[0]) for one, found in zip(grown, founds, strict=False))

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
            cpu_s=time.process_time() - self._cpu_s + (self._simulated_s if self._crew.apart else 0.0),
            complete=self._complete,
            disaggregated_decided=decided[0],
            colocated_decided=decided[1],
            notes=self._notes(),
        )

    def _decided(self, disaggregated: bool, best: Evaluation | None) -> bool:
        """Whether more time would not have told more of that side."""
        if self._in_time or best is not None:
            return best is None or best.fate is Fate.SIMULATED
        own = [one for one in self._explored.values() if one.candidate.disaggregated is disaggregated]
        return all(one.fate in (Fate.REFUSED, Fate.HOPELESS) for one in own)

    def _infeasible(self) -> str:
        """Why nothing serves: the promise that is missed by least, or the memory that is missing."""
        if self._phases.hopeless:
            return min(self._phases.hopeless, key=lambda one: one.excess).text
        refused = [one.why for one in self._explored.values() if one.fate is Fate.REFUSED] or self._phases.refused
        if refused and all(one.fate is Fate.REFUSED for one in self._explored.values()):
            return f"no split fits: {refused[-1]}"
        return "no rate that was tried keeps the promises of enough requests with any placement"

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._setting.gpus == 1:
            notes.append("one GPU holds no two workers: only colocated is possible")
        if any(one.affinity is Affinity.LOW and one.cells > 1 for one in self._explored):
            notes.append(
                "cells hand off inside themselves only: each has its own router, and an even share of the load"
            )
        return tuple(notes)


def _unlike(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each kind of splits: limits of batches are what the local search is for."""
    found: dict[tuple[tuple[int, int], ...], Candidate] = {}
    for one in candidates:
        found.setdefault(tuple((pool.tensor_parallel, pool.pipeline_stages) for pool in one.pools), one)
    return list(found.values())
