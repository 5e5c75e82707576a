"""Runs that others measured, replayed in virtual time request by request: the same arrivals and lengths, the system as
`cluster.sim.systems` has it, and what came of it beside what was measured.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from ..latency.hardware import load_hardware
from ..latency.links import INSTANT
from ..latency.model_facts import model_facts
from ..sim.cluster import ClusterSpec, SimCluster
from ..sim.deploy import DeviceModel, Replica
from ..sim.request import Asked
from ..sim.systems import SYSTEMS, Control, PublishedCosts, ServingSystem
from ..types import Role

MODEL, TTFT_S, TPOT_S = "opt-13b", 0.25, 0.1
"""Of the measured runs: DistServe's model and promises for ShareGPT (OSDI '24, table 1)."""
REPLAYS, JITTER_S = 4, 4e-3
"""A run is replayed so often, the first time as it came, then with every arrival up to so much later: no more than one
run of a server differs by from the next, and enough to move who stands a millisecond within its promise.
"""
MAX_POINTS = 5.0
"""A replay's attainment may be so far from what was measured, in percentage points."""
REQUESTS = "opt13b_sharegpt_a100_calibration_requests.csv.gz"
_SPLIT, _COLOCATED = re.compile(r"c(\d)(\d)d(\d)(\d)"), re.compile(r"tp(\d)(?:pp(\d))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One run, its requests in order of arrival."""

    name: str
    system: str
    """Of `SYSTEMS`."""
    config: str
    """`c21d11`: prefill TP 2 PP 1, decode TP 1 PP 1; `tp1`: colocated."""
    rate: float
    asked: tuple[Asked, ...]
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    """nan for an answer of one token."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What clients saw of a run: shares and seconds."""

    attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One run beside its replay."""

    run: MeasuredRun
    measured: Seen
    simulated: Seen
    """The mean of its replays."""
    took_s: float

    @property
    def points(self) -> float:
        """Percentage points of attainment that the replay is above what was measured."""
        return 100.0 * (self.simulated.attainment - self.measured.attainment)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the measured attainment lies with 95 % confidence, for so many requests (Wilson, 1927). Shares."""
        share, count, z = self.measured.attainment, len(self.run.asked), 1.96
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        return middle - half, middle + half

    def errors(self) -> dict[str, float]:
        """Relative errors of the latencies, by field of `Seen`."""
        names = ("ttft_p50_s", "ttft_p90_s", "tpot_p50_s", "tpot_p90_s")
        return {name: getattr(self.simulated, name) / getattr(self.measured, name) - 1.0 for name in names}


def read_runs(path: str | Path) -> list[MeasuredRun]:
    """Runs of a CSV like `opt13b_sharegpt_a100_calibration_requests.csv.gz`, in its order: any rate, any split that the
    data have memory and steps of, the systems of `SYSTEMS`. ValueError naming what is missing or wrong; OSError.
    """
    runs: dict[str, list[Mapping[str, str]]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path) as file:
            for row in csv.DictReader(file):
                runs.setdefault(row["run"], []).append(row)
        if not runs:
            raise ValueError(f"{path}: there is no run in it")
        return [_run(name, sorted(rows, key=lambda row: _number(row, "arrival_s"))) for name, rows in runs.items()]
    except KeyError as error:
        raise ValueError(f"{path}: there is no column {error}") from None


def _number(row: Mapping[str, str], column: str, least: float = 0.0) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"{row['run']}: {column}: {row[column]!r} is not allowed; allowed: a number from {least:g} on")
    return value


