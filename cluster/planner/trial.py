"""One simulated run: a placement, a rate, a seed; what share of the requests kept its promises, and which it broke.

A run is ended early once the answer is certain: when more requests have broken a promise than the target forgives, and
some more, so that what is near the target is always simulated to its end. Promises are counted against what was asked
for (`Promise.slo`), never stretched.
"""

from __future__ import annotations

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
from ..workload.spec import Row
from .place import replicas_of
from .result import Candidate
from .setting import Setting

FORGIVEN = 0.1
"""Of the requests: how far below the target a run must be for sure before it is ended."""
LOOKS = 32
"""How often a run is asked whether it is decided."""


class OutOfTime(Exception):
    """A run was given up: it says nothing."""


def never() -> bool:
    """There is time."""
    return False


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
    cpu_s: float = 0.0

    @property
    def score(self) -> float:
        """What is held against the target."""
        return min(self.attainment, self.late_attainment)


def run_candidate(
    setting: Setting,
    candidate: Candidate,
    rate: float,
    seed: int,
    requests: int,
    late: Callable[[], bool] = never,
) -> Trial:
    """The whole candidate, links and router included. Of several cells one is simulated, with its share of the load:
    `requests` are its own. ValueError where it cannot run (`place.why_not`); OutOfTime when it gets `late`.
    """
    spec, workload = cluster_of(setting, candidate, rate, seed, requests)
    trial = _run(setting, spec, workload, setting.promises, rate / candidate.cells, seed, late)
    return replace(trial, rate=rate)


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
    rows = _rows(setting, rate / candidate.cells, seed, requests)
    router = RouterSpec(promises=setting.promises, refuses=False, own_s=setting.own_s, rpc_s=setting.rpc_s)
    spec = ClusterSpec(workers=workers, router=router, inside=setting.inside, between=setting.between)
    return spec, asked(rows, sharing=setting.device.prefix_cache)


def _rows(setting: Setting, rate: float, seed: int, requests: int) -> list[Row]:
    return setting.workload.draw(rate=rate, seconds=None, num_requests=requests, seed=seed)


def _run(
    setting: Setting,
    spec: ClusterSpec,
    workload: Sequence[Asked],
    promises: dict[str, Promise],
    rate: float,
    seed: int,
    late: Callable[[], bool] = never,
) -> Trial:
    begun_s = time.process_time()
    judge = _Judge(workload, promises, setting.target, late)
    period_s = max(workload[-1].arrival_s / LOOKS, 1e-3)
    SimCluster(spec).run(workload, decided=judge.look, decided_period_s=period_s)
    return judge.verdict(rate, seed, time.process_time() - begun_s)


class _Judge:
    """Follows the outcomes of one run."""

    def __init__(
        self, workload: Sequence[Asked], promises: dict[str, Promise], target: float, late: Callable[[], bool]
    ) -> None:
        self._promises = promises
        self._late = late
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
        still = []
        for place in range(len(outcomes)) if self._open is None else self._open:
            outcome = outcomes[place]
            if outcome.asked.arrival_s > now_s:
                still.append(place)
                continue
            broken = self._broken(outcome, now_s)
            if broken is None:
                still.append(place)
            else:
                self._take(place, outcome.asked.slo_class, broken)
        self._open = still
        self._lost = self._late_missed > self._forgiven * self._late_total or any(
            missed > self._forgiven * self._total[name] for name, missed in self._missed.items()
        )
        return self._lost or not still

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

    def verdict(self, rate: float, seed: int, cpu_s: float) -> Trial:
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
            cpu_s=cpu_s,
        )
