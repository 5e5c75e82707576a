"""One simulated run: a placement, a rate, a seed; what share of the requests kept its promises, and which it broke.

A run is ended early once the answer is certain: when more requests have broken a promise than the target forgives, and
some more, so that what is near the target is always simulated to its end. Promises are counted against what was asked
for (`Promise.slo`), never stretched.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ...router.slo_classes import Promise
from ..sim.cluster import ClusterSpec, SimCluster
from ..sim.deploy import worker_spec
from ..sim.prompts import asked
from ..sim.request import Asked, Outcome
from ..sim.router import RouterSpec
from .place import replicas_of
from .result import Candidate
from .setting import UNSEEN, Setting

FORGIVEN = 0.1
"""Of the requests: how far below the target a run must be for sure before it is ended."""
SIGMAS = 2.5
"""By how many standard deviations of two counts more must be under way at the end of a run than at its middle, so that
it is no chance."""
LOOKS = 32
"""How often a run is asked whether it is decided."""


class OutOfTime(Exception):
    """A run was given up: it says nothing."""


def never() -> bool:
    """There is time."""
    return False


@dataclass(frozen=True, slots=True)
class Saw:
    """What one request saw."""

    slo_class: str
    kept: bool
    """Its promises."""
    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one run said."""

    rate: float
    seed: int
    requests: int
    attainment: float
    """Of the class that attains least."""
    late_attainment: float
    """Of all requests of the second half."""
    misses: dict[tuple[str, str], int] = field(default_factory=dict)
    """Broken promises by (`ttft` or `tpot`, SLO class)."""
    decided_early: bool = False
    """Attainments are then of the requests that were decided."""
    piles_up: bool = False
    """More and more was under way to the end: no promise tells yet, but this rate does not last."""
    cpu_s: float = 0.0
    saw: tuple[Saw, ...] = ()
    """Of every request, where that was wanted and the run is not `one_sided`."""

    @property
    def score(self) -> float:
        """What is held against the target."""
        return 0.0 if self.piles_up else min(self.attainment, self.late_attainment)

    @property
    def one_sided(self) -> bool:
        """Whether the score says on which side of the target it is, not how far."""
        return self.decided_early or self.piles_up


def run_candidate(
    setting: Setting,
    candidate: Candidate,
    rate: float,
    seed: int,
    requests: int,
    late: Callable[[], bool] = never,
    *,
    telling: bool = False,
) -> Trial:
    """The whole candidate, links and router included. Of several cells one is simulated, with its share of the load:
    `requests` are its own. `telling`: what each request saw is told too, and the run is longer by those that have
    broken a promise and go on. ValueError where it cannot run (`place.why_not`); OutOfTime when it gets `late`.
    """
    begun_s = time.process_time()
    spec, workload = cluster_of(setting, candidate, rate, seed, requests)
    loose = setting.lasting_s > setting.run_s
    judge = Judge(workload, setting.promises, setting.target, late, to_the_end=telling, loose=loose)
    outcomes = judged(spec, workload, judge)
    trial = judge.verdict(rate, seed)
    saw = tuple(saw_of(setting, outcome) for outcome in outcomes) if telling and not trial.one_sided else ()
    return replace(trial, cpu_s=time.process_time() - begun_s, saw=saw)


def judged(spec: ClusterSpec, workload: Sequence[Asked], judge: Judge) -> Sequence[Outcome]:
    """The run that `judge` follows and may end."""
    period_s = max(workload[-1].arrival_s / LOOKS, 1e-3)
    return SimCluster(spec).run(workload, decided=judge.look, decided_period_s=period_s)


def saw_of(setting: Setting, outcome: Outcome) -> Saw:
    """Of a request that was answered."""
    name = outcome.asked.slo_class
    return Saw(name, outcome.attains(setting.promises[name].slo), outcome.ttft_s, outcome.tpot_s)


def cluster_of(
    setting: Setting, candidate: Candidate, rate: float, seed: int, requests: int
) -> tuple[ClusterSpec, list[Asked]]:
    """What is simulated of a candidate: one of its cells, and its share of the load, so many requests of it. ValueError
    as `run_candidate`.
    """
    workers = tuple(
        worker_spec(f"{replica.role.value}-{number}", replica, setting.device)
        for number, replica in enumerate(replicas_of(setting, candidate))
    )
    rows = setting.workload.draw(rate=rate / candidate.cells, seconds=None, num_requests=requests, seed=seed)
    router = RouterSpec(promises=setting.promises, refuses=False, own_s=setting.own_s, rpc_s=setting.rpc_s)
    spec = ClusterSpec(workers=workers, router=router, inside=setting.inside, between=setting.between)
    return spec, asked(rows, sharing=setting.device.prefix_cache)