def _run(name: str, rows: Sequence[Mapping[str, str]]) -> MeasuredRun:
    asked = tuple(
        Asked(
            request_id=str(place),
            arrival_s=_number(row, "arrival_s"),
            prompt_token_ids=(0,) * int(_number(row, "input_tokens", 1.0)),
            output_tokens=int(_number(row, "output_tokens", 1.0)),
        )
        for place, row in enumerate(rows)
    )
    one_token = [request.output_tokens < 2 for request in asked]
    return MeasuredRun(
        name=name,
        system=rows[0]["backend"],
        config=rows[0]["config"],
        rate=_number(rows[0], "nominal_rate_rps"),
        asked=asked,
        ttft_s=tuple(_number(row, "ttft_ms") * 1e-3 for row in rows),
        tpot_s=tuple(
            math.nan if none else _number(row, "tpot_ms") * 1e-3 for row, none in zip(rows, one_token, strict=True)
        ),
    )


def replay(run: MeasuredRun, data: Path, system: ServingSystem | None = None, *, replays: int = REPLAYS) -> Replayed:
    """Simulates the run. `data`: the folder of DistServe's coefficients; `system`: instead of the one that the run
    names. ValueError for a system or a split that nothing is known of.
    """
    began_s = time.monotonic()
    spec = cluster_of(run, data, system)
    every = [astuple(_simulated(spec, jittered(run.asked, seed) if seed else run.asked)) for seed in range(replays)]
    simulated = Seen(*np.mean(every, axis=0).tolist())
    measured = _seen(run.ttft_s, run.tpot_s)
    return Replayed(run=run, measured=measured, simulated=simulated, took_s=time.monotonic() - began_s)


def jittered(asked: Sequence[Asked], seed: int) -> list[Asked]:
    """The same requests, each up to JITTER_S later, in order of arrival."""
    later_s = np.random.default_rng(seed).uniform(0.0, JITTER_S, len(asked)).tolist()
    moved = (replace(one, arrival_s=one.arrival_s + more) for one, more in zip(asked, later_s, strict=True))
    return sorted(moved, key=lambda one: one.arrival_s)


def _simulated(spec: ClusterSpec, asked: Sequence[Asked]) -> Seen:
    outcomes = SimCluster(spec).run(asked)
    return _seen(
        [np.nan if outcome.ttft_s is None else outcome.ttft_s for outcome in outcomes],
        [np.nan if outcome.tpot_s is None else outcome.tpot_s for outcome in outcomes],
    )


def ablations(system: ServingSystem) -> dict[str, ServingSystem]:
    """The system less one of its parts, by what is left out: which of them the measured runs need."""
    control = system.control
    found = {
        "as it is": system,
        "no cost of a drawn token": replace(system, control=replace(control, step_row_s=0.0)),
        "no control plane beside the 2 ms a step of the profile": replace(system, control=Control()),
    }
    if Role.DECODE in system.batching:
        decode = replace(system.batching[Role.DECODE], policy="iteration")
        ours = replace(system, batching={**system.batching, Role.DECODE: decode})
        found["KV moves in no time"] = replace(system, inside=INSTANT)
        found["decode as ours: pulls beside steps, recomputes"] = ours
    else:
        ragged = replace(system.batching[Role.MIXED], policy="prompts_alone")
        found["prompts of a step not padded"] = replace(system, batching={Role.MIXED: ragged})
        mixed = replace(system.batching[Role.MIXED], policy="iteration", max_batched_tokens=512)
        found["batching as ours: chunks of 512"] = replace(system, batching={Role.MIXED: mixed})
    return found


def cluster_of(run: MeasuredRun, data: Path, system: ServingSystem | None = None) -> ClusterSpec:
    """The run's system, or another one in its place, and its split on A100-80Gs."""
    system = system or SYSTEMS.get(run.system)
    if system is None:
        raise ValueError(f"{run.name}: backend: {run.system!r} is not known; known: {', '.join(SYSTEMS)}")
    held = _kv_tokens(data)

    def kv_tokens(replica: Replica) -> int:
        split = replica.tensor_parallel, replica.pipeline_stages
        if split not in held:
            known = ", ".join(f"TP {wide} PP {deep}" for wide, deep in held)
            raise ValueError(f"{run.name}: TP {split[0]} PP {split[1]}: nothing is known of its memory; known: {known}")
        return held[split]

    workers = [(replica, 1) for replica in _replicas(run, system)]
    return system.cluster(workers, device_of(system, data), kv_tokens=kv_tokens)


