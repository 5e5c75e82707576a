"""The end of a search: the best of both sides under all seeds, one worker more, and what clients would see.

Under two seeds, those that are expected to be most like the mean, a finalist is first run at the rate that is expected
to be its goodput: those runs say what clients would see there, and need not be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from ..types import Role
from .crew import Found, Search
from .evaluate import marginal
from .evidence import PRECISION, Evidence, scale_of
from .neighbors import one_more
from .place import why_not
from .predict import SEEDS, Watch, prediction_of, rate_of, settled
from .proposals import Challenge
from .result import Candidate, Evaluation, Fate, Marginal
from .trial import Saw

TIE = 1.05
"""Who was better under the first seed by less than this is no better."""
CLOSE = 0.9
"""Of the best under the first seed: between these the estimates under all seeds choose."""
CHALLENGES = 3
"""Rounds in which the best under all seeds may be replaced."""
AT_GOODPUT = 0.04
"""How far from goodput the rate may lie at which clients' view of a plan is told, as a share of it."""

Side = Evaluation | None


@dataclass(frozen=True, slots=True)
class Usual:
    """What is expected of a finalist under all seeds."""

    rate: float
    """Mean goodput, requests a second."""
    seeds: tuple[int, ...]
    """Whose own goodput is expected nearest to it."""