class Judge:
    """Follows the outcomes of one run."""

    def __init__(
        self,
        workload: Sequence[Asked],
        promises: dict[str, Promise],
        target: float,
        late: Callable[[], bool] = never,
        *,
        to_the_end: bool = False,
        loose: bool = False,
    ) -> None:
        """`to_the_end`: not ended where nothing is open, only where nothing can save it. `loose`: a queue may grow for
        longer than the run without a promise broken.
        """
        self._loose = loose
        self._promises = promises
        self._late = late
        self._to_the_end = to_the_end
        self._total = Counter(one.slo_class for one in workload)
        self._half = len(workload) // 2
        self._late_total = len(workload) - self._half
        self._forgiven = 1.0 - target + FORGIVEN
        self._open: list[int] | None = None
        self._decided, self._missed = Counter[str](), Counter[str]()
        self._late_decided = self._late_missed = 0
        self._misses = Counter[tuple[str, str]]()
        self._lost = False
        self._outcomes: Sequence[Outcome] = ()

    def look(self, now_s: float, outcomes: Sequence[Outcome]) -> bool:
        """Whether nothing can save it any more, or nothing is open."""
        if self._late():
            raise OutOfTime
        self._outcomes = outcomes
        still: list[int] = []
        places = list(range(len(outcomes))) if self._open is None else self._open
        for index, place in enumerate(places):
            outcome = outcomes[place]
            if outcome.asked.arrival_s > now_s:  # and those behind it
                still += places[index:]
                break
            broken = self._broken(outcome, now_s)
            if broken is None:
                still.append(place)
            else:
                self._take(place, outcome.asked.slo_class, broken)
        self._open = still
        self._lost = self._late_missed > self._forgiven * self._late_total or any(
            missed > self._forgiven * self._total[name] for name, missed in self._missed.items()
        )
        return self._lost or not (still or self._to_the_end)

    def _broken(self, outcome: Outcome, now_s: float) -> tuple[str, ...] | None:
        """The promises that it has broken for sure; none: it has kept them; None: that is open."""
        promise, asked = self._promises[outcome.asked.slo_class], outcome.asked
        first_s, broken = outcome.first_token_s, []
        if promise.ttft_s is not None:
            end_s = now_s if first_s is None else first_s
            if end_s - asked.arrival_s > promise.ttft_s:
                broken.append("ttft")
        if promise.tpot_s is not None and first_s is not None and asked.output_tokens > 1:
            end_s = outcome.last_token_s if outcome.done and outcome.last_token_s is not None else now_s
            if end_s - first_s > promise.tpot_s * (asked.output_tokens - 1):
                broken.append("tpot")
        return tuple(broken) if broken or outcome.done else None

    def _take(self, place: int, name: str, broken: tuple[str, ...]) -> None:
        self._decided[name] += 1
        self._missed[name] += bool(broken)
        if place >= self._half:
            self._late_decided += 1
            self._late_missed += bool(broken)
        for promise in broken:
            self._misses[promise, name] += 1

    def verdict(self, rate: float, seed: int) -> Trial:
        """After the run."""
        if not self._lost:
            self.look(float("inf"), self._outcomes)
        return Trial(
            rate=rate,
            seed=seed,
            requests=sum(self._decided.values()),
            attainment=min(1.0 - self._missed[name] / count for name, count in self._decided.items() if count),
            late_attainment=1.0 - self._late_missed / self._late_decided if self._late_decided else 0.0,
            misses=dict(self._misses),
            decided_early=self._lost,
            piles_up=self._loose and not self._lost and piles_up(self._outcomes),
        )


def piles_up(outcomes: Sequence[Outcome]) -> bool:
    """Whether more was under way when the last request came than when the middle one did: by more than UNSEEN of what
    came between, and than chance (counts of a queue that is steady are about as far apart as Poisson's).
    """
    middle = len(outcomes) // 2
    before, after = (_under_way(outcomes, outcomes[place].asked.arrival_s) for place in (middle, -1))
    more = after - before
    return more > UNSEEN * (len(outcomes) - middle) and more > SIGMAS * math.sqrt(before + after)


def _under_way(outcomes: Sequence[Outcome], at_s: float) -> int:
    """Requests that had come and were not answered."""
    came = [one for one in outcomes if one.asked.arrival_s <= at_s]
    return sum(not one.done or one.last_token_s is None or one.last_token_s > at_s for one in came)
