"""What the simulator predicts of a cluster, beside what real processes on this machine then do: router, workers,
sockets and clock are real; the device is paced, so that everything but the device is checked, or computes.

Every cluster climbs a staircase of rates (`claims_load`) under the router's own refusals, one seed after the other, the
clusters in turn; a stair on which the machine limited what was measured is void (`claims_disaggregation`), and so is
one on which the processes themselves loaded the machine by more than half (MAX_OWN_SHARE): waiting for processors is
not modelled. Void stairs are shown and not judged. Runs are kept and resumed. A stair is below saturation where the
simulator lets SATURATED of its requests keep their promises.

Where engines compute, the machine's own pace is looked at before and after each run (`validate_pace`), and the run is
predicted at it; a run in which it changed by more than MAX_CHANGE is void.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from ..workload.sweep import RateSearch, SweepPoint
from .claims_cluster import RunningSystem, System
from .claims_disaggregation import ATTEMPTS, WARMUPS, Kept, StairResult, climb, compare, options_for, run_key
from .claims_load import Staircase
from .claims_machine import strain, take_sample
from .options import BenchOptions
from .run import Served, connect, warm_up
from .server import ServerUnusable
from .validate_calibrate import BESIDE_TOKENS, calibrate, share_beside
from .validate_pace import MAX_CHANGE, Pace
from .validate_predict import Overheads, PredictedStair, Subject, predict, router_for

SATURATED = 0.9
MAX_POINTS = 3.0
"""Of attainment, that prediction and measurement may differ by below saturation."""
MAX_ERROR = 0.1
"""Of TTFT and TPOT, p50 and p90."""
MAX_OWN_SHARE = 0.5
"""Of the machine's processors, that router, workers and client may use together where the device is paced."""
MAX_OTHERS_SHARE = 0.25
"""Of them, that others may use meanwhile."""
T = TypeVar("T")
QUANTILES = ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")
VARIANT = "validate"
_SEARCH_POINTS, _SEARCH_S = 14, 120.0
_Z = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was predicted, or measured, of one rate."""

    requests: int
    attained: int
    quantiles_ms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """See `claims_load.quantiles_ms`; of several seeds: the mean of each number."""

    @property
    def attainment(self) -> float:
        """Share of the requests; NaN where there were none."""
        return self.attained / self.requests if self.requests else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of it (Wilson's)."""
        if not self.requests:
            return 0.0, 1.0
        share, count = self.attainment, self.requests
        half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
        middle, scale = share + _Z**2 / (2 * count), 1 + _Z**2 / count
        return (middle - half) / scale, (middle + half) / scale

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"attainment": self.attainment if self.requests else None, "interval": self.interval}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cluster at one rate."""

    label: str
    rate: float
    predicted: Figures
    measured: Figures | None
    """Of the stairs that count; of the void ones where none does; None: nothing was run."""
    counts: bool = True
    """Whether it is judged; False: what was measured is void, or nothing was."""
    void: tuple[str, ...] = ()
    """Why stairs do not count."""
    busy: float = math.nan
    """Of the machine's processors, in use at most, by whatever."""
    own_cpu: float = math.nan
    """Of them, in use at most by router, workers and client."""
    pace: Pace | None = None
    """The machine's around the runs that are shown; None: nobody looked."""

    @property
    def below_saturation(self) -> bool:
        """Whether the prediction is to hold."""
        return self.predicted.attainment >= SATURATED

    @property
    def points(self) -> float:
        """Attainment measured, less that predicted, in points."""
        return math.nan if self.measured is None else 100 * (self.measured.attainment - self.predicted.attainment)

    def error(self, name: str) -> float:
        """A quantile measured, over that predicted, less 1; NaN where one is missing."""
        if self.measured is None or name not in self.measured.quantiles_ms or name not in self.predicted.quantiles_ms:
            return math.nan
        return self.measured.quantiles_ms[name][0] / self.predicted.quantiles_ms[name][0] - 1.0

    @property
    def misses(self) -> tuple[str, ...]:
        """What differs by more than it may; empty where nothing does, nothing counts, or it is saturated."""
        if not self.counts or self.measured is None or not self.below_saturation:
            return ()
        found = ["attainment"] if abs(self.points) > MAX_POINTS else []
        return (*found, *(name for name in QUANTILES if abs(self.error(name)) > MAX_ERROR))

    def as_json(self) -> dict[str, Any]:
        """Plain values; nothing is NaN."""
        errors = {name: self.error(name) for name in QUANTILES}
        return {
            "label": self.label,
            "rate": self.rate,
            "below_saturation": self.below_saturation,
            "predicted": self.predicted.as_json(),
            "measured": None if self.measured is None else self.measured.as_json(),
            "attainment_points": None if math.isnan(self.points) else self.points,
            "errors": {name: None if math.isnan(error) else error for name, error in errors.items()},
            "counts": self.counts,
            "misses": list(self.misses),
            "void": list(self.void),
            "busy": None if math.isnan(self.busy) else self.busy,
            "own_cpu": None if math.isnan(self.own_cpu) else self.own_cpu,
            "pace": None if self.pace is None else self.pace.as_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A cluster and the staircase that it climbs."""

    subject: Subject
    load: Staircase


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """All of them."""

    overheads: Overheads
    rows: tuple[Row, ...]

    @property
    def judged(self) -> tuple[Row, ...]:
        """Rows below saturation that count."""
        return tuple(row for row in self.rows if row.below_saturation and row.counts and row.measured is not None)

    def as_json(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Everything, in plain values."""
        return {**facts, "overheads": asdict(self.overheads), "rows": [row.as_json() for row in self.rows]}


Look = Callable[[], Awaitable[Pace]]
"""See `validate_pace.IdleEngine.look`."""


async def measure_overheads(quick: Subject, computes: Subject | None = None) -> Overheads:
    """Looks at answers that nothing disturbs: of `quick`, whose workers are paced; and of a prefill and a decode worker
    of the cluster that `computes`, if one does: what two engines take of each other; its profile says what KV takes on
    its way. RuntimeError, ServerUnusable, ValueError.
    """
    system = quick.system
    prefill, decode = quick.profile_of(system.prefill_engine or system.engine), quick.profile_of(system.engine)
    found, others = await _asked(system, lambda served: calibrate(served, prefill, decode))
    found = replace(found, others_busy=others)
    if computes is None:
        return found
    if (link := computes.link()) is not None:
        found = replace(found, handoff_s=link.latency_s, handoff_byte_s=1.0 / link.bytes_per_s)
    engine = computes.system.engine
    tokens = min(BESIDE_TOKENS, (engine.max_model_len or BESIDE_TOKENS + 1) - 1)
    both = System(label="1 prefill + 1 decode", engine=engine, prefill=1, decode=1)
    share, others = await _asked(both, lambda served: share_beside(served, tokens))
    return replace(found, beside_share=share, others_busy=max(found.others_busy, others))


async def _asked(system: System, ask: Callable[[Served], Awaitable[T]]) -> tuple[T, float]:
    """What `ask` learns of the system, which is started for it; and the share of the machine that others used."""
    with RunningSystem(system) as running:
        options = BenchOptions(base_url=running.url, dataset_name="random", temperature=0.0, timeout_s=3600)
        processes = running.processes | {"the client": os.getpid()}
        before = take_sample(processes)
        async with connect(options) as served:
            found = await ask(served)
        return found, strain(before, take_sample(processes)).others


async def validate(
    trials: Sequence[Trial],
    overheads: Overheads,
    *,
    seeds: int,
    kept: Kept,
    end_s: float,
    say: Callable[[str], None],
    on_rows: Callable[[int, Sequence[Row]], None] = lambda number, rows: None,
    look: Look | None = None,
) -> Validation:
    """Predicts and measures every trial at every rate, until `end_s` of the monotonic clock; what is void is tried
    again when all have been measured, and one that fails leaves the others alone. `on_rows`: told of those of a trial,
    by its number, as soon as they are there; `look`: of engines that compute. ValueError.
    """
    rows: dict[int, Sequence[Row]] = {}
    predictions = [_Predictions(trial, overheads) for trial in trials]
    for tries in range(1, ATTEMPTS + 1):
        tell = say if tries == 1 else lambda text: None
        for seed in range(seeds):
            for number, trial in enumerate(trials):
                system, load = trial.subject.system, trial.load
                measure = partial(compare, [system], replace(load, seed=load.seed + seed), seeds=1, attempts=tries)
                run = partial(run_behind_promises, trial.subject, look)
                try:
                    await measure(kept=kept, end_s=end_s, say=tell, run=run, variant=VARIANT)
                except (RuntimeError, ServerUnusable) as error:
                    say(f"{system.label}: {error}")
                own = predictions[number].rows(_kept_of(trial, kept, seeds), seeds)
                if own != rows.get(number):
                    rows[number] = own
                    on_rows(number, own)
    return Validation(overheads=overheads, rows=tuple(row for own in rows.values() for row in own))


def _kept_of(trial: Trial, kept: Kept, seeds: int) -> list[list[StairResult]]:
    """All runs of a trial, each with its stairs, seed by seed."""
    key, first = run_key(trial.subject.system, trial.load, VARIANT), trial.load.seed
    return [stairs for seed in range(first, first + seeds) for stairs in kept.runs.get((key, seed), [])]


class _Predictions:
    """Of one trial, by seed and pace: each is made once."""

    def __init__(self, trial: Trial, overheads: Overheads) -> None:
        self._trial = trial
        self._overheads = overheads
        self._known: dict[tuple[int, Pace | None], list[PredictedStair]] = {}

    def rows(self, attempts: Sequence[Sequence[StairResult]], seeds: int) -> list[Row]:
        """Of every rate; `attempts` by run, then rate. ValueError."""
        label, load = self._trial.subject.label, self._trial.load
        bare = [self._of(load.seed + seed, None) for seed in range(seeds)] if not attempts else []
        told = [self._of(attempt[0].runs[0].seed, pace_around(attempt[0])) for attempt in attempts]
        return [row_of(label, load, place, bare or told, attempts) for place in range(len(load.rates))]

    def _of(self, seed: int, pace: Pace | None) -> list[PredictedStair]:
        if (seed, pace) not in self._known:
            subject = self._trial.subject if pace is None else replace(self._trial.subject, pace=pace)
            load = replace(self._trial.load, seed=seed)
            self._known[seed, pace] = predict(subject, load, self._overheads, _warmups(subject.system))
        return self._known[seed, pace]


def saturation(subject: Subject, load: Staircase, overheads: Overheads, start: float) -> float:
    """The rate at which attainment falls below SATURATED in virtual time, requests/s, to a tenth. `load`: whose
    lengths, promise and stair count; its rates do not. `start`: where to look first. ValueError.
    """
    search = RateSearch(start=start, resolution=0.1, max_points=_SEARCH_POINTS)
    kept = 0.0
    while (rate := search.next_rate()) is not None:
        run = predict(subject, replace(load, rates=(rate,), stair_s=_SEARCH_S), overheads, 0)[0].run
        holds = SweepPoint(rate=rate, runs=(run,)).keeps(SATURATED)
        kept = max(kept, rate) if holds else kept
        search.add(rate, holds)
    return kept


async def run_behind_promises(
    subject: Subject, look: Look | None, system: System, load: Staircase, say: Callable[[str], None]
) -> list[StairResult]:
    """As `run_system`, behind a router that refuses what it cannot serve in time, between two looks at the machine."""
    looks = [] if look is None else [await look()]
    with RunningSystem(system, router_for(subject, load)) as running:
        options = options_for(running, load)
        async with connect(options) as served:
            warmups, _ = load.requests(served.vocabulary, warmups=_warmups(system))
            await warm_up(warmups, served, options)
            say(f"{system.label}, seed {load.seed}: {sum(load.counts)} requests in {load.edges_s[-1]:.0f} s")
            stairs = await climb(system, running, served, load)
    if look is not None:
        looks.append(await look())
    return [replace(stair, paces=tuple(one.as_json() for one in looks)) for stair in stairs]


def pace_around(stair: StairResult) -> Pace | None:
    """The machine's while it was climbed; None: nobody looked."""
    return Pace.between(*(Pace(**look) for look in stair.paces)) if stair.paces else None


def row_of(
    label: str,
    load: Staircase,
    place: int,
    predicted: Sequence[Sequence[PredictedStair]],
    attempts: Sequence[Sequence[StairResult]],
) -> Row:
    """One rate: the seeds whose stair counts, and the predictions of the same runs; of the void ones, where none
    counts. `attempts`: by run, then rate; `predicted`: of each of them, or where there are none, of every seed. Pure.
    """
    stairs = [attempt[place] for attempt in attempts]
    why = [_why_void(stair, load) for stair in stairs]
    counting = {stair.runs[0].seed: number for number, stair in enumerate(stairs) if not why[number]}
    shown = counting or {stair.runs[0].seed: number for number, stair in enumerate(stairs)}
    told = [predicted[number][place] for number in (shown.values() if attempts else range(len(predicted)))]
    measured = [stairs[number] for number in shown.values()]
    paces = [pace for stair in measured if (pace := pace_around(stair)) is not None]
    return Row(
        label=label,
        rate=load.rates[place],
        predicted=_figures([(one.run.requests, one.run.attained, one.quantiles_ms) for one in told]),
        measured=_figures([(one.runs[0].requests, one.runs[0].attained, one.quantiles_ms) for one in measured])
        if measured
        else None,
        counts=bool(counting),
        void=tuple(f"seed {stair.runs[0].seed}: {reason}" for stair, reason in zip(stairs, why, strict=True) if reason),
        busy=max((stair.strain.busy for stair in measured), default=math.nan),
        own_cpu=max((_own_share(stair) for stair in measured), default=math.nan),
        pace=Pace.between(*paces) if paces else None,
    )


def _own_share(stair: StairResult) -> float:
    return max(0.0, stair.strain.busy - stair.strain.others)


def _why_void(stair: StairResult, load: Staircase) -> str:
    """Empty: it counts."""
    reasons = [stair.void] if stair.void else []
    share, others = _own_share(stair), stair.strain.others
    for earlier, later in itertools.pairwise(Pace(**look) for look in stair.paces):
        if earlier.change_to(later) > MAX_CHANGE:
            reasons.append(f"the machine's pace changed by {100 * earlier.change_to(later):.0f} % meanwhile")
    if others > MAX_OTHERS_SHARE:
        reasons.append(f"others used {100 * others:.0f} % of the machine")
    if stair.strain.cpu and share > MAX_OWN_SHARE:  # an engine that computes is meant to use it
        scale = math.ceil(load.time_scale * share / MAX_OWN_SHARE)
        reasons.append(f"router, workers and client used {100 * share:.0f} % of the machine: --time-scale {scale}")
    return "; ".join(reasons)


def _figures(runs: Sequence[tuple[int, int, Mapping[str, Sequence[float]]]]) -> Figures:
    quantiles = {}
    for name in QUANTILES:
        own = [run[2][name] for run in runs if name in run[2]]
        if own:
            quantiles[name] = tuple(sum(column) / len(own) for column in zip(*own, strict=True))
    requests, attained = sum(run[0] for run in runs), sum(run[1] for run in runs)
    return Figures(requests=requests, attained=attained, quantiles_ms=quantiles)


def _warmups(system: System) -> int:
    return WARMUPS * system.workers
