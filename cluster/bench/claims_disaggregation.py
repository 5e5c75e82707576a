"""What disaggregation buys: attainment against rate of pools of prefill and decode workers, and of the same number of
mixed ones, with real processes, a real router and real sockets (DistServe, OSDI '24, §6.2).

Every system climbs the same staircase (`claims_load`) under as many seeds as the time allows, one run is judged under
several promises, and the router refuses nobody. A stair on which the machine limited what was measured (late steps of
the paced device, a late client, processes that waited for a processor) is void: it is marked, counts nowhere, and its
run is made once more if there is time. Each run is kept on disk as it ends, so that an interrupted comparison goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..workload.datasets import BenchRequest
from ..workload.report import RequestRecord, distortion, summarize
from ..workload.sweep import SweepResult, SweepRun
from .claims_cluster import RunningSystem, StepCount, System
from .claims_load import TARGET, Promise, Staircase, crossing, judge, quantiles_ms, sweep_of
from .claims_machine import Sample, Strain, strain, take_sample
from .interrupt import Stop
from .load import Load, run_load
from .options import BenchOptions
from .run import Served, connect, warm_up

MAX_LATE_STEPS = 0.02
"""Share of late steps above which a stair is void."""
DRAIN_S = 60.0
"""After the last stair, for answers that still run; who has none by then keeps no promise."""
START_S = 20.0
"""What starting, warming up and ending a system takes at most, for reckoning whether there is time."""
WARMUPS = 4
ATTEMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StairResult:
    """One system at one rate with one seed."""

    rate: float
    runs: tuple[SweepRun, ...]
    """Under each promise, in the staircase's order."""
    steps: int
    late_steps: int
    strain: Strain
    client: str = ""
    """What the client itself distorted; empty: nothing."""
    quantiles_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """See `claims_load.quantiles_ms`; of runs that were saved without: empty."""
    paces: tuple[Mapping[str, float], ...] = ()
    """What the looks around its run said of the machine (`validate_pace.Pace`); empty: nobody looked."""

    @property
    def void(self) -> str:
        """Why the stair says nothing about the system; empty: it does."""
        reasons = [self.client] if self.client else []
        if self.steps and self.late_steps > MAX_LATE_STEPS * self.steps:
            reasons.append(f"{self.late_steps} of {self.steps} steps were late")
        return "; ".join([*reasons, *self.strain.reasons])

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"void": self.void}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> StairResult:
        """What `as_json` wrote. Raises KeyError, TypeError."""
        values = {name: saved[name] for name in ("rate", "steps", "late_steps", "client")}
        runs = tuple(SweepRun(**{**run}) for run in saved["runs"])
        return cls(
            **values,
            runs=runs,
            strain=Strain(**saved["strain"]),
            quantiles_ms=dict(saved.get("quantiles_ms", {})),
            paces=tuple(saved.get("paces", ())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """One system: what its runs gave, stair by stair, and what virtual time predicted."""

    system: System
    load: Staircase
    stairs: tuple[tuple[StairResult, ...], ...] = ()
    """By rate, one for each seed and attempt."""
    predicted: tuple[SweepResult, ...] = ()
    """Under each promise; empty: nothing was."""

    def sweep(self, promise: int) -> SweepResult:
        """The stairs that count, under one promise."""
        # Of a seed that was tried again, the last try that counts: the same requests count once.
        counting = [{one.runs[promise].seed: one for one in stair if not one.void} for stair in self.stairs]
        runs = [[one.runs[promise] for one in stair.values()] for stair in counting]
        return sweep_of(self.system.label, self.load, self.load.promises[promise], runs)

    def goodput(self, promise: int) -> Goodput:
        """At the target, per GPU."""
        return goodput_of(self.sweep(promise), self.system.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Requests/s per GPU at which attainment crosses the target; a bound where all rates lie on one side of it, NaN
    where there are none.
    """

    per_gpu: float
    bound: str = ""
    """`<` or `>=`; empty: it was crossed."""

    def __str__(self) -> str:
        return "-" if math.isnan(self.per_gpu) else f"{self.bound}{self.per_gpu:.2f}"


def goodput_of(sweep: SweepResult, gpus: int) -> Goodput:
    """Between two rates by interpolation."""
    points = [(point.rate, point.attainment) for point in sweep.points]
    if not points:
        return Goodput(per_gpu=math.nan)
    found = crossing(points, TARGET)
    if found == 0.0:
        return Goodput(per_gpu=points[0][0] / gpus, bound="<")
    never = all(attainment >= TARGET for _, attainment in points)
    return Goodput(per_gpu=found / gpus, bound=">=" if never else "")


@dataclass(slots=True, kw_only=True)
class Kept:
    """Runs kept in a file, a line each, so that none is made twice. ValueError where it holds something else."""

    path: Path | None
    runs: dict[tuple[str, int], list[list[StairResult]]] = field(default_factory=dict)
    """By (system and load, attempt's seed): the attempts, each with its stairs."""

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                saved = json.loads(line)
                stairs = [StairResult.from_json(stair) for stair in saved["stairs"]]
                self.runs.setdefault((saved["key"], saved["seed"]), []).append(stairs)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"results: {self.path}, line {number}: no saved run ({error!r})") from None

    def add(self, key: str, seed: int, label: str, stairs: list[StairResult]) -> None:
        """Remembers and writes one. Raises OSError."""
        self.runs.setdefault((key, seed), []).append(stairs)
        if self.path is not None:
            line = {"key": key, "seed": seed, "system": label, "stairs": [stair.as_json() for stair in stairs]}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


Runner = Callable[[System, Staircase, Callable[[str], None]], Awaitable[list["StairResult"]]]
"""Starts a system, sends the load, ends the system; see `run_system`."""


def run_key(system: System, load: Staircase, variant: str = "") -> str:
    """Names a system under a load, whatever the seed and wherever its profiles lie. `variant`: how else it is run."""
    values = asdict(system)
    for engine in (values["engine"], values["prefill_engine"]):
        if engine is not None and engine["paced_profile"] is not None:
            engine["paced_profile"] = Path(engine["paced_profile"]).read_text(encoding="utf-8")
    text = json.dumps(values, sort_keys=True, default=str) + replace(load, seed=0).key() + variant
    return hashlib.sha256(text.encode()).hexdigest()[:16]


async def compare(
    systems: Sequence[System],
    load: Staircase,
    *,
    seeds: int,
    kept: Kept,
    end_s: float,
    say: Callable[[str], None],
    run: Runner | None = None,
    variant: str = "",
    attempts: int = ATTEMPTS,
) -> list[list[list[StairResult]]]:
    """Runs every system under every seed, seed by seed, until `end_s` of the monotonic clock; then once more what has
    void stairs, up to so many `attempts`. Returns, by system, the attempts. `run`: None: `run_system`; another one has
    a `variant` of its own. RuntimeError, ServerUnusable, ValueError.
    """
    run = run or run_system
    keys = [run_key(system, load, variant) for system in systems]
    for attempt in range(1, attempts + 1):
        for seed in range(load.seed, load.seed + seeds):
            for system, key in zip(systems, keys, strict=True):
                done = kept.runs.get((key, seed), [])
                if len(done) >= attempt or any(not any(stair.void for stair in stairs) for stairs in done):
                    continue
                own = replace(load, seed=seed)
                if time.monotonic() + own.edges_s[-1] + START_S + DRAIN_S * load.time_scale / 2 > end_s:
                    say(f"{system.label}, seed {seed}: no time left")
                    continue
                kept.add(key, seed, system.label, await run(system, own, say))
    seeds_all = range(load.seed, load.seed + seeds)
    return [[stairs for seed in seeds_all for stairs in kept.runs.get((key, seed), [])] for key in keys]


async def run_system(system: System, load: Staircase, say: Callable[[str], None]) -> list[StairResult]:
    """Starts the system, sends the load, ends the system. RuntimeError, ServerUnusable, ValueError."""
    with RunningSystem(system) as running:
        options = options_for(running, load)
        async with connect(options) as served:
            warmups, _ = load.requests(served.vocabulary, warmups=WARMUPS * system.workers)
            await warm_up(warmups, served, options)
            say(f"{system.label}, seed {load.seed}: {sum(load.counts)} requests in {load.edges_s[-1]:.0f} s")
            return await climb(system, running, served, load)


def options_for(running: RunningSystem, load: Staircase) -> BenchOptions:
    """How a client calls it."""
    return BenchOptions(
        base_url=running.url, dataset_name="trace", dataset_path=load.dataset_path, temperature=0.0, timeout_s=3600
    )


async def climb(system: System, running: RunningSystem, served: Served, load: Staircase) -> list[StairResult]:
    """Sends the load to a system that runs and is warm. ServerUnusable, ValueError."""
    _, requests = load.requests(served.vocabulary, warmups=1)
    records: list[RequestRecord | None] = [None] * len(requests)
    waited_for = {place for place, stair in enumerate(load.judged()) if stair is not None}
    stop = Stop()

    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        record = await served.send(request, due_s, request_id)
        place = int(request_id.rpartition("-")[2])
        records[place] = record
        waited_for.discard(place)
        if not waited_for and watching.done():
            stop.set()
        return record

    watching = asyncio.ensure_future(_watch(running.processes | {"the client": os.getpid()}, running, load))
    timer = asyncio.get_running_loop().call_later(load.edges_s[-1] + DRAIN_S * load.time_scale, stop.set)
    try:
        done = await run_load(send, requests, load.arrivals_s(), name="claim", stop=stop)
        marks = await watching
    finally:
        timer.cancel()
        watching.cancel()
    paced = system.engine.device == "paced"
    return [_stair(load, place, records, done, marks, paced=paced) for place in range(len(load.rates))]


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where things stood at an edge of a stair."""

    steps: StepCount
    sample: Sample


async def _watch(processes: Mapping[str, int], running: RunningSystem, load: Staircase) -> list[_Mark]:
    """Looks at every edge. Raises ServerUnusable."""
    begin_s = time.monotonic()
    marks = []
    for edge_s in load.edges_s:
        await asyncio.sleep(max(0.0, begin_s + edge_s - time.monotonic()))
        marks.append(_Mark(await asyncio.to_thread(running.steps), take_sample(processes)))
    return marks


def _stair(
    load: Staircase,
    place: int,
    records: Sequence[RequestRecord | None],
    done: Load,
    marks: Sequence[_Mark],
    *,
    paced: bool,
) -> StairResult:
    own = [record for record, on in zip(records, load.judged(), strict=True) if on == place and record is not None]
    begin_s, end_s = (done.begin_s + edge_s for edge_s in load.edges_s[place : place + 2])
    stalls_s = [late_s for at_s, late_s in zip(done.looked_s, done.stalls_s, strict=True) if begin_s <= at_s < end_s]
    client = distortion(summarize(own, {}, (99.0,), stalls_s))
    runs = [judge(records, load, promise, place, client_late=bool(client)) for promise in load.promises]
    before, after = marks[place], marks[place + 1]
    steps, felt = after.steps.since(before.steps), strain(before.sample, after.sample)
    if not paced:  # processors are what is measured: nobody's waiting for one says that it was the machine
        felt = replace(felt, cpu={}, waited={})
    return StairResult(
        rate=load.rates[place],
        runs=tuple(runs),
        steps=steps.steps,
        late_steps=steps.late,
        strain=felt,
        client=client,
        quantiles_ms=quantiles_ms(own, load.time_scale),
    )


def result_of(
    system: System, load: Staircase, attempts: Sequence[Sequence[StairResult]], predicted: Sequence[SweepResult]
) -> SystemResult:
    """Attempts, each a run up the staircase, by rate."""
    stairs = tuple(tuple(attempt[place] for attempt in attempts) for place in range(len(load.rates)))
    return SystemResult(system=system, load=load, stairs=stairs, predicted=tuple(predicted))


def as_json(results: Sequence[SystemResult], load: Staircase, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, in plain values."""
    return {
        **facts,
        "load": asdict(load),
        "systems": [
            {
                "label": result.system.label,
                "workers": result.system.workers,
                "gpus": result.system.gpus,
                "goodput_per_gpu": [str(result.goodput(place)) for place in range(len(load.promises))],
                "predicted_per_gpu": [str(goodput_of(sweep, result.system.gpus)) for sweep in result.predicted],
                "sweeps": [result.sweep(place).as_json() for place in range(len(load.promises))],
                "predicted": [sweep.as_json() for sweep in result.predicted],
                "stairs": [[one.as_json() for one in stair] for stair in result.stairs],
            }
            for result in results
        ],
    }


__all__ = ["Promise", "Staircase", "SystemResult", "as_json", "compare", "goodput_of", "result_of", "run_system"]