class Finals:
    """Of one search; `finalist` for each side, `under_all_seeds`, then `beside`."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._setting = evidence.setting
        self._explored = evidence.explored
        self._worth, self._worth_of = evidence.proposals.worth, evidence.worth_of
        self._usual: dict[Candidate, Usual] = {}
        self._grown: dict[Candidate, Found] = {}
        """One worker more, by the candidate that has it."""

    def finalist(self, best: Side) -> Side:
        """Of those that come near the best under the first seed, the one whose estimates under all are worth most."""
        if best is None:
            return None
        close = [one for one in self._evidence.screened(best) if one.goodput_per_gpu >= CLOSE * best.goodput_per_gpu]
        close = close or [best]
        asks = [Challenge(one.candidate, seed, near=one.estimate) for one in close for seed in self._setting.seeds[1:]]
        self._evidence.proposals.ask(asks, "all seeds", 0.6, 0.62)

        def mean(one: Evaluation) -> tuple[float, ...]:
            stages = sum(pool.pipeline_stages for pool in one.candidate.pools)
            return (*self._worth(one.candidate, sum(self._expected(one).values()) / len(self._setting.seeds)), -stages)

        return max(close, key=mean)

    def _expected(self, one: Evaluation) -> dict[int, float]:
        """Goodput by seed: found under the first, estimated under the others, as far as there was time."""
        expected = {self._setting.seeds[0]: one.goodput.mean}
        for seed in self._setting.seeds[1:]:
            estimate = self._evidence.proposals.estimates.get((one.candidate, seed))
            if estimate is not None:
                expected[seed] = estimate.goodput
        return expected

    # --- all seeds --------------------------------------------------------------------------------------------------

    def under_all_seeds(self, split: Side, mixed: Side) -> tuple[Side, Side]:
        """The best of each side after all seeds: the finalists, or who was clearly better under the first one."""
        best = {one.candidate.disaggregated: one for one in (split, mixed) if one is not None}
        for one in best.values():
            self._usual[one.candidate] = self._usual_of(one)
        likely = max(
            best.values(), key=lambda one: self._worth(one.candidate, self._usual[one.candidate].rate), default=None
        )
        grown = self._grow(likely) if likely is not None else []
        self._under_all([one.candidate for one in best.values()], 0.6, 0.8, grown)
        best = {side: self._explored[one.candidate] for side, one in best.items()}
        for place in range(CHALLENGES):
            challengers = [better for one in best.values() if (better := self._challenger(one)) is not None]
            begin = 0.8 + 0.1 * place / CHALLENGES
            self._under_all(challengers, begin, begin + 0.1 / CHALLENGES)
            for candidate in challengers:
                seen, side = self._explored[candidate], candidate.disaggregated
                if seen.fate is Fate.SIMULATED and self._worth_of(seen) > self._worth_of(best[side]):
                    best[side] = seen
        return best.get(True), best.get(False)

    def _usual_of(self, one: Evaluation) -> Usual:
        scale, (first, *others) = scale_of(one), self._setting.seeds
        expected = {seed: goodput * (1.0 if seed == first else scale) for seed, goodput in self._expected(one).items()}
        rate = min(one.bound, sum(expected.values()) / len(expected))
        alike = sorted((seed for seed in others if seed in expected), key=lambda seed: abs(expected[seed] - rate))
        return Usual(rate, tuple(alike[:SEEDS]))

    def _under_all(
        self, candidates: Sequence[Candidate], begin: float, end: float, grown: Sequence[Search] = ()
    ) -> None:
        """Simulates them under the seeds that are left; beside them, before the last seed, so that none of these long
        ones is left over at the end, `grown`.
        """
        first, *seeds, last = self._setting.seeds
        searches = [self._under(one, first) for one in candidates if self._flattered(one)]
        searches += [self._under(one, seed) for seed in seeds for one in candidates]
        searches += [*grown, *(self._under(one, last) for one in candidates)]
        founds = self._evidence.simulate(searches, "all seeds", begin, end)
        self._grown |= {found.search.what: found for found in founds if found.search in grown}
        for one in candidates:
            own = {
                found.search.seed: found
                for found in [*self._evidence.founds.get(one, ()), *founds]
                if found.search.what == one and not found.search.spare_nodes
            }
            seen = takewhile(own.__contains__, self._setting.seeds)  # so that pairs have the same seed
            self._evidence.take(one, [own[seed] for seed in seen])

    def _under(self, candidate: Candidate, seed: int) -> Search:
        usual = self._usual.get(candidate) if self._setting.target_rate is None else None
        start = usual.rate if usual is not None and seed in usual.seeds else 0.0
        return replace(self._evidence.search(candidate, seed, start), lasts=True)

    def _flattered(self, candidate: Candidate) -> bool:
        """Whether the runs under the first seed were too short to be reported, or there are none."""
        if candidate not in self._evidence.founds:
            return True
        rate = self._explored[candidate].goodput.mean / candidate.cells
        return self._setting.lasting_requests(rate) > self._setting.run_requests(rate)

    def _challenger(self, best: Evaluation) -> Candidate | None:
        """The best of those on that side that were clearly better under the first seed, and there than the best under
        all: the estimates that chose may have been wrong. Where a rate is wanted that the best keeps under the first
        seed alone: of those with more devices than all that were tried, what is expected to keep it.
        """
        if best.keeps_target_rate is False and best.fate is Fate.SIMULATED:
            return self._larger(best)
        able = [
            one
            for one in self._evidence.screened(best)
            if self._worth(one.candidate, one.seeds[0] / TIE) > self._worth(best.candidate, best.seeds[0])
            and self._worth(one.candidate, one.seeds[0] / TIE) > self._worth_of(best)
        ]
        return max(able, key=self._worth_of).candidate if able else None

    def _larger(self, best: Evaluation) -> Candidate | None:
        """See `_challenger`."""
        side = [one for one in self._explored.values() if one.candidate.disaggregated is best.candidate.disaggregated]
        tried = max(one.candidate.gpus for one in side if one.fate is Fate.SIMULATED)
        scale = min(1.0, best.goodput.mean / best.estimate) if best.estimate else 1.0
        able = [
            (self._worth(one.candidate, one.estimate * scale), one.candidate)
            for one in side
            if one.fate in (Fate.ESTIMATED, Fate.BOUNDED, Fate.SCREENED)
            and one.candidate.gpus > tried
            and one.estimate * scale >= (self._setting.target_rate or 0.0)
        ]
        return max(able, key=lambda found: found[0])[1] if able else None

    # --- beside -----------------------------------------------------------------------------------------------------

    def _grow(self, best: Evaluation) -> list[Search]:
        """One worker more of each role of the best plan, under the seed that is expected to be most like the mean."""
        usual = self._usual.get(best.candidate)
        seed = usual.seeds[0] if usual is not None and usual.seeds else self._setting.seeds[0]
        grown = [one for role in Role if (one := one_more(best.candidate, role)) is not None]
        return [
            Search(
                what=one,
                seed=seed,
                near=best.estimate,
                scale=scale_of(best),
                precision=PRECISION,
                spare_nodes=1,
                lasts=True,
            )
            for one in grown
            if one not in self._grown and not why_not(self._setting, one, spare_nodes=1)
        ]

    def beside(self, split: Side, mixed: Side) -> tuple[Side, Side, tuple[Marginal, ...]]:
        """What one worker more of each role of the best plan brings, and what clients would see of both plans."""
        able = [one for one in (split, mixed) if one is not None and one.goodput.mean > 0.0]
        if not able:
            return split, mixed, ()
        best = max(able, key=self._worth_of)
        saws = {watch: saw for one in able for watch, saw in self._watched(one).items()}
        for found in self._evidence.simulate(self._grow(best), "one worker more", 0.9, 0.95):
            self._grown[found.search.what] = found
        missing = [watch for watch, saw in saws.items() if not saw]
        for watch, saw in zip(missing, self._evidence.do(missing, "latencies", 0.95, 1.0), strict=True):
            saws[watch] = tuple(saw or ())
            self._evidence.requests += len(saws[watch])
        more = [self._grown.get(grown) for role in Role if (grown := one_more(best.candidate, role)) is not None]
        usual = self._usual.get(best.candidate)
        without = best.goodput.mean if usual is not None and usual.seeds else best.seeds[0]
        told = tuple(
            marginal(found.search.what, found, best, without) for found in more if found is not None and found.complete
        )
        for one in able:
            self._predict(one, saws)
        return self._now(split), self._now(mixed), told

    def _now(self, one: Side) -> Side:
        return None if one is None else self._explored[one.candidate]

    def _watched(self, one: Evaluation) -> dict[Watch, tuple[Saw, ...]]:
        """The runs that say what clients see of it, with what they saw where they were made already."""
        rate, usual = rate_of(one, self._setting.target_rate), self._usual.get(one.candidate)
        founds = self._evidence.founds[one.candidate]
        saws = {found.search.seed: found.saw for found in founds if found.search.start and found.saw}
        if usual is not None and len(saws) == SEEDS and abs(usual.rate / rate - 1.0) <= AT_GOODPUT:
            return {Watch(one.candidate, usual.rate, seed): saw for seed, saw in saws.items()}
        return {Watch(one.candidate, rate, seed): () for seed in self._setting.seeds[:SEEDS]}

    def _predict(self, one: Evaluation, saws: dict[Watch, tuple[Saw, ...]]) -> None:
        """Nothing where there was no time."""
        runs = {watch: saw for watch, saw in saws.items() if watch.candidate == one.candidate}
        if all(runs.values()):
            saw = [request for run in runs.values() for request in settled(run)]
            prediction = prediction_of(self._setting, saw, next(iter(runs)).rate)
            self._explored[one.candidate] = replace(one, prediction=prediction)