def device_of(system: ServingSystem, data: Path, model: str = MODEL) -> DeviceModel:
    """An A100-80G with what DistServe's authors measured of the system's engine."""
    kind = "vllm" if system.name == "vllm" else "distserve"
    path = str(data / f"profiler-a100-80g.{kind}.json")
    return DeviceModel(
        facts=model_facts(model, dtype="float16"),
        hardware=load_hardware("a100-80g"),
        source=PublishedCosts(system=system, path=path, model=f"facebook/{model}"),
        utilization=0.95,
    )


def _replicas(run: MeasuredRun, system: ServingSystem) -> list[Replica]:
    if found := _SPLIT.fullmatch(run.config):
        wide, deep, decode_wide, decode_deep = map(int, found.groups())
        return [system.replica(Role.PREFILL, wide, deep), system.replica(Role.DECODE, decode_wide, decode_deep)]
    if found := _COLOCATED.fullmatch(run.config):
        return [system.replica(Role.MIXED, int(found[1]), int(found[2] or 1))]
    raise ValueError(f"{run.name}: config: {run.config!r} is not like c21d11 or tp1")


def _kv_tokens(data: Path, model: str = MODEL) -> dict[tuple[int, int], int]:
    with (data / "max_num_tokens.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == f"facebook/{model}"]
    return {(int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"]) for row in rows}


def _seen(ttft_s: Iterable[float], tpot_s: Iterable[float]) -> Seen:
    ttft, tpot = np.fromiter(ttft_s, float), np.fromiter(tpot_s, float)
    kept = (ttft <= TTFT_S) & (np.isnan(tpot) | (tpot <= TPOT_S))
    return Seen(
        attainment=float(kept.mean()),
        ttft_p50_s=float(np.nanpercentile(ttft, 50)),
        ttft_p90_s=float(np.nanpercentile(ttft, 90)),
        tpot_p50_s=float(np.nanpercentile(tpot, 50)),
        tpot_p90_s=float(np.nanpercentile(tpot, 90)),
    )


def show_ablations(rows: Mapping[str, Sequence[Replayed]]) -> str:
    """A table of Markdown, by what was left out: attainment, points off, TPOT in milliseconds."""
    runs = next(iter(rows.values()))
    lines = [
        f"| left out | {' | '.join(row.run.name for row in runs)} |",
        f"|---|{'---|' * len(runs)}",
        "| (measured) | " + " | ".join(_attained(row.measured) for row in runs) + " |",
    ]
    for name, replayed in rows.items():
        cells = (f"{_attained(row.simulated)} ({row.points:+.1f} points)" for row in replayed)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _attained(seen: Seen) -> str:
    return f"{100 * seen.attainment:.1f} %, TPOT {1e3 * seen.tpot_p50_s:.0f} / {1e3 * seen.tpot_p90_s:.0f}"


def show(rows: Sequence[Replayed]) -> str:
    """A table of Markdown: measured against simulated, latencies in milliseconds."""
    lines = [
        "| run | requests | attained % (measured → simulated) | points | measured, 95 % "
        "| TTFT p50 | TTFT p90 | TPOT p50 | TPOT p90 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        measured, simulated = row.measured, row.simulated
        cells = [
            f"{1e3 * getattr(measured, name):.0f} → {1e3 * getattr(simulated, name):.0f} ({100 * error:+.0f} %)"
            for name, error in row.errors().items()
        ]
        attained = f"{100 * measured.attainment:.1f} → {100 * simulated.attainment:.1f}"
        low, high = row.interval
        within = f"{100 * low:.1f} to {100 * high:.1f}"
        cells = [row.run.name, str(len(row.run.asked)), attained, f"{row.points:+.1f}", within, *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
